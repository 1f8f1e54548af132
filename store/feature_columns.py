"""Statistics and label scores of all features of a dictionary in memory, about 70 bytes each, and titles of documents.

To read those of one feature takes DuckDB a millisecond and more a table, most of it spent on planning, and a page that
shows a feature would ask each time. Nothing here has to do with Arrow's Python objects or pandas, see `cards.py`.
"""

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from .query import arrow_reader, plain_numbers

#: Columns of feature_stats on train, and of labels, as they stand in a row of `features`.
STATISTICS = ("density", "mean_activation", "max_activation", "p50", "p90", "p99", "token_entropy", "num_documents")
SCORES = ("auroc", "auroc_low", "auroc_high", "f1", "n_active", "n_inactive")
_NONE = -(2**63)


class FeatureColumns:
    """What `feature_rows.feature_row` reads of feature_stats and labels, by feature; a null is None."""

    def __init__(self, d_sae: int):
        self._d_sae = d_sae
        self._columns: dict[str, np.ndarray] = {}
        self._is_there = np.zeros(d_sae, bool)

    @classmethod
    def read(
        cls, connection: duckdb.DuckDBPyConnection, dictionary_id: int, segment_id: int, d_sae: int
    ) -> "FeatureColumns":
        """Those of a dictionary, its statistics on one segment."""
        made = cls(d_sae)
        stats = f"FROM derived.feature_stats WHERE segment_id = {segment_id} AND split ="
        train = connection.execute(f"SELECT feature, {', '.join(STATISTICS)} {stats} 'train'").fetchnumpy()
        made._is_there[np.ma.getdata(train["feature"])] = True
        made._put(train)
        test = connection.execute(f"SELECT feature, density AS test_density {stats} 'test'").fetchnumpy()
        made._put(test)
        scores = f"SELECT feature, {', '.join(SCORES)} FROM evidence.labels WHERE dictionary_id = {dictionary_id}"
        made._put(connection.execute(scores).fetchnumpy())
        return made

    def _put(self, found: dict[str, Any]) -> None:
        features = np.ma.getdata(found.pop("feature"))
        for name, values in found.items():
            is_whole = values.dtype.kind in "iu"
            missing = _NONE if is_whole else np.nan
            column = np.full(self._d_sae, missing, np.int64 if is_whole else values.dtype)
            column[features] = np.ma.filled(values.astype(column.dtype), missing)
            self._columns[name] = column

    def of(self, feature: int) -> dict[str, Any] | None:
        """Statistics, test_density and scores of a feature; None where it has no statistics on train."""
        if not self._is_there[feature]:
            return None
        row = {name: column[feature].item() for name, column in self._columns.items()}
        return {name: None if value == _NONE or value != value else value for name, value in row.items()}


class Titles:
    """Titles of all documents of a store."""

    def __init__(self, connection: duckdb.DuckDBPyConnection):
        """Reads them."""
        query = "SELECT document_id, title FROM evidence.documents ORDER BY document_id"
        found = arrow_reader(connection.sql(query)).read_all()
        self._ids = plain_numbers(found["document_id"].combine_chunks(), np.int32).copy()
        self._texts: pa.Array = found["title"].combine_chunks()

    def of(self, document_ids: Sequence[int]) -> dict[int, str | None]:
        """Titles by document, of those that the store has."""
        if len(self._ids) == 0:
            return {}
        places = np.minimum(np.searchsorted(self._ids, document_ids), len(self._ids) - 1)
        return {
            document: self._texts[place].as_py()
            for document, place in zip(document_ids, places.tolist(), strict=True)
            if self._ids[place] == document
        }
