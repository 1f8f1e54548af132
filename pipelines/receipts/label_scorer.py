"""The scorer of a run's labels: executable ones are executed, words go to the scorer that the configuration names."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from ..explainers.base import Candidate
from ..split_rows import SplitRows
from .predicate_scorer import PredicateScorer
from .registry import COSTLY_SCORERS, scorers
from .scorer import Scorer

if TYPE_CHECKING:
    from ..run import Run


class LabelScorer:
    """Scorer of labels of both sorts. What scores words is built when the first label in words comes."""

    name: ClassVar[str] = "labels"
    executes: ClassVar[bool] = True

    def __init__(self, words: Callable[[], Scorer], *, is_costly: bool = False):
        """`words` makes the scorer of words; `is_costly`: it asks a language model about every row."""
        self._make_words, self._words, self.is_costly = words, None, is_costly
        self._executed = PredicateScorer()

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Words by `label.scorer`."""
        name = run.config.label.scorer
        return cls(lambda: scorers([name])[0].of(run), is_costly=name in COSTLY_SCORERS)

    def score(self, labels: Sequence[Candidate], rows: Sequence[np.ndarray], split: SplitRows) -> list[np.ndarray]:
        """For every label the scores of its rows; see `Scorer`."""
        out = self._executed.score(labels, rows, split)
        in_words = [index for index, label in enumerate(labels) if label.predicate is None]
        if in_words:
            if self._words is None:
                self._words = self._make_words()
            found = self._words.score([labels[i] for i in in_words], [rows[i] for i in in_words], split)
            for index, scores in zip(in_words, found, strict=True):
                out[index] = np.asarray(scores, np.float64)
        return out
