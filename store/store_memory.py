"""One reader's connection to a store: which dictionaries there are, and what is kept in memory once it was asked for.

To read twenty small things takes DuckDB two milliseconds and more, most of it spent on planning: whatever a page or a
search asks for again is read whole, once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from .cards import Cards
from .errors import FeatureNotFound, StoreError
from .feature_columns import FeatureColumns, Titles
from .feature_rows import stored_effects
from .query import Params, own_columns, own_cursor, run_own
from .search import Scope
from .text_rows import TextRows, read_text_rows, read_vocabulary
from .vectors import VectorTable, read_embeddings


class StoreMemory:
    """Raises StoreError where the connection is to no store. Nothing is read before it is asked for."""

    def __init__(self, path: Path, connection: duckdb.DuckDBPyConnection):
        self.path, self.connection = path, connection
        rows = self.rows(
            "SELECT dictionary, dictionary_id, d_sae, vocabulary_id FROM evidence.dictionaries "
            "JOIN evidence.models USING (model_id) ORDER BY dictionary_id"
        )
        segments = self.rows(
            "SELECT dictionary_id, segment_id, corpus_id, corpus, first_document, num_documents "
            "FROM evidence.segments JOIN evidence.corpora USING (corpus_id) ORDER BY segment_id"
        )
        self._known: dict[str, tuple[int, int]] = {r["dictionary"]: (r["dictionary_id"], r["d_sae"]) for r in rows}
        self._segments = {i: [g for g in segments if g["dictionary_id"] == i] for i, _ in self._known.values()}
        self._vocabulary_ids: dict[int, int] = {r["dictionary_id"]: r["vocabulary_id"] for r in rows}
        self._vocabularies: dict[int, np.ndarray] = {}
        self._embeddings: dict[str, tuple[VectorTable, np.ndarray]] = {}
        self._texts: dict[int, TextRows] = {}
        self._cards: dict[int, Cards] = {}
        self._feature_columns: dict[int, FeatureColumns] = {}
        self._titles: Titles | None = None
        self._last_effects: tuple[tuple[int, int], list[dict[str, Any]]] = ((-1, -1), [])
        self._totals: dict[int, np.ndarray] = {}  # by segment
        self._filled: dict[tuple[str, int], bool] = {}

    def rows(self, query: str, params: Params = None) -> list[dict[str, Any]]:
        """Rows of a query of saeql's own, as dicts."""
        return run_own(self.connection, self.path, query, params)

    def columns(self, query: str, params: Params = None) -> dict[str, np.ndarray]:
        """The same as numpy columns."""
        return own_columns(self.connection, self.path, query, params)

    # --- what there is -------------------------------------------------------------------------------------------

    def dictionary(self, dictionary: str | None) -> tuple[str, int, int]:
        """(name, dictionary_id, d_sae), of the first where none is named. Raises FeatureNotFound."""
        if not self._known:
            raise FeatureNotFound(f"{self.path} has no dictionary: index again")
        name = next(iter(self._known)) if dictionary is None else dictionary
        if name not in self._known:
            raise FeatureNotFound(f"{self.path} has no dictionary {name!r}: it has {', '.join(self._known)}")
        return name, *self._known[name]

    def known_feature(self, feature: int, dictionary: str | None) -> tuple[str, int, int]:
        """`dictionary`, where it has such a feature. Raises FeatureNotFound."""
        name, dictionary_id, d_sae = self.dictionary(dictionary)
        if not 0 <= feature < d_sae:
            raise FeatureNotFound(f"{name} has no feature {feature}: its features are 0 to {d_sae - 1}")
        return name, dictionary_id, d_sae

    def segment(self, dictionary_id: int, corpus: str | None = None) -> dict[str, Any] | None:
        """The dictionary's activations on a corpus, on its first one unless named; None where there are none."""
        return next((g for g in self._segments[dictionary_id] if corpus in (None, g["corpus"])), None)

    def segment_of_document(self, dictionary_id: int, document_id: int) -> dict[str, Any] | None:
        """The dictionary's activations on the corpus that a document is of."""
        for segment in self._segments[dictionary_id]:
            if 0 <= document_id - segment["first_document"] < (segment["num_documents"] or 0):
                return segment
        return None

    def scope(self, dictionary: str | None) -> Scope:
        """What a search is about. Raises FeatureNotFound."""
        name, dictionary_id, d_sae = self.dictionary(dictionary)
        segment_id = self.first_segment_id(dictionary_id)
        return Scope(
            name,
            dictionary_id,
            segment_id,
            len(self._segments[dictionary_id]),
            self._vocabulary_ids[dictionary_id],
            lambda: self._num_activations(segment_id, d_sae),
        )

    def has(self, table: str, dictionary_id: int) -> bool:
        """Whether a table of the evidence has anything of a dictionary."""
        key = (table, dictionary_id)
        if key not in self._filled:
            rows = self.rows(f"SELECT 1 AS found FROM evidence.{table} WHERE dictionary_id = {dictionary_id} LIMIT 1")
            self._filled[key] = bool(rows)
        return self._filled[key]

    # --- what is kept --------------------------------------------------------------------------------------------

    def cards(self, dictionary_id: int) -> Cards:
        """Label, kind, auroc, density and largest activation of all features."""
        if dictionary_id not in self._cards:
            with own_cursor(self.connection, self.path) as cursor:
                self._cards[dictionary_id] = Cards.read(cursor, dictionary_id, self.first_segment_id(dictionary_id))
        return self._cards[dictionary_id]

    def row(self, dictionary_id: int, d_sae: int, feature: int) -> dict[str, Any] | None:
        """What `feature_row` needs not ask, once `cards` are in memory: whoever reads one feature may read no other."""
        if dictionary_id not in self._cards:
            return None
        if dictionary_id not in self._feature_columns:
            with own_cursor(self.connection, self.path) as cursor:
                self._feature_columns[dictionary_id] = FeatureColumns.read(
                    cursor, dictionary_id, self.first_segment_id(dictionary_id), d_sae
                )
        found = self._feature_columns[dictionary_id].of(feature)
        return None if found is None else (self._cards[dictionary_id].of(feature) or {}) | found

    def effects(self, dictionary_id: int, feature: int) -> list[dict[str, Any]]:
        """`stored_effects`, the last ones kept: who shows a feature asks for its row and for them."""
        key, rows = self._last_effects
        if key != (dictionary_id, feature):
            rows = stored_effects(self.rows, dictionary_id, feature)
            self._last_effects = (dictionary_id, feature), rows
        return rows

    def vocabulary(self, dictionary_id: int) -> np.ndarray:
        """Text of every token id of a dictionary's tokenizer."""
        vocabulary_id = self._vocabulary_ids[dictionary_id]
        if vocabulary_id not in self._vocabularies:
            with own_cursor(self.connection, self.path) as cursor:
                self._vocabularies[vocabulary_id] = read_vocabulary(cursor, vocabulary_id)
        return self._vocabularies[vocabulary_id]

    def text(self, corpus_id: int) -> TextRows:
        """A corpus, 20 bytes a token: DuckDB would read lists of all windows to show twenty of them."""
        if corpus_id not in self._texts:
            with own_cursor(self.connection, self.path) as cursor:
                self._texts[corpus_id] = read_text_rows(cursor, corpus_id, self._vocabularies)
        return self._texts[corpus_id]

    def titles(self, document_ids: Sequence[int]) -> dict[int, str | None]:
        """Of documents; those of all are kept."""
        if self._titles is None:
            with own_cursor(self.connection, self.path) as cursor:
                self._titles = Titles(cursor)
        return self._titles.of(document_ids)

    def embeddings(self, dictionary: str | None) -> tuple[VectorTable, np.ndarray]:
        """Sentence embeddings, and what each is of: 'label' or 'evidence'. Raises StoreError where there are none."""
        name, dictionary_id, _ = self.dictionary(dictionary)
        if name not in self._embeddings:
            with own_cursor(self.connection, self.path) as cursor:
                found = read_embeddings(cursor, dictionary_id)
            if found is None:
                raise StoreError(f"{self.path} has no embeddings of {name}")
            self._embeddings[name] = found
        return self._embeddings[name]

    def first_segment_id(self, dictionary_id: int) -> int:
        """Of the dictionary's activations on its first corpus; -1 where there are none."""
        segment = self.segment(dictionary_id)
        return -1 if segment is None else segment["segment_id"]

    def _num_activations(self, segment_id: int, d_sae: int) -> np.ndarray:
        """[d_sae] int64: how often every feature fires, all splits."""
        if segment_id not in self._totals:
            found = self.columns(
                f"SELECT feature, num_activations FROM derived.feature_stats WHERE segment_id = {segment_id}"
            )
            total = np.bincount(found["feature"], weights=found["num_activations"], minlength=d_sae)
            self._totals[segment_id] = total.astype(np.int64)
        return self._totals[segment_id]
