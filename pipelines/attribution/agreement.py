"""How well an estimate agrees with the exact thing: Pearson's and Spearman's correlation over a stated sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Agreement:
    """Correlations of estimated with exact effects over one sample; None where there is nothing to correlate."""

    sample: str
    n: int
    pearson: float | None
    spearman: float | None


def agreement(sample: str, estimates: Sequence[float], exact: Sequence[float]) -> Agreement:
    """Both correlations of pairs; None for fewer than 3 of them, or values that are all the same."""
    from scipy.stats import rankdata  # a second and 40 MB, which every command of a run would pay

    x, y = np.asarray(estimates, np.float64), np.asarray(exact, np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(sample, len(x), None, None)
    pearson, spearman = _correlation(x, y), _correlation(np.asarray(rankdata(x)), np.asarray(rankdata(y)))
    return Agreement(sample, len(x), pearson if math.isfinite(pearson) else None, spearman)


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.corrcoef(x, y)[0, 1])
