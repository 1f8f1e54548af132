"""Scores of probes on test cases, with intervals over the documents that the cases lie in."""

from dataclasses import dataclass

import numpy as np

from ..receipts.statistics import PERCENTILES, DocumentDraws

DRAWS = 1000


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; NaN ends where fewer than two documents leave nothing to draw."""

    value: float
    low: float
    high: float


class TestDocuments:
    """Draws of the test documents, the same for every score, so that differences are drawn together."""

    __test__ = False  # not a test to pytest

    def __init__(self, documents: np.ndarray, *, draws: int = DRAWS, seed: int = 0):
        self.names = np.unique(documents)
        self.draws = DocumentDraws(len(self.names), draws=draws, seed=seed)
        self.times = self.draws.times.astype(np.float64)  # [B, D]

    def auroc(self, scores: np.ndarray, y: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """[1 + B] AUROC as it is, then in every draw; NaN in a draw without one of the labels."""
        p, q = scores[y], scores[~y]
        wins = (np.sign(p[:, None] - q[None, :]) + 1) / 2
        dense = np.searchsorted(self.names, documents)
        of_positive, of_negative = dense[y], dense[~y]
        # wins summed by (document of the positive, document of the negative): [D, D]
        table = np.zeros((len(self.names), len(self.names)))
        np.add.at(table, (of_positive[:, None], of_negative[None, :]), wins)
        times = np.vstack([np.ones(len(self.names)), self.times])
        won = np.einsum("bd,de,be->b", times, table, times, optimize=True)
        pairs = (times @ np.bincount(of_positive, minlength=len(self.names))) * (
            times @ np.bincount(of_negative, minlength=len(self.names))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return won / pairs

    def balanced_accuracy(self, scores: np.ndarray, y: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """[1 + B] mean of the shares of positives above 0 and of negatives below; 0 is half right."""
        right = (np.sign(np.where(y, scores, -scores)) + 1) / 2
        dense = np.searchsorted(self.names, documents)
        times = np.vstack([np.ones(len(self.names)), self.times])

        def share(of: np.ndarray) -> np.ndarray:
            hits = np.bincount(dense[of], weights=right[of], minlength=len(self.names))
            all_ = np.bincount(dense[of], minlength=len(self.names))
            with np.errstate(invalid="ignore", divide="ignore"):
                return (times @ hits) / (times @ all_)

        return (share(y) + share(~y)) / 2


def interval(draws: np.ndarray) -> Interval:
    """From a value and its draws [1 + B]."""
    rest = draws[1:][np.isfinite(draws[1:])]
    if len(rest) < 2 or not np.isfinite(draws[0]):
        return Interval(float(draws[0]), float("nan"), float("nan"))
    low, high = np.percentile(rest, PERCENTILES)
    return Interval(float(draws[0]), float(low), float(high))
