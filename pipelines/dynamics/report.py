"""Training dynamics as tables and as a plot."""

import json
from collections.abc import Mapping
from typing import Any

from ..output import print_records
from ..pages import new_figure, png
from .crosscoder import ONE_MODEL
from .job import CONTROL, Dynamics

_COLUMNS = ("alive_before", "kept", "turned", "silent", "born", "cosine_median", "cosine_p10", "chance_cosine_p95")


def print_dynamics(found: Dynamics, *, as_json: bool) -> None:
    """Print what became of features at every step, then whose the crosscoder's latents are."""
    if as_json:
        print(json.dumps(found.summary(), ensure_ascii=False))
        return
    rows = [[name, *(own[c] for c in _COLUMNS)] for name, own in _beside(found)]
    print_records(["step", *_COLUMNS], rows, "table")
    kept = ", ".join(f"{name} {n}" for name, n in zip(found.names, found.survivors, strict=True))
    print(f"of the first checkpoint's features: {kept}\n")
    if found.crosscoder is None:
        return
    columns = ("alive", "base_only", "shared", "tuned_only", "share_p5", "share_p95", "shared_cosine_median")
    over = [("first and last", "summary"), ("first twice", CONTROL)]
    rows = [[name, *(found.crosscoder[key][c] for c in columns)] for name, key in over if key in found.crosscoder]
    print_records(["crosscoder over", *columns], rows, "table")
    for title, key in (("most the last's", "most_tuned"), ("most the first's", "most_base")):
        rows = [[row["latent"], row["share"], " · ".join(row["examples"])] for row in found.crosscoder[key]]
        print_records(["latent", "share", title], rows, "table")


def _beside(found: Dynamics) -> list[tuple[str, Mapping[str, Any]]]:
    """Every step, and under it its control."""
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for name, own in found.steps.items():
        rows.append((name, own))
        if name in found.controls:
            rows.append((f"control: {name.split(' -> ')[0]} again", found.controls[name]))
    return rows


def plot(found: Dynamics) -> bytes:
    """Fates by step; the crosscoder's shares where there is one; as PNG."""
    figure = new_figure(10 if found.latents is not None else 6, 4, of="training dynamics")
    axes: Any = figure.subplots(1, 2 if found.latents is not None else 1, squeeze=False)[0]
    beside = _beside(found)
    names, bottom = [name for name, _ in beside], [0] * len(beside)
    for fate in ("kept", "turned", "silent"):
        counts = [own[fate] for _, own in beside]
        axes[0].bar(range(len(names)), counts, 0.6, bottom=bottom, label=fate)
        bottom = [low + n for low, n in zip(bottom, counts, strict=True)]
    born = [own["born"] for _, own in beside]
    axes[0].scatter(range(len(names)), born, color="black", label="born", zorder=3)
    axes[0].set_xticks(range(len(names)), names, fontsize=7, rotation=15)
    axes[0].set_title("features alive before the step", fontsize=9)
    axes[0].legend(fontsize=7)
    if found.latents is not None:
        axes[1].hist(found.latents["share"].to_numpy(), bins=[n / 40 for n in range(41)], color="tab:purple")
        for edge in ONE_MODEL:
            axes[1].axvline(edge, color="gray", linestyle=":")
        axes[1].set_yscale("symlog")
        axes[1].set_title("crosscoder: share of the last model in a latent's decoder", fontsize=9)
    return png(figure)
