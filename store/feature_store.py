"""The feature store: one DuckDB file that answers what a dictionary's features are, where they fire, what they do.

It is built once from the Parquet evidence (`build.py`) and read-only from then on; what a reader sees are the views of
`sql/003_views.sql`. A `dictionary` argument of None means the store's first dictionary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import pyarrow as pa

from .build import MEMORY_LIMIT, OnStep, build_store, sync_store, upgrade_store
from .cards import Cards
from .console import DEFAULT_SECONDS, Console
from .contexts import contexts
from .errors import FeatureNotFound, OldStoreError, StoreError
from .evidence import Evidence
from .feature_rows import (
    cofiring_rows,
    effect_rows,
    example_rows,
    feature_row,
    neighbour_rows,
    receipt_rows,
)
from .frames import as_frame
from .listing import Filters, Found, Listing, select
from .parquet_store import connect_parquet, is_parquet_store
from .query import Params, connect_read_only, run_statement
from .records import SPLITS
from .search import METHODS, Scored, SearchHit, by_words, describe, token_scores, word_places, word_scores
from .store_memory import StoreMemory


@dataclass(frozen=True)
class Example:
    """One place where a feature fires, with its visible context."""

    dictionary: str
    feature: int
    split: str
    kind: str  # 'top' | 'decile'
    decile: int | None  # 10 is the strongest tenth
    rank: int  # from 1
    window_id: int
    document_id: int
    title: str | None
    corpus: str
    position: int  # of the peak in the window, from 0
    activation: float
    tokens: list[str]
    activations: list[float]  # of this feature, one a token
    focus: int  # index of the peak in tokens, from 1


class FeatureRow(dict[str, Any]):
    """A row of the view `features`; a notebook shows it as `FeatureStore.draw` draws it."""

    def __init__(self, row: dict[str, Any], store: "FeatureStore"):
        super().__init__(row)
        self._store = store

    def _repr_html_(self) -> str | None:
        draw = self._store.draw
        return None if draw is None else draw(self._store, self["feature"], self["dictionary"])

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class FeatureStore:
    """Reads one store. Safe to share between threads; close it, or use it as a context manager.

    A store that has been rebuilt is a new file: a reader goes on with the old one until every reader of this program is
    closed, and opening the new one before that is refused (DuckDB would hand out the old one).
    """

    _readers: ClassVar["WeakSet[FeatureStore]"] = WeakSet()
    draw: "Callable[[FeatureStore, int, str], str] | None" = None
    """What makes HTML of a feature for notebooks; whoever has templates sets it."""

    def __init__(self, path: Path, memory_limit: str, threads: int | None):
        self.path = path
        self._file = _identity(path)
        for other in list(FeatureStore._readers):
            if other._file[0] == self._file[0] and other._file != self._file:
                raise StoreError(f"{path} was rebuilt while this program had it open: close the old reader first")
        self._console = Console(path, memory_limit=memory_limit, threads=threads)  # starts nothing yet
        connect = connect_parquet if is_parquet_store(path) else connect_read_only
        self._connection = connect(path, memory_limit=memory_limit, threads=threads)
        try:
            self.memory = StoreMemory(path, self._connection)
        except StoreError:
            self._connection.close()
            raise
        FeatureStore._readers.add(self)

    @classmethod
    def build(
        cls,
        path: str | Path,
        evidence: Evidence | Sequence[Evidence],
        *,
        threads: int | None = None,
        memory_limit: str = MEMORY_LIMIT,
        on_step: OnStep | None = None,
    ) -> Path:
        """Build the store file at `path` from `evidence` and return it; see `build.build_store`."""
        return build_store(path, evidence, threads=threads, memory_limit=memory_limit, on_step=on_step)

    @classmethod
    def sync(
        cls,
        path: str | Path,
        evidence: Evidence | Sequence[Evidence],
        *,
        threads: int | None = None,
        memory_limit: str = MEMORY_LIMIT,
        on_step: OnStep | None = None,
    ) -> list[str]:
        """Add to the store at `path` what it lacks of `evidence` and return what was done; see `build.sync_store`."""
        return sync_store(path, evidence, threads=threads, memory_limit=memory_limit, on_step=on_step)

    @classmethod
    def open(cls, path: str | Path, *, memory_limit: str = "2GB", threads: int | None = None) -> "FeatureStore":
        """Open a store read-only; one of an older saeql is brought to this one's schema first, on a copy.

        `path` may also be a folder of `write_parquet`: the same SQL.
        Raises StoreError for a file that is missing, damaged, no store, or newer.
        """
        try:
            return cls(Path(path), memory_limit, threads)
        except OldStoreError:
            if is_parquet_store(Path(path)):
                raise
            upgrade_store(path, threads=threads, memory_limit=memory_limit)
            return cls(Path(path), memory_limit, threads)

    def close(self) -> None:
        """Let go of the file."""
        FeatureStore._readers.discard(self)
        self._console.close()
        self._connection.close()

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def sql(
        self,
        query: str,
        params: Params = None,
        *,
        max_rows: int | None = None,
        timeout_seconds: float = DEFAULT_SECONDS,
    ) -> pa.Table:
        """Rows of one SQL statement over the views, whoever wrote it: it runs in a process of its own that can do
        nothing but read this store, and is killed at the time limit (see `console.Console`).

        A result cut at `max_rows` has `{b"truncated": b"true"}` in its schema metadata; one beyond 256 MiB is an error.
        Raises SQLError with a one-line message.
        """
        return self._console.sql(query, params, max_rows=max_rows, timeout_seconds=timeout_seconds)

    def frame(self, query: str, library: str = "pandas", params: Params = None, **limits: Any) -> Any:
        """What `sql` gives, as a DataFrame of "pandas" or "polars". Raises StoreError where that is not installed."""
        return as_frame(self.sql(query, params, **limits), library)

    def trusted_sql(
        self, query: str, params: Params = None, *, max_rows: int | None = None, timeout_seconds: float | None = None
    ) -> pa.Table:
        """Rows of one SQL statement of this program's own, in this process: faster, and of any size.

        Never for a statement that somebody else wrote a part of: the connection is read-only and locked, but a time
        limit cannot stop one huge scalar call, memory is this program's, and catalogue functions tell where files lie.
        """
        return run_statement(
            self._connection, self.path, query, params, max_rows=max_rows, timeout_seconds=timeout_seconds
        )

    def search(
        self,
        text: str,
        *,
        by: str = "words",
        limit: int = 10,
        where: str | None = None,
        dictionary: str | None = None,
    ) -> list[SearchHit]:
        """Features that belong to `text`, best first, with what matched.

        `by` is "words" (in labels, in the tokens they fire on and promote; BM25), "token" (those that fire on this
        token) or "effect" (those that promote it). `where` is a SQL condition over the columns of the view `features`,
        whoever wrote it: it runs where `sql` does. Raises SQLError where it is no single condition, and StoreError for
        a text that cannot be searched for.
        """
        scope = self.memory.scope(dictionary)
        if by == "words":
            found = by_words(self.memory.rows, self.memory.columns, scope, text, limit if where is None else None)
        elif by in METHODS:
            found = METHODS[by](self.memory.rows, self.memory.columns, scope, text, limit if where is None else None)
        else:
            raise StoreError(f"no search by {by!r}: there is words, {', '.join(METHODS)}")
        return self.hits(found, limit=limit, where=where, dictionary=dictionary)

    def hits(
        self, found: Sequence[Scored], *, limit: int = 10, where: str | None = None, dictionary: str | None = None
    ) -> list[SearchHit]:
        """The first `limit` of scored features that meet `where`, with their labels. Raises SQLError, StoreError."""
        _check_number("features", limit, 1)
        scope = self.memory.scope(dictionary)
        if where is not None:
            allowed = set(self._meeting(where, scope.dictionary).tolist())
            found = [f for f in found if f.feature in allowed]
        return describe(self.memory.cards(scope.dictionary_id), scope, found[:limit])

    def matching(self, where: str, *, limit: int = 10, dictionary: str | None = None) -> list[int]:
        """Features that meet a condition over the view `features`, best labels first. Raises SQLError."""
        name, _, _ = self.memory.dictionary(dictionary)
        return self._meeting(where, name, f" ORDER BY auroc DESC NULLS LAST, feature LIMIT {int(limit)}").tolist()

    def _meeting(self, where: str, dictionary: str, order: str = "") -> np.ndarray:
        """Features that meet a condition that somebody else wrote. Raises SQLError where it is no single one."""
        query = f"SELECT feature FROM features WHERE dictionary = $dictionary AND ({where}\n){order}"
        return self._console.sql(query, {"dictionary": dictionary}, conditions=[where])["feature"].to_numpy()

    def listing(
        self,
        filters: Filters | None = None,
        *,
        found: Found | None = None,
        where: str | None = None,
        sort: str | None = None,
        descending: bool = True,
        offset: int = 0,
        limit: int = 50,
        dictionary: str | None = None,
    ) -> Listing:
        """One page of all features that meet `filters`, of those in `found` where a search found some.

        Without `sort` (see `listing.SORTS`) a search is in its own order, else features are by number. `where` is that
        of `search`. Raises SQLError where it is no condition, StoreError for what cannot be sorted by, and for the best
        of a search where more of it is asked.
        """
        narrowed = sort is not None or where is not None or (filters or Filters()).asks
        if found is not None and not found.is_whole and (narrowed or offset + limit > len(found.features)):
            raise StoreError("these are only the best of a search: ask `found` for all")
        scope = self.memory.scope(dictionary)
        cards = self.memory.cards(scope.dictionary_id)
        among = None if where is None else self._meeting(where, scope.dictionary)
        features = select(cards, filters or Filters(), found=found, among=among, sort=sort, descending=descending)
        shown = [int(f) for f in features[offset : offset + limit]]
        scores = {} if found is None else found.scores_of(shown)
        why = {} if found is None else found.why(shown)
        scored = [Scored(f, scores.get(f, 0.0), why.get(f, {})) for f in shown]
        total = len(features) if found is None or found.is_whole or found.total is None else found.total
        return Listing(total, offset, describe(cards, scope, scored))

    def found(self, text: str, *, by: str = "words", dictionary: str | None = None, limit: int | None = None) -> Found:
        """What `search` finds, for lists of it: all, or with `limit` at least so many of the best.

        Raises what `search` raises.
        """
        scope = self.memory.scope(dictionary)
        if by == "words":
            words = word_scores(self.memory.rows, self.memory.columns, scope, text)
            return Found(
                words.features,
                words.scores,
                lambda features: word_places(self.memory.rows, scope, words.terms, features),
            )
        if by == "token":
            fires = token_scores(self.memory.rows, self.memory.columns, scope, text, limit)
            return Found(fires.columns["feature"], fires.columns["f1"], fires.why, fires.total)
        if by not in METHODS:
            raise StoreError(f"no search by {by!r}: there is words, {', '.join(METHODS)}")
        return Found.of(METHODS[by](self.memory.rows, self.memory.columns, scope, text, None))

    def embedding_model(self, dictionary: str | None = None) -> str | None:
        """What made the sentence embeddings of a dictionary's labels and evidence; None where it has none."""
        _, dictionary_id, _ = self.memory.dictionary(dictionary)
        query = f"SELECT any_value(model) AS model FROM evidence.embeddings WHERE dictionary_id = {dictionary_id}"
        return self.memory.rows(query)[0]["model"]

    def embedding_width(self, dictionary: str | None = None) -> int:
        """Length of the embeddings. Raises StoreError where there are none."""
        return self.memory.embeddings(dictionary)[0].vectors.shape[1]

    def search_vector(
        self, vector: np.ndarray, *, limit: int = 10, where: str | None = None, dictionary: str | None = None
    ) -> list[SearchHit]:
        """Features of which a label or the evidence has a sentence embedding nearest to an embedded text, by cosine.

        Raises StoreError where the store has no embeddings.
        """
        found = self.nearest_in_meaning(vector, limit if where is None else None, dictionary=dictionary)
        return self.hits(found, limit=limit, where=where, dictionary=dictionary)

    def nearest_in_meaning(
        self, vector: np.ndarray, limit: int | None, *, dictionary: str | None = None
    ) -> list[Scored]:
        """What `search_vector` finds, before labels are read; all features that have an embedding without a limit.

        Raises StoreError where the store has no embeddings.
        """
        table, sources = self.memory.embeddings(dictionary)
        # a feature has two embeddings at most, and stands where the nearer one does
        found = table.nearest_rows(vector, len(table.features) if limit is None else 2 * limit)
        best: dict[int, Scored] = {}
        for row, cosine in found:
            feature = int(table.features[row])
            best.setdefault(feature, Scored(feature, cosine, {str(sources[row]): [f"cosine {cosine:.3f}"]}))
        return list(best.values())

    def feature(self, feature: int, dictionary: str | None = None) -> FeatureRow:
        """The feature's row of the view `features`; in a notebook its card. Raises FeatureNotFound."""
        name, dictionary_id, d_sae = self.memory.known_feature(feature, dictionary)
        row = feature_row(
            self.memory.rows,
            name,
            dictionary_id,
            self.memory.first_segment_id(dictionary_id),
            int(feature),
            vocabulary=self.memory.vocabulary(dictionary_id),
            effects=self.memory.effects(dictionary_id, int(feature)),
            known=self.memory.row(dictionary_id, d_sae, int(feature)),
            is_compared=self.memory.has("stability", dictionary_id),
        )
        if row is None:
            raise FeatureNotFound(f"{self.path} has nothing of {name}'s feature {feature}: index again")
        return FeatureRow(row, self)

    def cards(self, dictionary: str | None = None) -> Cards:
        """Label, kind, auroc, density and largest activation of all features, in memory."""
        return self.memory.cards(self.memory.dictionary(dictionary)[1])

    def activation_histogram(
        self, feature: int, *, dictionary: str | None = None, split: str = "train", bins: int = 50
    ) -> tuple[np.ndarray, np.ndarray]:
        """(counts [bins], edges [bins + 1]) of a feature's activations on its dictionary's first corpus, from 0 to the
        largest; both empty where it never fires. Raises FeatureNotFound, StoreError for a split that there is not.
        """
        _check_split(split)
        _, dictionary_id, _ = self.memory.known_feature(feature, dictionary)
        segment = self.memory.segment(dictionary_id)
        if segment is None:
            return np.zeros(0, np.int64), np.zeros(0)
        found = self.memory.columns(
            "SELECT activation FROM evidence.activations_by_feature "
            f"WHERE segment_id = {segment['segment_id']} AND feature = {int(feature)} AND split = '{split}'",
        )["activation"]
        if len(found) == 0:
            return np.zeros(0, np.int64), np.zeros(0)
        return np.histogram(found, bins, (0.0, float(found.max())))

    def examples(
        self,
        feature: int,
        *,
        dictionary: str | None = None,
        split: str = "train",
        kind: str | None = "top",
        limit: int = 10,
        corpus: str | None = None,
    ) -> list[Example]:
        """Examples of a feature, strongest first; kind 'decile' exists on train only, None takes both, deciles first.

        Raises FeatureNotFound, StoreError for no such split. `corpus` is the dictionary's first unless named.
        """
        _check_split(split)
        _check_number("examples", limit, 0)
        name, dictionary_id, _ = self.memory.known_feature(feature, dictionary)
        segment = self.memory.segment(dictionary_id, corpus)
        if segment is None:
            return []
        rows = example_rows(self.memory.rows, segment["segment_id"], int(feature), split, kind)
        found = contexts(self.memory.text(segment["corpus_id"]), self.memory.titles, rows[:limit])
        return [
            Example(dictionary=name, feature=int(feature), split=split, corpus=segment["corpus"], **row)
            for row in found
        ]

    def neighbours(self, feature: int, *, dictionary: str | None = None, limit: int = 10) -> list[dict[str, Any]]:
        """Rows of the view `neighbours`, nearest first. Raises FeatureNotFound."""
        name, dictionary_id, _ = self.memory.known_feature(feature, dictionary)
        return neighbour_rows(
            self.memory.rows, name, dictionary_id, int(feature), limit, self.memory.cards(dictionary_id).label
        )

    def cofirings(self, feature: int, *, dictionary: str | None = None, limit: int = 20) -> list[dict[str, Any]]:
        """Features that are active on the same rows, on the dictionary's first corpus, the view `cofirings`.

        Raises FeatureNotFound.
        """
        _, dictionary_id, _ = self.memory.known_feature(feature, dictionary)
        segment = self.memory.segment(dictionary_id)
        if segment is None:
            return []
        label = self.memory.cards(dictionary_id).label
        return cofiring_rows(self.memory.rows, segment["segment_id"], int(feature), limit, label)

    def document_features(
        self, document_id: int, *, dictionary: str | None = None, limit: int = 50
    ) -> list[dict[str, Any]]:
        """Features that fire in a document: how often, how strongly, and that as a share of their largest on train.

        Those nearest to their largest activation come first. Raises FeatureNotFound for a document that is not there.
        """
        _, dictionary_id, _ = self.memory.dictionary(dictionary)
        segment = self.memory.segment_of_document(dictionary_id, document_id)
        text = None if segment is None else self.memory.text(segment["corpus_id"])
        inside = np.zeros(0, np.int32) if text is None else text.windows_of(document_id)
        if segment is None or text is None or len(inside) == 0:
            if not self.memory.rows(
                f"SELECT 1 AS found FROM evidence.documents WHERE document_id = {int(document_id)}"
            ):
                raise FeatureNotFound(f"{self.path} has no document {document_id}: the view documents lists them")
            return []  # of another text, or all of it fell to an incomplete last window
        first, last = int(inside[0]), int(inside[-1])
        which = f"BETWEEN {first} AND {last}"  # quicker than a list, where it reads little else
        if last - first > 2 * len(inside):
            which = f"IN ({', '.join(map(str, inside.tolist()))})"
        found = self.memory.columns(
            "SELECT feature, window_id, position, activation FROM evidence.activations_by_document "
            f"WHERE segment_id = {segment['segment_id']} AND window_id {which}",
        )
        mine = text.document_ids[text.rows(found["window_id"], found["position"])] == document_id
        return _strongest(self.memory.cards(dictionary_id), found["feature"][mine], found["activation"][mine], limit)

    def logit_effects(
        self, feature: int, *, dictionary: str | None = None, direction: str | None = None, limit: int = 10
    ) -> list[dict[str, Any]]:
        """Rows of the view `logit_effects`, `limit` of each direction, promoted first. Raises FeatureNotFound."""
        name, dictionary_id, _ = self.memory.known_feature(feature, dictionary)
        effects = self.memory.effects(dictionary_id, int(feature))
        return effect_rows(name, effects, self.memory.vocabulary(dictionary_id), direction, limit)

    def receipts(self, feature: int | None, *, dictionary: str | None = None) -> list[dict[str, Any]]:
        """Rows of the view `receipts` about a feature, or with None about the dictionary as a whole."""
        name, dictionary_id, _ = self.memory.dictionary(dictionary)
        if not self.memory.has("receipts", dictionary_id):
            return []
        return receipt_rows(self.memory.rows, name, dictionary_id, None if feature is None else int(feature))

    def dictionaries(self) -> list[dict[str, Any]]:
        """Rows of the view `dictionaries`, in the store's order."""
        return self.memory.rows("SELECT * FROM dictionaries")

    def metrics(self, dictionary: str | None = None) -> list[dict[str, Any]]:
        """Rows of the view `metrics`, of every dictionary where none is named."""
        name = None if dictionary is None else self.memory.dictionary(dictionary)[0]
        query = (
            "SELECT * FROM metrics WHERE dictionary = coalesce($name, dictionary) ORDER BY dictionary, split, metric"
        )
        return self.memory.rows(query, {"name": name})


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise StoreError(f"no split {split!r}: there are {', '.join(SPLITS)}")


