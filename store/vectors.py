"""Vectors of features as one resident matrix: the nearest to a given one are a product and a partial sort away.

DuckDB answers the same question eight times slower, and would have to keep the vectors as lists of floats.
"""

from dataclasses import dataclass

import duckdb
import numpy as np

from .errors import StoreError
from .query import arrow_reader
from .text_rows import columns


@dataclass(frozen=True)
class VectorTable:
    """[N, d] float32 vectors of norm 1, and the feature of each."""

    features: np.ndarray  # [N] int32
    vectors: np.ndarray  # [N, d]

    def nearest(self, vector: np.ndarray, limit: int) -> list[tuple[int, float]]:
        """(feature, cosine) of the vectors nearest to `vector` [d], nearest first.

        Raises StoreError where it has another length or none.
        """
        return [(int(self.features[row]), cosine) for row, cosine in self.nearest_rows(vector, limit)]

    def nearest_rows(self, vector: np.ndarray, limit: int) -> list[tuple[int, float]]:
        """(row, cosine) instead."""
        vector = np.asarray(vector, np.float32).ravel()
        norm = float(np.linalg.norm(vector))
        if len(vector) != self.vectors.shape[1] or not norm > 0:
            raise StoreError(f"a direction needs {self.vectors.shape[1]} numbers, not all zero; it has {len(vector)}")
        cosines = self.vectors @ (vector / norm)
        limit = min(limit, len(cosines))
        found = np.argpartition(-cosines, limit - 1)[:limit] if limit else np.zeros(0, np.int64)
        found = found[np.lexsort((self.features[found], -cosines[found]))]
        return [(int(row), float(cosines[row])) for row in found]


def unit_rows(features: np.ndarray, rows: np.ndarray) -> VectorTable:
    """A table of rows [N, d] of any length; rows of zeros stay."""
    rows = np.ascontiguousarray(rows, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return VectorTable(np.asarray(features, np.int32), rows / np.where(norms > 0, norms, 1))


def read_embeddings(connection: duckdb.DuckDBPyConnection, dictionary_id: int) -> tuple[VectorTable, np.ndarray] | None:
    """(sentence embeddings of a dictionary's features, each of a 'label' or of 'evidence'), by feature, labels first.

    None where there are none. Batch by batch, each into its place: to sort them would take their memory three times.
    """
    of = f"FROM evidence.embeddings WHERE dictionary_id = {dictionary_id}"
    about = columns(connection, f"SELECT feature, source {of}")
    if len(about["feature"]) == 0:
        return None
    order = np.lexsort((about["source"] != "label", about["feature"]))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    vectors, done = np.zeros((0, 0), np.float32), 0
    for batch in arrow_reader(connection.sql(f"SELECT vector {of}")):
        _, ends, data = batch.column(0).buffers()
        start, last = np.frombuffer(ends, np.int32)[[batch.column(0).offset, batch.column(0).offset + batch.num_rows]]
        rows = np.frombuffer(data, "<f2", (last - start) // 2, start).reshape(batch.num_rows, -1)
        if done == 0:
            vectors = np.zeros((len(order), rows.shape[1]), np.float32)
        vectors[place[done : done + len(rows)]] = unit_rows(about["feature"][:0], rows).vectors
        done += len(rows)
    return VectorTable(about["feature"][order].astype(np.int32), vectors), about["source"][order]
