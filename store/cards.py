"""What is shown of a feature wherever it turns up, of all features of a dictionary in memory: about 80 bytes each.

Joining labels to a few features that lie anywhere makes DuckDB decode the labels of all of them. Arrow is asked for
nothing that has to do with Python's own objects: it imports pandas, where that is there, for 35 MB of memory.
"""

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .query import arrow_reader, plain_numbers
from .text_rows import columns


class Cards:
    """Label, kind, auroc, density and largest train activation by feature."""

    def __init__(self, statistics: dict[str, np.ndarray], labels: pa.Table):
        """Columns feature, density, max_activation; rows of feature, label, kind, auroc, at most one a feature.

        Of `labels` feature -1 stands for all that have none; no field is null.
        """
        order = np.argsort(statistics["feature"], kind="stable")
        self.features = statistics["feature"][order].astype(np.int64)  # ascending
        self._is_dense = bool(len(self.features)) and int(self.features[-1]) == len(self.features) - 1  # 0, 1, 2, ...
        self.max_activation = statistics["max_activation"][order]
        labelled = plain_numbers(labels["feature"].combine_chunks(), np.int32)
        by_feature = np.argsort(labelled, kind="stable")
        first = np.searchsorted(labelled, self.features, sorter=by_feature)
        place = by_feature[np.minimum(first, len(labelled) - 1)]
        place[labelled[place] != self.features] = by_feature[0]  # -1 is the smallest
        rows = pa.Array.from_buffers(pa.int64(), len(place), [None, pa.py_buffer(np.ascontiguousarray(place))])
        self._texts = {name: labels[name].combine_chunks().take(rows) for name in ("label", "kind")}
        kinds = self._texts["kind"].dictionary_encode()
        self._kinds = [kinds.dictionary[n].as_py() for n in range(len(kinds.dictionary))]
        self._kind = plain_numbers(kinds.indices, np.int32).astype(np.uint8)
        self._numbers = {
            "auroc": plain_numbers(labels["auroc"].combine_chunks(), np.float32)[place],
            "density": statistics["density"][order],
            "max_activation": self.max_activation,
        }
        self._orders: dict[tuple[str, bool], np.ndarray] = {}

    @classmethod
    def read(cls, connection: duckdb.DuckDBPyConnection, dictionary_id: int, segment_id: int) -> "Cards":
        """Those of a dictionary, its statistics on one segment. Two questions: to join them takes 40 MB more."""
        statistics = columns(
            connection,
            "SELECT feature, density, max_activation FROM derived.feature_stats "
            f"WHERE segment_id = {segment_id} AND split = 'train'",
        )
        query = (
            "SELECT -1 AS feature, 'unexplained' AS label, 'none' AS kind, 'nan'::FLOAT AS auroc UNION ALL "
            "SELECT feature, coalesce(label, 'unexplained'), coalesce(kind, 'none'), coalesce(auroc, 'nan'::FLOAT) "
            f"FROM evidence.labels WHERE dictionary_id = {dictionary_id}"
        )
        return cls(statistics, arrow_reader(connection.sql(query)).read_all())

    def column(self, name: str) -> pa.Array:
        """label or kind of all features, in their order."""
        return self._texts[name]

    def numbers(self, name: str) -> np.ndarray:
        """[F] auroc, density or max_activation of all features, NaN where there is none."""
        return self._numbers[name]

    def kinds(self) -> dict[str, int]:
        """How many features there are of each kind."""
        return dict(zip(self._kinds, np.bincount(self._kind, minlength=len(self._kinds)).tolist(), strict=True))

    def of_kind(self, kind: str) -> np.ndarray:
        """[F] bool: features of a kind."""
        return self._kind == (self._kinds.index(kind) if kind in self._kinds else len(self._kinds))

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
            labels = pc.utf8_lower(self._texts["label"])  # pyright: ignore[reportAttributeAccessIssue]
            unnamed = np.ascontiguousarray(self.of_kind("none")).view(np.uint8)
            last = pa.Array.from_buffers(pa.uint8(), len(unnamed), [None, pa.py_buffer(unnamed)])
            table = pa.Table.from_arrays([last, labels], names=["last", "label"])
            way = "descending" if descending else "ascending"
            keys = [("last", "ascending"), ("label", way)]
            found = pc.sort_indices(table, sort_keys=keys)  # pyright: ignore[reportAttributeAccessIssue]
            return plain_numbers(found, np.uint64)
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
        if row is None:
            return None
        auroc = float(self._numbers["auroc"][row])
        return {
            "label": self._texts["label"][row].as_py(),
            "kind": self._kinds[self._kind[row]],
            "auroc": None if np.isnan(auroc) else auroc,
            "density": float(self._numbers["density"][row]),
        }

    def label(self, feature: int) -> str:
        """Its label, 'unexplained' where there is none."""
        row = self._row(feature)
        return "unexplained" if row is None else self._texts["label"][row].as_py()

    def _row(self, feature: int) -> int | None:
        if self._is_dense:
            return feature if 0 <= feature < len(self.features) else None
        row = int(np.searchsorted(self.features, feature))
        return row if row < len(self.features) and self.features[row] == feature else None
