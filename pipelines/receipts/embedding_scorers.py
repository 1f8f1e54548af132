"""Scorers by sentence embeddings: how near in meaning is a row's text to the label, or to rows where the feature fires?

    embedding_VIEW   cos(e(label), e(text of the row)); VIEW is word, near or window (`row_text.py`)
    embedding        mean of word and near: the word says most, the words beside it what is meant by it
    examples_VIEW    mean cos(e(text), e(active train texts)) - mean cos(e(text), e(inactive train texts)); no label

The word view cannot see context, the window view is noisy where there are few rows: both belong side by side. After
delphi's embedding scorers (Paulo et al. 2024, arXiv:2410.13928).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from ..embedder import Embedder
from ..explainers.base import Candidate
from ..split_rows import FeatureRows, SplitRows
from .row_text import VIEWS

if TYPE_CHECKING:
    from ..run import Run

#: Train rows of either side that an example scorer compares with.
NUM_EXAMPLES = 20
#: Texts whose vectors are in memory at once.
_TEXTS_AT_ONCE = 16_384


class EmbeddingScorer:
    """Cosine of a label with the text of a row, the mean of two views."""

    name: ClassVar[str] = "embedding"
    views: ClassVar[tuple[str, ...]] = ("word", "near")

    def __init__(self, embedder: Embedder):
        self.embedder = embedder

    @classmethod
    def of(cls, run: "Run") -> Self:
        """With the run's embedder. Raises EmbedderError where there is none."""
        return cls(run.embedder)

    def score(self, labels: Sequence[Candidate], rows: Sequence[np.ndarray], split: SplitRows) -> list[np.ndarray]:
        """Cosines [n] of every label with its rows; each distinct text is embedded once and cached."""
        of_labels = self.embedder.embed([label.label for label in labels])
        out = [np.zeros(len(own)) for own in rows]
        for view in self.views:
            for some, vectors in _texts_of(self.embedder, view, rows, split):
                for i, own in zip(some, vectors, strict=True):
                    out[i] += own @ of_labels[i] / len(self.views)
        return out


class WordScorer(EmbeddingScorer):
    """Reads the row's word alone: what it says is true of the word wherever it stands."""

    name: ClassVar[str] = "embedding_word"
    views: ClassVar[tuple[str, ...]] = ("word",)


class NearScorer(EmbeddingScorer):
    """Reads the word with three words on either side."""

    name: ClassVar[str] = "embedding_near"
    views: ClassVar[tuple[str, ...]] = ("near",)


class WindowScorer(EmbeddingScorer):
    """Reads 29 tokens around the row."""

    name: ClassVar[str] = "embedding_window"
    views: ClassVar[tuple[str, ...]] = ("window",)


class ExampleScorer:
    """Compares rows with a feature's train examples instead of a label: what can be told without words.

    `prepare` binds it to features; `score` then takes their labels and rows in the same order, and ignores the labels.
    """

    def __init__(self, embedder: Embedder, view: str = "near", *, seed: int = 0):
        self.embedder, self.view, self.seed = embedder, view, seed
        self._directions: np.ndarray | None = None  # [n, width]

    @property
    def name(self) -> str:
        """examples_VIEW."""
        return f"examples_{self.view}"

    def prepare(self, rows: FeatureRows, features: Sequence[int]) -> Self:
        """Read at most `NUM_EXAMPLES` active train rows of each of `features`, and as many that all features share.

        cos is linear in unit vectors, so a feature is one direction: the mean of its texts less that of the others.
        Features without an active train row score NaN.
        """
        train, rng = rows.train, np.random.default_rng(self.seed)
        eligible, active, starts = np.flatnonzero(train.eligible), train.active.rows, train.active.starts
        others = np.sort(rng.choice(eligible, min(4 * NUM_EXAMPLES, len(eligible)), replace=False))
        background = self.embedder.embed(VIEWS[self.view](train.windows, others))
        own, inactive = [], []
        for f in features:
            mine = active[starts[f] : starts[f + 1]]
            own.append(rng.choice(mine, min(NUM_EXAMPLES, len(mine)), replace=False))
            inactive.append(~np.isin(others, mine))
        directions = []
        for some, vectors in _texts_of(self.embedder, self.view, own, train):
            for i, texts in zip(some, vectors, strict=True):
                centre = texts.mean(axis=0) if len(texts) else np.full(background.shape[1], np.nan, np.float32)
                directions.append(centre - background[inactive[i]].mean(axis=0))
        self._directions = np.stack(directions) if directions else np.zeros((0, 0), np.float32)
        return self

    def score(self, labels: Sequence[Candidate], rows: Sequence[np.ndarray], split: SplitRows) -> list[np.ndarray]:
        """Scores [n] of the rows of every feature that `prepare` was given, in its order."""
        assert self._directions is not None and len(self._directions) == len(rows), "prepare() comes first"
        out = []
        for some, vectors in _texts_of(self.embedder, self.view, rows, split):
            for i, own in zip(some, vectors, strict=True):
                out.append((own @ self._directions[i]).astype(np.float64))
        return out


def _texts_of(
    embedder: Embedder, view: str, rows: Sequence[np.ndarray], split: SplitRows
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """(numbers of some of `rows`, their vectors [n, width]) in order, so many at a time that memory stays bounded."""
    start = 0
    while start < len(rows):
        stop, num = start, 0
        while stop < len(rows) and (stop == start or num + len(rows[stop]) <= _TEXTS_AT_ONCE):
            num += len(rows[stop])
            stop += 1
        every, back = np.unique(np.concatenate(rows[start:stop]), return_inverse=True)
        vectors = embedder.embed(VIEWS[view](split.windows, every))
        places = np.split(back, np.cumsum([len(r) for r in rows[start:stop]])[:-1])
        yield list(range(start, stop)), [vectors[at] for at in places]
        start = stop
