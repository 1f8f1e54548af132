"""A pruning curve as a table and as a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..output import print_records
from ..pages import new_figure, png
from .curve import Curve

#: Column of a row, title, whether less is better.
_PANELS = (
    ("ce_increase", "cross-entropy increase, nats a token"),
    ("feature_fvu", "change of the chosen features, share of their variance"),
    ("kept", "share of their active rows still active"),
    ("probe_auroc", "AUROC of the probe"),
)


def print_curve(curve: Curve, *, as_json: bool) -> None:
    """Print a row for every method and share; of random pruning the mean over seeds."""
    if as_json:
        print(json.dumps(asdict(curve), ensure_ascii=False, default=str))
        return
    columns = [name for name, _ in _PANELS if name in curve.before]
    rows = [["unpruned", 0.0, 0.0, *(_shown(curve.before[name]) for name in columns)]]
    for (method, share), own in grouped(curve.rows).items():
        cells = [_shown(own[0][name]) if len(own) == 1 else _spread(own, name) for name in columns]
        rows.append([method, share, own[0]["parameter_share"], *cells])
    print_records(["method", "share", "of parameters", *columns], rows, "table")


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float], list[Mapping[str, Any]]]:
    """Rows by method and share: several where there are several seeds."""
    found: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["share"]), []).append(row)
    return found


def plot(curve: Curve) -> bytes:
    """A panel for every measure, a line for every method, as PNG."""
    panels = [(name, title) for name, title in _PANELS if name in curve.before]
    figure = new_figure(4.4 * len(panels), 3.8, of="pruning curve")
    for axes, (name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for method in dict.fromkeys(row["method"] for row in curve.rows):
            points = {share: own for (m, share), own in grouped(curve.rows).items() if m == method}
            shares = [0.0, *points]
            values = [curve.before[name]["value"], *(_mean(own, name) for own in points.values())]
            axes.plot(shares, values, marker="o", markersize=3, label=method)
        axes.set_xlabel("share of units pruned")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        if name in ("ce_increase", "feature_fvu"):
            axes.set_yscale("symlog", linthresh=0.1)
    return png(figure)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name]["value"] for row in rows]))


def _shown(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _spread(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row[name]["value"] for row in rows]
    return f"{np.mean(values):.3f} (seeds {min(values):.3f} to {max(values):.3f})"
