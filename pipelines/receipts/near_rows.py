"""Rung N3 of the ladder: rows in the stretches of text nearest in meaning to those where a feature fires.

A window is cut into stretches of 29 tokens, the length of a row's surroundings, and each is embedded once (cached): a
split of 377 windows of 128 tokens has 1,885 of them. From the stretches nearest to an active row's own, those in which
the feature never fires give one row each, the one whose token is about as frequent as the active row's: what is left to
tell them apart is neither topic nor frequency.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import numpy as np

from ..embedder import Embedder
from ..split_rows import SplitRows
from .row_text import surroundings

if TYPE_CHECKING:
    from ..run import Run

STRETCH = 29
#: Stretches that are tried for one active row.
NEAREST = 6


class NearestInMeaning:
    """Implements `examples.NearRows` by sentence embeddings."""

    def __init__(self, embedder: Embedder):
        self.embedder = embedder
        self._known: tuple[SplitRows, _Stretches] | None = None

    @classmethod
    def of(cls, run: "Run") -> Self:
        """With the run's embedder. Raises EmbedderError where there is none."""
        return cls(run.embedder)

    def near(self, active: Mapping[int, np.ndarray], split: SplitRows) -> Mapping[int, np.ndarray]:
        """By feature at most `NEAREST` rows an active row, those of the nearest stretches first; no row twice."""
        if self._known is None or self._known[0] is not split:
            self._known = split, _Stretches(self.embedder, split)
        stretches, starts = self._known[1], split.active.starts
        weak_starts = split.weak.starts
        out = {}
        for feature, rows in active.items():
            fires = [
                split.active.rows[starts[feature] : starts[feature + 1]],
                split.weak.rows[weak_starts[feature] : weak_starts[feature + 1]],
            ]
            out[feature] = stretches.near(np.asarray(rows, np.int64), np.concatenate(fires))
        return out


class _Stretches:
    """The stretches of a split with their vectors [M, width]."""

    def __init__(self, embedder: Embedder, split: SplitRows):
        tokens = split.windows.tokens
        windows, context = tokens.shape
        self.per_window, self.context = -(-context // STRETCH), context
        centres = np.minimum(np.arange(self.per_window) * STRETCH + STRETCH // 2, context - 1)
        self.eligible = split.eligible
        counts = np.bincount(tokens.ravel()[split.eligible], minlength=len(split.windows.vocabulary) + 1)
        self.frequency = np.log1p(counts[tokens.ravel()])  # [R]
        rows = (np.arange(windows)[:, None] * context + centres).ravel()
        vectors = embedder.embed(surroundings(split.windows, rows, tokens=STRETCH))
        self.vectors = np.where(split.eligible[rows][:, None], vectors, 0) if len(rows) else vectors

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Stretch of each row."""
        return rows // self.context * self.per_window + rows % self.context // STRETCH

    def near(self, rows: np.ndarray, fires: np.ndarray) -> np.ndarray:
        """Rows of silent stretches, the nearest of every one of `rows` first, then the second nearest of all, ..."""
        own = self.of_rows(rows)
        cosines = self.vectors[own] @ self.vectors.T  # [P, M]
        cosines[:, self.of_rows(fires)] = -np.inf
        cosines[:, ~self.vectors.any(axis=1)] = -np.inf
        most = min(NEAREST, cosines.shape[1])
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :most]  # [P, most]
        usable = np.take_along_axis(cosines, nearest, axis=1) > -np.inf
        picked = self._row_in(nearest, self.frequency[rows])
        found = np.where(usable, picked, -1).T.ravel()
        return np.array([*dict.fromkeys(found[found >= 0].tolist())], np.int64)

    def _row_in(self, stretches: np.ndarray, frequency: np.ndarray) -> np.ndarray:
        """[P, K]: of each stretch the row whose token's log count is nearest to `frequency` [P]; -1 without a row."""
        window, number = stretches // self.per_window, stretches % self.per_window
        position = number[..., None] * STRETCH + np.arange(STRETCH)  # [P, K, STRETCH]
        inside = position < self.context
        rows = window[..., None] * self.context + np.minimum(position, self.context - 1)
        apart = np.where(inside & self.eligible[rows], np.abs(self.frequency[rows] - frequency[:, None, None]), np.inf)
        best = apart.argmin(axis=2)[..., None]
        chosen = np.take_along_axis(rows, best, axis=2)[..., 0]
        return np.where(np.isfinite(np.take_along_axis(apart, best, axis=2)[..., 0]), chosen, -1)
