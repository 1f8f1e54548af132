"""What is shown of a feature wherever it turns up, of all features of a dictionary in memory: about 80 bytes each.

Joining labels to a few features that lie anywhere makes DuckDB decode the labels of all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Cards:
    """Label, kind, auroc, density and largest train activation by feature."""

    def __init__(self, table: pa.Table):
        self.features = table["feature"].to_numpy().astype(np.int64)  # ascending
        self._is_dense = bool(len(self.features)) and int(self.features[-1]) == len(self.features) - 1  # 0, 1, 2, ...
        self._columns = {name: table[name].combine_chunks() for name in ("label", "kind", "auroc", "density")}
        self.max_activation = table["max_activation"].to_numpy()
        self._orders: dict[tuple[str, bool], np.ndarray] = {}

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

    def column(self, name: str) -> pa.Array:
        """label, kind, auroc or density of all features, in their order."""
        return self._columns[name]

    def numbers(self, name: str) -> np.ndarray:
        """[F] auroc, density or max_activation of all features, NaN where there is none."""
        if name == "max_activation":
            return self.max_activation
        return self._columns[name].to_numpy(zero_copy_only=False)

    def order(self, name: str, *, descending: bool) -> np.ndarray:
        """[F] rows sorted by a column, ties by number, nulls last."""
        key = (name, descending)
        if key not in self._orders:
            self._orders[key] = self._sorted(name, descending).astype(np.int32)
        return self._orders[key]

    def _sorted(self, name: str, descending: bool) -> np.ndarray:
        if name == "feature":
            rows = np.arange(len(self.features))
            return rows[::-1] if descending else rows
        if name == "label":
            labels = pc.utf8_lower(self._columns["label"])  # pyright: ignore[reportAttributeAccessIssue]
            last = pc.equal(self._columns["kind"], "none")  # pyright: ignore[reportAttributeAccessIssue]
            table = pa.table({"last": last, "label": labels})
            way = "descending" if descending else "ascending"
            keys = [("last", "ascending"), ("label", way)]
            return pc.sort_indices(table, sort_keys=keys).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        values = self.numbers(name).astype(np.float64)
        values = np.where(np.isnan(values), np.inf, -values if descending else values)
        return np.argsort(values, kind="stable")

    def rows(self, features: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where features stand in the columns, -1 for one that is not there."""
        features = np.asarray(features, np.int64)
        if len(self.features) == 0:
            return np.full(len(features), -1)
        if self._is_dense:
            return np.where((features >= 0) & (features < len(self.features)), features, -1)
        place = np.minimum(np.searchsorted(self.features, features), len(self.features) - 1)
        return np.where(self.features[place] == features, place, -1)

    def of(self, feature: int) -> dict[str, Any] | None:
        """label, kind, auroc and density of a feature; None for one that is not there."""
        row = self._row(feature)
        return None if row is None else {name: column[row].as_py() for name, column in self._columns.items()}

    def label(self, feature: int) -> str:
        """Its label, 'unexplained' where there is none."""
        row = self._row(feature)
        return "unexplained" if row is None else self._columns["label"][row].as_py()

    def _row(self, feature: int) -> int | None:
        if self._is_dense:
            return feature if 0 <= feature < len(self.features) else None
        row = int(np.searchsorted(self.features, feature))
        return row if row < len(self.features) and self.features[row] == feature else None
