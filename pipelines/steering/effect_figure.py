"""Dose and response of steering as a figure."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..pages import new_figure, png
from .dose_response import KL_BUDGET
from .effect_results import PROMPT, SELF, EffectStudy, SubjectEffect
from .effect_summary import named, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Up to so many subjects have a table and a panel each.
FEW = 6
_COLOURS = {SELF: "C0", "diff_mean": "C1", "logistic": "C2", "unembedding": "C3", "random_row": "C4", "pca": "C5"}


def figure(study: EffectStudy) -> bytes:
    """PNG: a panel a subject where there are few; of many their curves together, and all methods at the budget."""
    few = study.subjects[:FEW]
    if len(study.subjects) > FEW:
        made = new_figure(10, 4, of="command")
        left, right = made.subplots(1, 2, width_ratios=[3, 2])
        _plot_many(study, left)
        _plot_methods(study, right)
    else:
        columns = min(3, len(few))
        made = new_figure(4.6 * columns + 1, 3.6 * math.ceil(len(few) / columns), of="command")
        for axis, effect in zip(
            made.subplots(math.ceil(len(few) / columns), columns, squeeze=False).flat, few, strict=False
        ):
            _plot_subject(axis, effect)
    return png(made)


def _plot_subject(axis: "Axes", effect: SubjectEffect) -> None:
    for method, found in effect.methods.items():
        curve = sorted(
            [(0.0, 0.0, 0.0, 0.0), *((p.strength, p.own.value, p.own.low, p.own.high) for p in found.points)]
        )
        if not found.points:
            continue
        x, y, low, high = (
            np.array([np.nan if v is None else v for v in column], float) for column in zip(*curve, strict=True)
        )
        axis.plot(x, y, marker="o", markersize=3, color=_COLOURS[method], label=named(method))
        if method == SELF:
            axis.fill_between(x, low, high, color=_COLOURS[method], alpha=0.2, linewidth=0)
    random = effect.groups["random"]
    axis.fill_between(
        random.strengths, random.mean - 2 * random.spread, random.mean + 2 * random.spread, color="0.7", alpha=0.5,
        linewidth=0, label="random directions, 2 sd",
    )  # fmt: skip
    if effect.own.reached:
        axis.axvline(effect.own.strength, color="0.4", linestyle=":", label=f"KL {KL_BUDGET}")
    axis.set(xlabel="strength (median norms)", ylabel="own shift (nats)")
    axis.set_title(f"{effect.subject.name}: {', '.join(effect.subject.concept.measured_words[:4])}", fontsize=8)


def _plot_many(study: EffectStudy, axis: "Axes") -> None:
    """Median and central half of the features' own shifts over the strength, and of what they do to other concepts."""
    strengths = [s for s in sorted(study.config.strengths) if s != 0]
    by_strength = {s: [] for s in strengths}
    others = {s: [] for s in strengths}
    for effect in study.subjects:
        for p in effect.methods[SELF].points:
            by_strength[p.strength].append(p.own.value)
            others[p.strength].append(p.others)
    x = sorted([0.0, *strengths])
    for values, name, colour in ((by_strength, "own concept", "C0"), (others, "other concepts", "C7")):
        low, mid, high = np.array([np.quantile(values.get(s) or [0.0], [0.25, 0.5, 0.75]) for s in x]).T
        axis.plot(x, mid, marker="o", markersize=3, color=colour, label=name)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    means = np.array([e.groups["random"].mean for e in study.subjects])
    spreads = np.array([e.groups["random"].spread for e in study.subjects])
    at, mid, spread = study.subjects[0].groups["random"].strengths, np.median(means, 0), np.median(spreads, 0)
    axis.fill_between(at, mid - 2 * spread, mid + 2 * spread, color="0.7", alpha=0.5, linewidth=0, label="random, 2 sd")
    axis.set(xlabel="strength (median norms)", ylabel="shift (nats): median, central half")


def _plot_methods(study: EffectStudy, axis: "Axes") -> None:
    """Own shifts at the budget, a box a method."""
    methods = [m for m in summarise(study).methods if m != PROMPT]
    shifts = [[e.methods[m].read.own.value for e in study.subjects if m in e.methods] for m in methods]
    axis.boxplot(shifts, orientation="horizontal", showfliers=False)
    axis.set_yticks(range(1, len(methods) + 1), [named(m) for m in methods], fontsize=8)
    axis.axvline(0, color="0.8")
    axis.set(xlabel=f"own shift at KL {KL_BUDGET} (nats)")
    axis.invert_yaxis()
