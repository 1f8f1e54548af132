"""Rates with exact intervals, and thresholds that keep one.

Clopper and Pearson 1934: the interval of a share that holds it in at least 95 % of cases, whatever it is.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

_LEVEL = 0.95


@dataclass(frozen=True)
class Rate:
    """hits of n with the exact 95 % interval, and the one-sided bound that the share is below with 95 % certainty."""

    hits: int
    n: int
    value: float
    low: float
    high: float
    below: float

    @classmethod
    def of(cls, fired: np.ndarray) -> "Rate":
        """Of texts, [n] bool. NaN where there are none."""
        hits, n = int(fired.sum()), len(fired)
        if n == 0:
            return cls(0, 0, math.nan, math.nan, math.nan, math.nan)
        side = (1 - _LEVEL) / 2
        low = 0.0 if hits == 0 else float(beta.ppf(side, hits, n - hits + 1))
        return cls(hits, n, hits / n, low, upper_bound(hits, n, side), upper_bound(hits, n, 1 - _LEVEL))


def upper_bound(hits: int, n: int, miss: float = 1 - _LEVEL) -> float:
    """The share that lies above the true one but with probability `miss`."""
    return 1.0 if hits >= n else float(beta.ppf(1 - miss, hits + 1, n - hits))


def least_texts(rate: float) -> int:
    """Texts without a false positive that it takes to certify a rate: 0.01 takes 299."""
    return math.ceil(math.log(1 - _LEVEL) / math.log1p(-rate))


def allowed(rate: float, n: int) -> int:
    """False positives among n texts that a threshold may leave.

    The most whose upper bound is within `rate`; where even none is too many, as many as the rate itself gives.
    """
    if upper_bound(0, n) > rate:
        return int(rate * n)
    return next(hits for hits in range(n) if upper_bound(hits + 1, n) > rate)


def level_for(scores: np.ndarray, rate: float) -> float:
    """The smallest level that no more of the good texts' scores [n] exceed than `allowed`."""
    return float(np.sort(scores)[::-1][allowed(rate, len(scores))])
