"""What a comparison shows: a table on the terminal, a page with the distributions of cosines beside chance."""

from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from .atomic import write_whole
from .compare import Comparison
from .output import console, print_records
from .pages import new_figure, png, render

COLUMNS = (
    "first",
    "second",
    "shared",
    "95 % interval",
    "shared of alive",
    "mean max cosine",
    "chance",
    "chance, same covariance",
)


def print_comparison(comparison: Comparison, out: Path | None) -> None:
    """The pairs as a table, then splitting where widths differ, then how stable every dictionary is."""
    settings = comparison.settings
    print_records(list(COLUMNS), [_row(pair.summary) for pair in comparison.pairs], "table")
    lines = [
        "shared: one-to-one by decoder and by encoder rows alike, decoder cosine at least "
        f"{settings['shared_cosine']:g}; share of the narrower dictionary",
        "chance: mean cosine with the nearest of as many random rows",
    ]
    for pair in comparison.pairs:
        split = pair.summary.get("splitting")
        if split:
            lines.append(
                f"{split['wider']} against the narrower: {split['num_split']} features split in two or more, "
                f"{split['num_kept']} have one child, {split['num_gone']} none; {split['num_new']} features are new "
                f"(nearest cosine below {settings['split_cosine']:g})"
            )
    lines.append(
        f"written to {out}" if out else "--out FOLDER writes the page and the tables of all features and pairs"
    )
    for line in lines:
        console().print(Text(line, "dim"))


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """comparison.json, the Parquet tables, and comparison.html. Raises ConfigError without matplotlib."""
    comparison.save(folder)
    stable = [_stability(comparison, d.name) for d in comparison.dictionaries]
    page = render(
        "comparison.html",
        **comparison.summary(),
        columns=COLUMNS,
        rows=[_row(pair.summary) for pair in comparison.pairs],
        stable=stable,
        plot=b64encode(_plot(comparison)).decode(),
    )
    write_whole(folder / "comparison.html", page)


def _row(summary: dict[str, Any]) -> list[Any]:
    low, high = summary["shared_interval"]
    return [
        summary["first"],
        summary["second"],
        f"{summary['shared_share']:.1%}",
        f"{low:.1%} to {high:.1%}",
        "" if summary.get("shared_share_of_alive") is None else f"{summary['shared_share_of_alive']:.1%}",
        f"{summary['mean_max_cosine']:.3f}",
        *(f"{summary['nulls'][kind]['mean_max_cosine']:.3f}" for kind in ("isotropic", "covariance")),
    ]


def _stability(comparison: Comparison, name: str) -> dict[str, Any]:
    """In how many of the others the features of a dictionary are found, and when they were first seen."""
    table = comparison.features.filter([value == name for value in comparison.features["dictionary"].to_pylist()])
    shared = np.asarray(table["num_shared"])
    order = [d.name for d in comparison.dictionaries]
    seen = table["first_seen"].to_pylist()
    return {
        "dictionary": name,
        "found_in": [float((shared == n).mean()) for n in range(len(order))],
        "first_seen": [(other, seen.count(other) / len(seen)) for other in order[: order.index(name) + 1]],
    }


def _plot(comparison: Comparison) -> bytes:
    """PNG: a panel a pair, the cosine of every latent with its nearest in the other, beside both nulls."""
    pairs = comparison.pairs
    across = min(3, len(pairs))
    down = -(-len(pairs) // across)
    figure = new_figure(4.2 * across, 3 * down + 0.4, of="page")
    axes = figure.subplots(down, across, squeeze=False).flat
    bins = np.linspace(0, 1, 51)
    for axis, pair in zip(axes, pairs, strict=False):
        a, b = comparison.dictionaries[pair.first], comparison.dictionaries[pair.second]
        series = {
            "the other dictionary": pair.matching.nearest_cosine,
            "random rows": pair.chance["isotropic"],
            "random rows, same covariance": pair.chance["covariance"],
        }
        for name, values in series.items():
            axis.hist(values, bins, histtype="step", label=name, linewidth=1.5)
        axis.axvline(comparison.settings["shared_cosine"], color="0.6", linestyle=":")
        axis.set_title(f"{a.name}\nand {b.name}", fontsize=8)
        axis.set(xlabel="cosine of decoder rows with the nearest", ylabel="latents")
    for axis in list(axes)[len(pairs) :]:
        axis.remove()
    return png(figure)
