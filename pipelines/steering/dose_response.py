"""Dose and response: from effects at several strengths to what a direction does at a fixed cost, with intervals.

Cost is the KL divergence of the changed predictions from the model's own, in nats a token. It grows like the square of
the strength where effects are small, and the shift of a concept like the strength: between two measured strengths
everything is interpolated linearly in the square root of the KL. Strength 0 has shift and KL 0 and is always there.
Intervals are 95 %, bootstrapped over documents; strength and effects are read off every draw anew.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, rankdata

from saeql.sae.metrics import Bootstrap, Estimate

#: Nats at which directions are compared.
KL_BUDGET = 0.3
#: The area under the shift is taken up to here.
KL_AREA = 0.5


@dataclass(frozen=True)
class Curve:
    """What one direction does to one concept at strengths [A] ascending, 0 among them; on W windows."""

    strengths: np.ndarray  # [A] median norms
    own: np.ndarray  # [A, W] nats
    others: np.ndarray  # [A, W] nats, mean over the other concepts
    kl: np.ndarray  # [A, W] nats
    ce: np.ndarray  # [A, W] nats

    @classmethod
    def of(cls, strengths: np.ndarray, own: np.ndarray, others: np.ndarray, kl: np.ndarray, ce: np.ndarray) -> "Curve":
        """Points in any order, [n] and [n, W]; strength 0 joins them, of two equal strengths one stays."""
        zeros = np.zeros((1, own.shape[1]))
        all_strengths, first = np.unique(np.concatenate([[0.0], strengths]), return_index=True)
        own, others, kl, ce = (np.concatenate([zeros, values])[first] for values in (own, others, kl, ce))
        return cls(all_strengths, own, others, kl, ce)

    @property
    def upward(self) -> "Curve":
        """The part at strengths of 0 and above."""
        keep = self.strengths >= 0
        return Curve(self.strengths[keep], self.own[keep], self.others[keep], self.kl[keep], self.ce[keep])


class Documents:
    """The documents of windows [W], drawn again and again: [B, W] weights, first the windows as they are."""

    def __init__(self, groups: np.ndarray, num_draws: int, seed: int):
        size = int(groups.max()) + 1
        drawn = Bootstrap(size, num_draws, seed).weights
        self.num = size
        self.weights = np.concatenate([np.ones((1, size)), drawn])[:, groups]

    def means(self, values: np.ndarray) -> np.ndarray:
        """[B, ...] means over the windows of values [..., W]."""
        return np.moveaxis(values @ self.weights.T, -1, 0) / self.weights.sum(1).reshape(-1, *[1] * (values.ndim - 1))

    def estimate(self, draws: np.ndarray, n: int) -> Estimate:
        """The value, first of the draws [B], with the interval of the others; none of a single document."""
        rest = draws[1:][np.isfinite(draws[1:])]
        if self.num < 2 or not len(rest):
            return Estimate(float(draws[0]), n, None, None)
        low, high = np.quantile(rest, [0.025, 0.975])
        return Estimate(float(draws[0]), n, float(low), float(high))


@dataclass(frozen=True)
class Crossing:
    """Where curves [B] first cost so much: between points `left` and `left` + 1, at `share` of the way; nan: never."""

    left: np.ndarray  # [B]
    share: np.ndarray  # [B]

    @classmethod
    def of(cls, kl: np.ndarray, budget: float) -> "Crossing":
        """Of mean KL [B, A] at ascending strengths from 0 on."""
        root, goal = np.sqrt(np.maximum(kl, 0)), np.sqrt(budget)
        above = root[:, 1:] >= goal
        left = np.where(above.any(1), above.argmax(1), 0)
        at = np.arange(len(kl))
        low, high = root[at, left], root[at, left + 1]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(above.any(1), (goal - low) / (high - low), np.nan)
        return cls(left, share)

    def read(self, values: np.ndarray) -> np.ndarray:
        """[B] values there, of [B, A] or the same [A] for all."""
        values = np.broadcast_to(values, (len(self.left), values.shape[-1]))
        at = np.arange(len(self.left))
        low, high = values[at, self.left], values[at, self.left + 1]
        return low + self.share * (high - low)


def at_strengths(strengths: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[B, R] curves [B, R, A] at one strength a draw [B], linear in the strength, level beyond the last."""
    place = np.clip(np.searchsorted(strengths, wanted, side="right") - 1, 0, len(strengths) - 2)
    share = np.clip((wanted - strengths[place]) / (strengths[place + 1] - strengths[place]), 0, 1)[:, None]
    at = np.arange(len(wanted))
    low, high = values[at, :, place], values[at, :, place + 1]
    return low + share * (high - low)


@dataclass(frozen=True)
class ReadOut:
    """What a direction does to its concept where it costs `KL_BUDGET`; where it never does, at its last strength."""

    reached: bool
    strength: float  # median norms
    kl: float
    own: Estimate
    others: Estimate
    ce: Estimate
    z: Estimate | None  # among random directions of the same strength
    z_equal_kl: float | None  # among random directions that cost the same
    wrong_way: float  # share of windows whose shift is negative
    area: float | None  # of the shift over KL up to KL_AREA; None where it is never reached
    draws: np.ndarray  # [B] own shift of every draw, for differences of two directions