def _check_number(of: str, asked: int, least: int) -> None:
    if asked < least:
        raise StoreError(f"ask for at least {least} {of}, not {asked}")


def _identity(path: Path) -> tuple[Path, int, int] | tuple[Path]:
    """The file's name and what it names now."""
    where = path.resolve()
    if not where.exists():
        return (where,)
    found = where.stat()
    return where, found.st_dev, found.st_ino


def _strongest(cards: Cards, features: np.ndarray, activations: np.ndarray, limit: int) -> list[dict[str, Any]]:
    """Features by their largest of `activations` as a share of their largest on train."""
    count = np.bincount(features)
    known = np.flatnonzero(count)
    largest = np.zeros(len(count), np.float32)
    np.maximum.at(largest, features, activations)
    count, largest = count[known], largest[known]
    rows = cards.rows(known)
    scale = np.where(rows >= 0, cards.max_activation[rows] if len(cards.max_activation) else 0, 0)
    share = np.divide(largest, scale, out=np.full(len(known), -1.0), where=scale > 0)
    best = np.arange(len(known))
    if len(known) > limit > 0:
        best = np.flatnonzero(share >= np.partition(share, len(known) - limit)[len(known) - limit])
    found = []
    for i in best[np.lexsort((known[best], -share[best]))][:limit]:
        card = cards.of(int(known[i])) or {"label": "unexplained", "kind": "none"}
        found.append(
            {
                "feature": int(known[i]),
                "count": int(count[i]),
                "max_activation": float(largest[i]),
                "share_of_largest": float(share[i]) if share[i] >= 0 else None,
                "label": card["label"],
                "kind": card["kind"],
            }
        )
    return found
