"""Examples that labels are scored on: active rows of a feature against a ladder of harder and harder inactive ones.

    N0  any inactive row
    N1  inactive rows matched to the active ones on token-frequency decile, position in the window and window length
    N2  rows of the same token id on which the feature does not fire at all
    N3  rows that do not fire, in the windows nearest in meaning to the active ones
    N4  rows on which the features nearest by decoder cosine are active, and this one does not fire

All rows of one feature's examples lie in one split, and so in documents that no label was made from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..split_rows import SplitRows

RUNGS = ("N0", "N1", "N2", "N3", "N4")


@dataclass(frozen=True)
class Examples:
    """Rows of one split for one feature: P active ones, and up to as many negatives on each rung."""

    feature: int
    split: str
    active: np.ndarray  # [P] rows, a sample over all strengths
    values: np.ndarray  # [P] their activations
    negatives: dict[str, np.ndarray]  # rung -> [Q] rows; a rung that could not be filled is shorter, or missing


class NearRows(Protocol):
    """Finds the rows that rung N3 is filled from. The class has `of(run)`, as scorers do."""

    def near(self, active: Mapping[int, np.ndarray], split: SplitRows) -> Mapping[int, np.ndarray]:
        """By feature: rows of `split` in the windows nearest in meaning to the feature's `active` rows, nearest first.

        More than there are active rows, since those on which the feature fires are dropped by the sampler.
        """
        ...
