"""Many features of one dictionary with all that pages show of them, read in a few questions for all of them.

To ask `FeatureStore` about one feature after the other costs nine questions each; whoever draws all features asks here.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .cards import Cards
from .contexts import contexts
from .errors import FeatureNotFound
from .feature_store import Example, FeatureStore

Rows = list[dict[str, Any]]


class FeatureBatch:
    """What `FeatureStore` answers about `features` (ascending) of a dictionary, on its first corpus.

    Methods are those of the store and give the same; activations are those of train. Raises FeatureNotFound for a
    feature that is not in the dictionary.
    """

    def __init__(self, store: FeatureStore, features: Sequence[int], dictionary: str):
        self.store, self.features, self.dictionary = store, list(features), dictionary
        self._these = _condition(self.features)
        self._scope = store.memory.scope(dictionary)
        self._first = store.memory.segment(self._scope.dictionary_id)
        rows = self._ask("SELECT * FROM features WHERE {these} ORDER BY feature")
        self._features = {row["feature"]: row for row in rows}
        if missing := [f for f in features if f not in self._features]:
            raise FeatureNotFound(f"{store.path} has nothing of {dictionary}'s feature {missing[0]}: index again")
        self._receipts = _grouped(self._ask("SELECT * FROM receipts WHERE {these} ORDER BY feature, control"))
        self._effects = _grouped(
            self._ask("SELECT * FROM logit_effects WHERE {these} ORDER BY feature, direction::VARCHAR, rank")
        )
        self._neighbours = _grouped(self._ask("SELECT * FROM neighbours WHERE {these} ORDER BY feature, rank"))
        self._cofirings = _grouped(self._of_segment("rank, partner, count, num_sampled, pmi", "cofirings", "rank"))
        self._examples = self._read_examples()
        self._activations = self._read_activations()

    def cards(self, dictionary: str | None = None) -> Cards:
        """Those of all features of the dictionary."""
        return self.store.cards(self.dictionary)

    def feature(self, feature: int, dictionary: str | None = None) -> dict[str, Any]:
        """The feature's row of the view `features`."""
        return self._features[feature]

    def receipts(self, feature: int | None, *, dictionary: str | None = None) -> Rows:
        """Rows of `receipts` about a feature, or with None about the dictionary as a whole."""
        if feature is None:
            return self.store.receipts(None, dictionary=self.dictionary)
        return self._receipts[feature]

    def logit_effects(self, feature: int, *, dictionary: str | None = None, limit: int = 10) -> Rows:
        """Rows of `logit_effects`, `limit` of each direction."""
        return [row for row in self._effects[feature] if row["rank"] < limit]

    def neighbours(self, feature: int, *, dictionary: str | None = None, limit: int = 10) -> Rows:
        """Rows of `neighbours`, nearest first."""
        return self._neighbours[feature][:limit]

    def cofirings(self, feature: int, *, dictionary: str | None = None, limit: int = 20) -> Rows:
        """Features that are active on the same rows."""
        cards = self.cards()
        found = [row for row in self._cofirings[feature] if row["rank"] <= limit]
        return [
            {k: v for k, v in row.items() if k != "feature"} | {"partner_label": cards.label(row["partner"])}
            for row in found
        ]

    def examples(
        self,
        feature: int,
        *,
        dictionary: str | None = None,
        split: str = "train",
        kind: str | None = "top",
        limit: int = 10,
    ) -> list[Example]:
        """Examples on a split, strongest first; kind None takes both, deciles first."""
        return [e for e in self._examples[feature] if e.split == split and kind in (None, e.kind)][:limit]

    def activation_histogram(
        self, feature: int, *, dictionary: str | None = None, bins: int = 50
    ) -> tuple[np.ndarray, np.ndarray]:
        """(counts [bins], edges [bins + 1]) of its train activations, from 0 to the largest."""
        found = self._activations.get(feature, ())
        if len(found) == 0:
            return np.zeros(0, np.int64), np.zeros(0)
        return np.histogram(found, bins, (0.0, float(np.max(found))))

    def _ask(self, query: str) -> Rows:
        these = f"dictionary = $name AND {self._these}"
        return self.store.trusted_sql(query.format(these=these), {"name": self.dictionary}).to_pylist()

    def _of_segment(self, columns: str, table: str, order: str, condition: str = "true") -> Rows:
        """Rows of a table of `derived` on the first corpus."""
        if self._first is None:
            return []
        return self.store.memory.rows(
            f"SELECT feature, {columns} FROM derived.{table} WHERE segment_id = {self._first['segment_id']} "
            f"AND {self._these} AND {condition} "
            f"ORDER BY feature, {order}"
        )

    def _read_examples(self) -> dict[int, list[Example]]:
        found: dict[int, list[Example]] = defaultdict(list)
        rows = self._of_segment(
            "split::VARCHAR AS split, kind, decile, rank, window_id, position, activation, offsets, activations",
            "examples",
            "split, kind, decile DESC, rank",
        )
        if self._first is None or not rows:
            return found
        corpus = self._first["corpus"]
        for row in contexts(self.store.memory.text(self._first["corpus_id"]), self.store.memory.titles, rows):
            found[row["feature"]].append(Example(dictionary=self.dictionary, corpus=corpus, **row))
        return found

    def _read_activations(self) -> dict[int, np.ndarray]:
        """Train activations of every feature that has any."""
        if self._first is None:
            return {}
        columns = self._columns("feature, activation", self._first["segment_id"], "split = 'train'")
        order = np.argsort(columns["feature"], kind="stable")
        features, starts = np.unique(columns["feature"][order], return_index=True)
        parts = np.split(columns["activation"][order], starts[1:]) if len(features) else []
        return dict(zip(features.tolist(), parts, strict=True))

    def _columns(self, columns: str, segment_id: int, condition: str = "true") -> dict[str, np.ndarray]:
        query = (
            f"SELECT {columns} FROM evidence.activations_by_feature WHERE segment_id = {segment_id} "
            f"AND {self._these} AND {condition}"
        )
        return self.store.memory.columns(query)


def _condition(features: Sequence[int]) -> str:
    """These features alone; of neighbours by their ends."""
    if len(features) and features[-1] - features[0] + 1 == len(features):
        return f"feature BETWEEN {int(features[0])} AND {int(features[-1])}"
    return f"feature IN ({', '.join(str(int(f)) for f in features) or 'NULL'})"


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[int, Rows]:
    groups: dict[int, Rows] = defaultdict(list)
    for row in rows:
        groups[row["feature"]].append(row)
    return groups
