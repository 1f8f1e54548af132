"""What is shown of a feature wherever it turns up, of all features of a dictionary in memory: about 80 bytes each.

Joining labels to a few features that lie anywhere makes DuckDB decode the labels of all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa


class Cards:
    """Label, kind, auroc, density and largest train activation by feature."""

    def __init__(self, table: pa.Table):
        self._features = table["feature"].to_numpy()  # ascending
        self._columns = {name: table[name].combine_chunks() for name in ("label", "kind", "auroc", "density")}
        self.max_activation = table["max_activation"].to_numpy()

    @classmethod
    def read(cls, ask: Callable[[str], pa.Table], dictionary_id: int, segment_id: int) -> "Cards":
        """Those of a dictionary, its statistics on one segment."""
        return cls(
            ask(
                "SELECT s.feature, coalesce(l.label, 'unexplained') AS label, coalesce(l.kind, 'none') AS kind, "
                "l.auroc, s.density, s.max_activation FROM derived.feature_stats s "
                f"LEFT JOIN evidence.labels l ON l.dictionary_id = {dictionary_id} AND l.feature = s.feature "
                f"WHERE s.segment_id = {segment_id} AND s.split = 'train' ORDER BY s.feature"
            )
        )

    def rows(self, features: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where features stand in the columns, -1 for one that is not there."""
        features = np.asarray(features, np.int64)
        if len(self._features) == 0:
            return np.full(len(features), -1)
        place = np.minimum(np.searchsorted(self._features, features), len(self._features) - 1)
        return np.where(self._features[place] == features, place, -1)

    def of(self, feature: int) -> dict[str, Any] | None:
        """label, kind, auroc and density of a feature; None for one that is not there."""
        (row,) = self.rows([feature])
        return None if row < 0 else {name: column[int(row)].as_py() for name, column in self._columns.items()}

    def label(self, feature: int) -> str:
        """Its label, 'unexplained' where there is none."""
        card = self.of(feature)
        return "unexplained" if card is None else card["label"]
