"""Metrics as people and programs read them: one line about each, with and without the rows that are left out."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from .output import cell, console, print_records

_ALL_ROWS = "_all_rows"
_BIN = "density["

#: One line for a newcomer about every metric, in the order in which they are shown.
DEFINITIONS = {
    "fvu": "share of the activations' variance that the dictionary does not explain; 0 is perfect, 1 is the mean",
    "cosine": "cosine between an activation and its reconstruction, on average",
    "reconstruction_bias": "size of reconstructions; below 1 they are too short",
    "l0": "features active on one token, on average",
    "dead_share": "features that are active on no test token",
    "ce_model": "cross-entropy of the untouched model on test text, nats per token",
    "ce_spliced": "cross-entropy with activations replaced by their reconstruction",
    "ce_mean": "cross-entropy with activations replaced by their mean",
    "ce_zero": "cross-entropy with activations replaced by zero",
    "ce_increase": "what the reconstruction costs the model, nats per token",
    "ce_recovered": "share of the loss from mean ablation that the reconstruction avoids; 1 is perfect",
    "ce_recovered_zero": "the same against zero ablation, which flatters",
    "kl": "divergence of the model's predictions with the reconstruction from those without, nats per token",
    "kl_mean": "divergence under mean ablation",
    "kl_zero": "divergence under zero ablation",
    "kl_recovered": "share of the divergence under mean ablation that the reconstruction avoids",
    "kl_recovered_zero": "the same against zero ablation",
}


@dataclass(frozen=True)
class MetricLine:
    """A metric with its 95 % interval; `all_rows` counts first positions and massive-norm rows in."""

    name: str
    value: float | None
    definition: str
    n: int | None
    low: float | None
    high: float | None
    all_rows: float | None = None
    all_rows_low: float | None = None
    all_rows_high: float | None = None


def paired(rows: Sequence[dict[str, Any]]) -> list[MetricLine]:
    """Metric rows in the order of `DEFINITIONS`, each with its `_all_rows` twin; a hook point's own ones come last."""
    by_name = {row["metric"]: row for row in rows}
    places = dict.fromkeys(["", *sorted(name.partition("@")[1] + name.partition("@")[2] for name in by_name)])
    lines = []
    for place in places:
        for name, definition in DEFINITIONS.items():
            row, twin = by_name.get(name + place), by_name.get(name + _ALL_ROWS + place, {})
            if row:
                every = {f"all_rows{key and '_'}{key}": twin.get(key or "value") for key in ("", "low", "high")}
                ends = {key: row[key] for key in ("value", "n", "low", "high")}
                lines.append(MetricLine(name + place, definition=definition, **ends, **every))
    return lines


def print_metrics(rows: Sequence[dict[str, Any]]) -> None:
    """The table of a finished evaluation."""
    lines = [
        [
            m.name,
            m.value,
            _interval(m.low, m.high),
            m.all_rows,
            _interval(m.all_rows_low, m.all_rows_high),
            m.definition,
        ]
        for m in paired(rows)
    ]
    print_records(
        ["metric", "value", "95 % interval", "all rows", "95 % interval", "on test documents"], lines, "table"
    )


def print_evaluation(
    name: str, reads: Sequence[str], writes: Sequence[str], rows: Sequence[dict[str, Any]], *, as_json: bool
) -> None:
    """Everything that was measured of one dictionary."""
    bins = [row for row in rows if row["metric"].startswith(_BIN)]
    if as_json:
        keys = ("metric", "value", "n", "low", "high")
        found = {
            "dictionary": name,
            "reads": list(reads),
            "writes": list(writes),
            "split": "test",
            "metrics": [{key: _plain(row[key]) for key in keys} for row in rows if row not in bins],
            "density_histogram": [
                {"from": low, "below": high, "share": row["value"], "low": row["low"], "high": row["high"]}
                for row in bins
                for low, high in [_edges(row)]
            ],
        }
        print(json.dumps(found, ensure_ascii=False, allow_nan=False))
        return
    out, way = console(), " + ".join(reads)
    way += "" if tuple(reads) == tuple(writes) else f" to {' + '.join(writes)}"
    out.print(Text(f"{name} at {way}", "bold"))
    print_metrics(rows)
    explained = "all rows: first positions of windows and massive-norm rows count too, and are replaced like the others"
    out.print(Text(explained, "dim"))
    lines = [
        [f"{low:.1e} to {high:.1e}", row["value"], _interval(row["low"], row["high"]), "█" * round(60 * row["value"])]
        for row in bins
        for low, high in [_edges(row)]
    ]
    out.print()
    print_records(["active on this share of rows", "latents", "95 % interval", ""], lines, "table")


def _edges(row: dict[str, Any]) -> tuple[float, float]:
    low, high = row["metric"].removeprefix(_BIN).rstrip(")").split(",")
    return float(low), float(high)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{cell(low)} to {cell(high)}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
