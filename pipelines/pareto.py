"""The report of a sweep: which dictionaries nothing beats, which l0 to take and why, as a plot and a page."""

from base64 import b64encode
from collections.abc import Sequence
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

from .atomic import write_whole
from .pages import new_figure, png, render

#: What a doubling of l0 must win to be worth its price, and how that is said. The share of the cross-entropy that is
#: recovered decides where it was measured: it says what the model keeps. Absolute, so that the advice does not depend
#: on which other dictionaries the sweep tried.
PAYS = {
    "ce_recovered": (0.01, "wins back {:.1%} of the cross-entropy that ablation costs"),
    "fvu": (0.02, "explains {:.1%} more of the variance"),
}
#: Dictionaries with a larger share of dead latents are passed over where there are others.
MAX_DEAD_SHARE = 0.1
#: Dictionaries closer in log2 l0 are not a choice between more and less l0: the better one stands for them.
SAME_L0 = 0.25

COLUMNS = (
    "dictionary", "l0", "fvu", "ce_increase", "ce_recovered", "dead_share", "step_ms", "train_seconds",
)  # fmt: skip
PANELS = {
    "fvu": "variance unexplained",
    "ce_increase": "cross-entropy increase (nats)",
    "dead_share": "dead share of latents",
    "step_ms": "training step (ms)",
}


def pareto(rows: Sequence[dict[str, Any]], metric: str = "fvu") -> list[dict[str, Any]]:
    """Rows that no other row beats in both l0 and `metric` (of which less is better), by rising l0."""
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["l0"], r[metric])):
        if not front or row[metric] < front[-1][metric]:
            front.append(row)
    return front


def advise(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """For each hook point the dictionary to take and why."""
    places = dict.fromkeys(row["hook_point"] for row in rows)
    return [{"hook_point": p, **_advise([r for r in rows if r["hook_point"] == p])} for p in places]


def _advise(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The last dictionary along the front up to which every doubling of l0 wins what `PAYS` asks for."""
    active = [r for r in rows if r["l0"] > 0]
    alive = [r for r in active if r["dead_share"] <= MAX_DEAD_SHARE] or active
    if not alive:
        return {"dictionary": "", "reason": "no dictionary has an active latent"}
    metric = next((m for m in PAYS if all(m in r for r in alive)), "fvu")
    needed, says = PAYS[metric]
    lost = [{**r, "lost": 1 - r[metric] if metric == "ce_recovered" else r[metric]} for r in alive]
    front = _hull(_apart(pareto(lost, "lost")))
    wins = [(before["lost"] - after["lost"]) / log2(after["l0"] / before["l0"]) for before, after in pairwise(front)]
    chosen = sum(win >= needed for win in wins)  # along a hull they only fall
    best = front[chosen]
    parts = [f"l0 {best['l0']:.1f}, fvu {best['fvu']:.3f}"]
    if "ce_increase" in best:
        parts[0] += f", cross-entropy +{best['ce_increase']:.3f} nats"
    if chosen:
        parts.append(f"the last doubling of l0 up to here {says.format(wins[chosen - 1])}")
    if chosen < len(wins):
        parts.append(f"a further one only {says.format(wins[chosen])}, less than the {needed:.0%} asked for")
    elif wins:
        parts.append("it is the largest l0 on the front, and a larger one may pay too")
    else:
        parts.append("no other dictionary is better in l0 or in quality")
    passed = len(active) - len(alive)
    if passed:
        parts.append(f"{passed} with more than {MAX_DEAD_SHARE:.0%} dead latents passed over")
    return {"dictionary": best["dictionary"], "reason": "; ".join(parts)}


def _apart(front: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A front without points that are nearly of one l0: the last, and best, of them stays."""
    kept: list[dict[str, Any]] = []
    start = 0.0
    for row in front:
        if kept and log2(row["l0"] / start) < SAME_L0:
            kept[-1] = row
        else:
            kept.append(row)
            start = row["l0"]
    return kept


def _hull(front: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lower convex hull of a front over log2 l0: one dictionary that came out badly does not end the climb."""
    hull: list[dict[str, Any]] = []
    for row in front:
        while len(hull) > 1 and _slope(hull[-2], row) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(row)
    return hull


def _slope(before: dict[str, Any], after: dict[str, Any]) -> float:
    return (after["lost"] - before["lost"]) / log2(after["l0"] / before["l0"])


def write_report(folder: Path, summary: dict[str, Any]) -> None:
    """`sweep.png`, and `sweep.html` with the same plot and a table. Raises ConfigError without matplotlib."""
    rows = summary["dictionaries"]
    chosen = {advice["dictionary"] for advice in summary["advice"]}
    places = dict.fromkeys(row["hook_point"] for row in rows)
    front = {r["dictionary"] for p in places for r in pareto([r for r in rows if r["hook_point"] == p])}
    image = plot(rows, chosen)
    write_whole(folder / "sweep.png", image)
    columns = [c for c in ("hook_point",) if len(places) > 1] + [c for c in COLUMNS if any(c in r for r in rows)]
    page = render("sweep.html", **summary, columns=columns, chosen=chosen, front=front, plot=b64encode(image).decode())
    write_whole(folder / "sweep.html", page)


def plot(rows: list[dict[str, Any]], chosen: set[str]) -> bytes:
    """PNG of every metric of `PANELS` against l0: a line an architecture (and width and hook point, where they vary).

    The front of fvu and of cross-entropy lies behind in grey; a ring marks what is advised. Raises ConfigError without
    matplotlib.
    """
    rows = [row for row in rows if row["l0"] > 0]
    panels = {m: title for m, title in PANELS.items() if any(m in row for row in rows)}
    lines = _lines(rows)
    places = dict.fromkeys(row["hook_point"] for row in rows)
    figure = new_figure(10, 3.6 * -(-len(panels) // 2) + 0.6, of="sweep")
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    for axis, (metric, title) in zip(axes, panels.items(), strict=False):
        for place in places if metric in ("fvu", "ce_increase") else ():
            front = pareto([r for r in rows if metric in r and r["hook_point"] == place], metric)
            axis.plot([r["l0"] for r in front], [r[metric] for r in front], color="0.8", linewidth=5, zorder=0)
        for name, group in lines.items():
            shown = [r for r in group if metric in r]
            axis.plot([r["l0"] for r in shown], [r[metric] for r in shown], "o-", label=name, markersize=4)
        for row in rows:
            if row["dictionary"] in chosen and metric in row:
                axis.plot(row["l0"], row[metric], "o", markersize=12, markerfacecolor="none", color="black")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        top = 1.05 * max(row[metric] for row in rows if metric in row) or 0.05
        axis.set(xlabel="l0 (active latents per row)", ylabel=title, ylim=(-0.02 * top, top))
        axis.grid(alpha=0.3)
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    return png(figure)


def _lines(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of one architecture, width and hook point by rising l0; the name says what varies."""
    parts = ["architecture", *(k for k in ("d_sae", "hook_point") if len({row[k] for row in rows}) > 1)]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["l0"]):
        lines.setdefault(" ".join(str(row[part]) for part in parts), []).append(row)
    return lines
