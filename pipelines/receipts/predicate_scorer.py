"""Scores executable labels by executing them: 1 where the predicate holds, 0 where it does not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from ..explainers.base import Candidate
from ..predicates import Predicate
from ..split_rows import SplitRows

if TYPE_CHECKING:
    from ..run import Run


class PredicateScorer:
    """Exact, and needs nothing but the text. A label in words only gets no answer (NaN)."""

    name: ClassVar[str] = "predicates"
    executes: ClassVar[bool] = True

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Needs nothing of the run."""
        return cls()

    def score(self, labels: Sequence[Candidate], rows: Sequence[np.ndarray], split: SplitRows) -> list[np.ndarray]:
        """For every label [n] float64; every predicate is executed once."""
        asked: dict[Predicate, list[int]] = {}
        out = [np.full(len(own), np.nan) for own in rows]
        for index, label in enumerate(labels):
            if label.predicate is not None:
                asked.setdefault(label.predicate, []).append(index)
        for predicate, indices in asked.items():
            holds = predicate.at(split.windows, np.concatenate([rows[index] for index in indices])).astype(np.float64)
            ends = np.cumsum([len(rows[index]) for index in indices])
            for index, own in zip(indices, np.split(holds, ends[:-1]), strict=True):
                out[index] = own
        return out
