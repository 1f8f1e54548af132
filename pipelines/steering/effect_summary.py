"""Many features' steering effects in a few numbers, beside what is asked of them, and a line that says who won.

Intervals are 95 % bootstraps over the features; all features are measured on the same test documents.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saeql.sae.metrics import Estimate

from .dose_response import KL_BUDGET
from .effect_results import COMPETITORS, PROMPT, SELF, EffectStudy, SubjectEffect

#: What is asked of the features with the best output scores.
MIN_Z, MIN_SHARE, MIN_RATIO, MAX_OTHERS = 3.0, 0.6, 0.5, 0.2
_DRAWS = 2000


@dataclass(frozen=True)
class MethodSummary:
    """One method over all subjects that have it."""

    own: Estimate
    """Median own shift at the budget, nats."""
    others: float
    """Median of the other concepts' shift over the own one."""
    share_z: Estimate | None
    """Share with z above `MIN_Z`; None of prompts."""
    reached: int
    """Subjects on which the budget is reached (of a prompt: not exceeded)."""
    wins: int
    kl: float
    perplexity: float | None
    distinct_2: float | None
    repeat_rate: float | None
    hit_rate: float | None
    n: int


@dataclass(frozen=True)
class Summary:
    """Of a study."""

    methods: Mapping[str, MethodSummary]
    share_z: Estimate
    ratio: Estimate | None
    """Median own shift over that of the difference of means, on subjects that have both."""
    others: Estimate
    """Median of |other concepts' shift| / own shift, where the own one is above 0."""
    verdict: str


def summarise(study: EffectStudy) -> Summary:
    """Medians, shares and the verdict of a study."""
    rng, subjects = np.random.default_rng(study.config.seed), study.subjects
    wins = Counter(s.winner for s in subjects)
    methods = {}
    for method in COMPETITORS:
        having = [s for s in subjects if method in s.methods]
        if having:
            methods[method] = _method(method, having, wins[method], rng)
    z = np.array([s.own.z.value if s.own.z else np.nan for s in subjects])
    both = [s for s in subjects if "diff_mean" in s.methods]
    pairs = np.array([[s.own.own.value, s.methods["diff_mean"].read.own.value] for s in both]).reshape(-1, 2)
    others = _share_of_others(subjects, SELF)
    return Summary(
        methods,
        _estimate(z > MIN_Z, np.mean, rng),
        _estimate(pairs, lambda p: float(np.median(p[:, 0]) / np.median(p[:, 1])), rng) if len(pairs) else None,
        _estimate(others, np.median, rng),
        _verdict(wins, methods, len(subjects)),
    )


def _method(method: str, subjects: Sequence[SubjectEffect], wins: int, rng: np.random.Generator) -> MethodSummary:
    effects = [s.methods[method] for s in subjects]
    reads, texts = [e.read for e in effects], [e.texts for e in effects if e.texts is not None]
    z = [r.z.value for r in reads if r.z is not None]

    def mean(name: str) -> float | None:
        return float(np.nanmean([getattr(t, name) for t in texts])) if texts else None

    fits = [r.kl <= KL_BUDGET if method == PROMPT else r.reached for r in reads]
    ratios = _share_of_others(subjects, method)
    return MethodSummary(
        own=_estimate(np.array([r.own.value for r in reads]), np.median, rng),
        others=float(np.median(ratios)) if len(ratios) else float("nan"),
        share_z=_estimate(np.array(z) > MIN_Z, np.mean, rng) if z else None,
        reached=sum(fits),
        wins=wins,
        kl=float(np.median([r.kl for r in reads])),
        perplexity=float(np.nanmedian([t.perplexity for t in texts])) if texts else None,
        distinct_2=mean("distinct_2"),
        repeat_rate=mean("repeat_rate"),
        hit_rate=mean("hit_rate"),
        n=len(subjects),
    )


def _share_of_others(subjects: Sequence[SubjectEffect], method: str) -> np.ndarray:
    """|shift of other concepts| / own shift, of subjects whose own shift is above 0."""
    reads = [s.methods[method].read for s in subjects]
    found = [abs(r.others.value) / r.own.value for r in reads if r.own.value > 0]
    return np.array([f for f in found if np.isfinite(f)])


def _estimate(values: np.ndarray, statistic: Callable[[np.ndarray], float], rng: np.random.Generator) -> Estimate:
    """A statistic of subjects [n, ...] with its interval over draws of them; nan of none."""
    if not len(values):
        return Estimate(float("nan"), 0, None, None)
    value = float(statistic(values))
    if len(values) < 2:
        return Estimate(value, len(values), None, None)
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(_DRAWS)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(value, len(values), float(low), float(high))


def _verdict(wins: Counter[str], methods: Mapping[str, MethodSummary], n: int) -> str:
    """Who moves the concept most within the budget."""
    order = [(m, w) for m, w in wins.most_common() if w]
    first, most = order[0]
    tied = [m for m, w in order if w == most]
    if n == 1:
        head = f"at KL {KL_BUDGET} {named(first)} moves the concept most"
    else:
        who = f"{' and '.join(map(named, tied))} win{'s' * (len(tied) == 1)}"
        head = f"at KL {KL_BUDGET} {who} on {most} of {n} concepts"
    rest = ", ".join(f"{named(m)} {w}" for m, w in order if w != most)
    tail = "" if SELF in tied else f"; the features do not win ({wins[SELF]} of {n})" if n > 1 else ", not the feature"
    medians = ", ".join(f"{named(m)} {s.own.value:+.2f}" for m, s in methods.items() if m != PROMPT)
    return f"{head}{f' ({rest})' if rest else ''}{tail}; median shift in nats: {medians}"


def named(method: str) -> str:
    """A method in words."""
    return {
        SELF: "steered feature",
        "diff_mean": "difference of means",
        "unembedding": "unembedding mean",
        "random_row": "best random row",
        "pca": "principal component",
        PROMPT: "plain prompt",
    }.get(method, method.replace("_", " "))
