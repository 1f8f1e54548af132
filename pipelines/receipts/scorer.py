"""What a scorer is: how well does a label fit a row? A number a row, higher where it fits better."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from ..explainers.base import Candidate
from ..split_rows import SplitRows


class Scorer(Protocol):
    """Scores rows by a label. What must be learned of a feature is learned from train, before.

    Two things that controls ask are False where a scorer does not have them: `executes` (an executable label is
    executed, so that its score of a row is 1 or 0) and `is_costly` (a language model is asked about every row).
    """

    name: ClassVar[str]

    def score(self, labels: Sequence[Candidate], rows: Sequence[np.ndarray], split: SplitRows) -> list[np.ndarray]:
        """For every label the scores of its rows [n], float64. NaN: no answer could be had, which counts as wrong.

        Scorers see rows and labels, never which rows are active.
        """
        ...
