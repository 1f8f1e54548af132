"""The windows that pruning reads: those where chosen features are active, and others spread over the documents."""

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeql.store.evidence import Evidence

from ..split_rows import sample_windows
from ..token_classes import pad_lists
from .units import PruneError

#: Token ids and documents of windows, [W, T] each.
Windows = tuple[np.ndarray, np.ndarray]


class SplitWindows:
    """All full windows of one split, with where features are active. Raises EvidenceError before the index has run."""

    def __init__(self, evidence: Evidence, dictionary: str, split: str):
        self.evidence, self.dictionary, self.split = evidence, dictionary, split
        table = evidence.read("windows", split=split)
        ids, documents = pad_lists(table["token_ids"]), pad_lists(table["document_ids"])
        full = (ids >= 0).all(1)
        self.window_ids = table["window_id"].to_numpy()[full]
        self.ids, self.documents = ids[full], documents[full]

    def spread(self, num: int) -> Windows:
        """At most `num` windows, evenly over the split. Raises PruneError where there is none."""
        if len(self.ids) == 0:
            raise PruneError(f"the run has no full window of {self.split} text")
        at = sample_windows(self.ids, num, self.ids.shape[1])
        return self.ids[at], self.documents[at]

    def active(self, features: Sequence[int], num: int) -> Windows:
        """At most `num` windows on which any of the features is active: each document's richest first.

        Raises PruneError where there is none.
        """
        rows = self._active_rows(features)
        order = np.argsort(self.window_ids)
        at = np.minimum(np.searchsorted(self.window_ids[order], rows), len(order) - 1) if len(order) else rows[:0]
        at = order[at][self.window_ids[order[at]] == rows[: len(at)]]
        counts = np.bincount(at, minlength=len(self.ids))
        rich = np.flatnonzero(counts)
        if len(rich) == 0:
            raise PruneError(
                f"the chosen features are active on no {self.split} text: choose others, or give more text"
            )
        rich = rich[np.argsort(-counts[rich], kind="stable")]
        owner = self.documents[rich, -1]
        turn = np.array([np.count_nonzero(owner[:n] == own) for n, own in enumerate(owner)])
        chosen = np.sort(rich[np.lexsort((-counts[rich], turn))[:num]])
        return self.ids[chosen], self.documents[chosen]

    def _active_rows(self, features: Sequence[int]) -> np.ndarray:
        """Window of every row that a chosen feature is active on."""
        condition = (
            (pc.field("split") == self.split)
            & (pc.field("dictionary") == self.dictionary)
            & pc.field("feature").isin(list(features))
        )
        files = self.evidence.files("activations")
        parts = [
            pq.read_table(file, columns=["window_id"], filters=condition)["window_id"].to_numpy() for file in files
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