def read_out(curve: Curve, documents: Documents, n: int, randoms: "RandomCurves | None" = None) -> ReadOut:
    """Read a curve with a positive strength at `KL_BUDGET`; `n` positions were measured."""
    up = curve.upward
    kl, own = documents.means(up.kl), documents.means(up.own)  # [B, A]
    crossing = Crossing.of(kl, KL_BUDGET)
    reached = bool(np.isfinite(crossing.share[0]))
    if not reached:  # its last point stands in, in every draw
        crossing = Crossing(np.full(len(kl), len(up.strengths) - 2), np.ones(len(kl)))
    strengths, shifts = crossing.read(up.strengths), crossing.read(own)
    left, share = crossing.left[0], crossing.share[0]
    windows = up.own[left] + share * (up.own[left + 1] - up.own[left])
    z, z_equal_kl = None, None
    if randoms is not None:
        z = documents.estimate(randoms.z(shifts, strengths), n)
        z_equal_kl = randoms.z_equal_kl(float(shifts[0])) if reached else None
    return ReadOut(
        reached,
        float(strengths[0]),
        KL_BUDGET if reached else float(kl[0, -1]),
        documents.estimate(shifts, n),
        documents.estimate(crossing.read(documents.means(up.others)), n),
        documents.estimate(crossing.read(documents.means(up.ce)), n),
        z,
        z_equal_kl,
        float((windows < 0).mean()),
        area(kl[0], own[0]),
        shifts,
    )


@dataclass(frozen=True)
class Point:
    """What a direction does at one strength."""

    strength: float  # median norms
    own: Estimate
    others: float
    kl: float
    ce: float
    z: float | None  # among random directions of the same strength; None at negative ones
    wrong_way: float


def points(curve: Curve, documents: Documents, n: int, randoms: "RandomCurves | None" = None) -> tuple[Point, ...]:
    """A curve point by point, strength 0 left out; `n` positions were measured."""
    found = []
    for i, strength in enumerate(curve.strengths.tolist()):
        if strength == 0:
            continue
        draws, z = documents.means(curve.own[i]), None
        if randoms is not None and strength > 0:
            z = float(randoms.z(draws[:1], np.array([strength]))[0])
        others, kl, ce = (float(values[i].mean()) for values in (curve.others, curve.kl, curve.ce))
        wrong_way = float((curve.own[i] < 0).mean())
        found.append(Point(strength, documents.estimate(draws, n), others, kl, ce, z, wrong_way))
    return tuple(found)


@dataclass(frozen=True)
class RandomCurves:
    """Random directions on one concept: strengths [A] from 0 on, draws of their shifts and costs [B, R, A]."""

    strengths: np.ndarray
    own: np.ndarray
    kl: np.ndarray

    def z(self, shifts: np.ndarray, strengths: np.ndarray) -> np.ndarray:
        """[B] z of shifts [B] at strengths [B] among the random directions at the same strengths."""
        return _z(shifts, at_strengths(self.strengths, self.own[: len(shifts)], np.nan_to_num(strengths)))

    def at_budget(self) -> np.ndarray:
        """Shifts of the directions that reach `KL_BUDGET`, there."""
        found = Crossing.of(self.kl[0], KL_BUDGET).read(self.own[0])
        return found[np.isfinite(found)]

    def mean_at_budget(self) -> float | None:
        """Their mean, None where none does."""
        found = self.at_budget()
        return float(found.mean()) if len(found) else None

    def z_equal_kl(self, shift: float) -> float | None:
        """z of a shift among those of the random directions that reach `KL_BUDGET`; None where fewer than two do."""
        reached = self.at_budget()
        return float(_z(np.array([shift]), reached[None])[0]) if len(reached) > 1 else None


def _z(shifts: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[B] distance of shifts [B] from the mean of others [B, R], in their standard deviations."""
    return (shifts - others.mean(1)) / np.maximum(others.std(1, ddof=1), 1e-9)


def area(kl: np.ndarray, own: np.ndarray) -> float | None:
    """Area under a shift [A] over its KL [A] from 0 to `KL_AREA`, by trapezoids; None where that is never reached."""
    crossing = Crossing.of(kl[None], KL_AREA)
    if not np.isfinite(crossing.share[0]):
        return None
    stop = crossing.left[0] + 1
    x = np.append(kl[:stop], KL_AREA)
    y = np.append(own[:stop], crossing.read(own[None])[0])
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


@dataclass(frozen=True)
class Trend:
    """Whether more strength does more, and the other sign the other way."""

    spearman: float | None  # of strength and shift
    num_down: int  # documents whose shift is negative at the strongest negative strength
    num_documents: int
    sign_p: float | None  # of as many or more by chance; None without negative strengths


def trend(curve: Curve, groups: np.ndarray) -> Trend:
    """Of a curve on windows whose documents are `groups` [W]."""
    means = curve.own.mean(1)
    level = len(means) < 3 or np.ptp(means) == 0
    spearman = None if level else float(np.corrcoef(rankdata(curve.strengths), rankdata(means))[0, 1])
    if curve.strengths[0] >= 0:
        return Trend(spearman, 0, 0, None)
    size = int(groups.max()) + 1
    by_document = np.bincount(groups, curve.own[0], size) / np.bincount(groups, minlength=size)
    down, moved = int((by_document < 0).sum()), int((by_document != 0).sum())
    p = float(binomtest(down, moved, alternative="greater").pvalue) if moved else None
    return Trend(spearman, down, moved, p)
