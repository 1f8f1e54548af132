"""The feature store: one DuckDB file that answers what a dictionary's features are, where they fire, what they do.

It is built once from the Parquet evidence (`build.py`) and read-only from then on; what a reader sees are the views of
`sql/003_views.sql`. A `dictionary` argument of None means the store's first dictionary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import pyarrow as pa

from .build import OnStep, build_store
from .console import DEFAULT_SECONDS, Console
from .errors import FeatureNotFound, StoreError
from .evidence import Evidence
from .frames import as_frame
from .migrations import sql_text
from .query import Params, connect_read_only, run_statement
from .words import WORDS_OF, stem


@dataclass(frozen=True)
class SearchHit:
    """A feature that a search found; `score` is BM25, larger is better, comparable within one search only."""

    dictionary: str
    feature: int
    score: float
    label: str
    kind: str
    auroc: float | None
    density: float
    matched: dict[str, list[str]]  # field ('label', 'activates', 'promotes') -> words found in it


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
    position: int  # of the peak in the window, from 0
    activation: float
    tokens: list[str]
    activations: list[float]  # of this feature, one a token
    focus: int  # index of the peak in tokens, from 1


class FeatureStore:
    """Reads one store. Safe to share between threads; close it, or use it as a context manager.

    A store that has been rebuilt is a new file: a reader goes on with the old one until every reader of this program is
    closed, and opening the new one before that is refused (DuckDB would hand out the old one).
    """

    _readers: ClassVar["WeakSet[FeatureStore]"] = WeakSet()

    def __init__(self, path: Path, memory_limit: str, threads: int | None):
        self.path = path
        self._file = _identity(path)
        for other in list(FeatureStore._readers):
            if other._file[0] == self._file[0] and other._file != self._file:
                raise StoreError(f"{path} was rebuilt while this program had it open: close the old reader first")
        self._console = Console(path, memory_limit=memory_limit, threads=threads)  # starts nothing yet
        self._connection = connect_read_only(path, memory_limit=memory_limit, threads=threads)
        try:
            rows = self._rows(
                "SELECT dictionary, dictionary_id, d_sae FROM evidence.dictionaries ORDER BY dictionary_id"
            )
        except StoreError:
            self._connection.close()
            raise
        self._known: dict[str, tuple[int, int]] = {r["dictionary"]: (r["dictionary_id"], r["d_sae"]) for r in rows}
        FeatureStore._readers.add(self)

    @classmethod
    def build(
        cls,
        path: str | Path,
        evidence: Evidence,
        *,
        threads: int | None = None,
        memory_limit: str = "4GB",
        on_step: OnStep | None = None,
    ) -> Path:
        """Build the store file at `path` from `evidence` and return it; see `build.build_store`."""
        return build_store(path, evidence, threads=threads, memory_limit=memory_limit, on_step=on_step)

    @classmethod
    def open(cls, path: str | Path, *, memory_limit: str = "2GB", threads: int | None = None) -> "FeatureStore":
        """Open a store read-only. Raises StoreError for a file that is missing, damaged, no store, or newer."""
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
        self, text: str, *, limit: int = 10, where: str | None = None, dictionary: str | None = None
    ) -> list[SearchHit]:
        """Features whose label or tokens have the words of `text`, best first.

        `where` is a SQL condition over the columns of the view `features`, whoever wrote it: a search with one runs
        where `sql` does. Raises SQLError where it is no single condition and StoreError for a text without words.
        """
        name, (dictionary_id, _) = self._dictionary(dictionary)
        words = self._rows(f"SELECT {WORDS_OF} AS words FROM (SELECT $text AS text)", {"text": text})[0]["words"]
        if not words:
            raise StoreError(f"nothing to search for in {text!r}: give at least one word")
        query = sql_text("search").replace("{where}", f"{where or 'true'}\n")
        params = {"dictionary_id": dictionary_id, "dictionary": name, "terms": sorted(set(stem(words))), "limit": limit}
        if where is None:
            found = self.trusted_sql(query, params)
        else:
            found = self._console.sql(query, params, conditions=[where])
        return [_search_hit(row) for row in found.to_pylist()]

    def feature(self, feature: int, dictionary: str | None = None) -> dict[str, Any]:
        """The feature's row of the view `features`. Raises FeatureNotFound."""
        return self._of_feature("SELECT * FROM features WHERE {this}", feature, dictionary)[0]

    def examples(
        self,
        feature: int,
        *,
        dictionary: str | None = None,
        split: str = "train",
        kind: str = "top",
        limit: int = 10,
    ) -> list[Example]:
        """Examples of a feature, strongest first; kind 'decile' exists on train only. Raises FeatureNotFound."""
        query = (
            "SELECT * FROM examples WHERE {this} AND split = $split AND kind = $kind "
            "ORDER BY decile DESC, rank LIMIT $limit"
        )
        rows = self._of_feature(query, feature, dictionary, split=split, kind=kind, limit=limit)
        return [Example(**row) for row in rows]

    def neighbours(self, feature: int, *, dictionary: str | None = None, limit: int = 10) -> list[dict[str, Any]]:
        """Rows of the view `neighbours`, nearest first. Raises FeatureNotFound."""
        query = "SELECT * FROM neighbours WHERE {this} ORDER BY rank LIMIT $limit"
        return self._of_feature(query, feature, dictionary, limit=limit)

    def logit_effects(
        self, feature: int, *, dictionary: str | None = None, direction: str | None = None, limit: int = 10
    ) -> list[dict[str, Any]]:
        """Rows of the view `logit_effects`, `limit` of each direction, promoted first. Raises FeatureNotFound."""
        query = (
            "SELECT * FROM logit_effects WHERE {this} AND rank < $limit "
            "AND direction = coalesce($direction, direction) ORDER BY direction, rank"
        )
        return self._of_feature(query, feature, dictionary, direction=direction, limit=limit)

    def dictionaries(self) -> list[dict[str, Any]]:
        """Rows of the view `dictionaries`, in the store's order."""
        return self._rows("SELECT * FROM dictionaries")

    def metrics(self, dictionary: str | None = None) -> list[dict[str, Any]]:
        """Rows of the view `metrics`, of every dictionary where none is named."""
        name = None if dictionary is None else self._dictionary(dictionary)[0]
        query = (
            "SELECT * FROM metrics WHERE dictionary = coalesce($name, dictionary) ORDER BY dictionary, split, metric"
        )
        return self._rows(query, {"name": name})

    def _rows(self, query: str, params: Params = None) -> list[dict[str, Any]]:
        return run_statement(self._connection, self.path, query, params).to_pylist()

    def _of_feature(self, query: str, feature: int, dictionary: str | None, **params: object) -> list[dict[str, Any]]:
        """Rows of `query`, in which `{this}` is the condition that names the feature."""
        name, (_, d_sae) = self._dictionary(dictionary)
        if not 0 <= feature < d_sae:
            raise FeatureNotFound(f"{name} has no feature {feature}: its features are 0 to {d_sae - 1}")
        this = "dictionary = $dictionary AND feature = $feature"
        return self._rows(query.format(this=this), {"dictionary": name, "feature": int(feature), **params})

    def _dictionary(self, dictionary: str | None) -> tuple[str, tuple[int, int]]:
        if not self._known:
            raise FeatureNotFound(f"{self.path} has no dictionary: index again")
        name = next(iter(self._known)) if dictionary is None else dictionary
        if name not in self._known:
            raise FeatureNotFound(f"{self.path} has no dictionary {name!r}: it has {', '.join(self._known)}")
        return name, self._known[name]


def _identity(path: Path) -> tuple[Path, int, int] | tuple[Path]:
    """The file's name and what it names now."""
    where = path.resolve()
    if not where.exists():
        return (where,)
    found = where.stat()
    return where, found.st_dev, found.st_ino


def _search_hit(row: dict[str, Any]) -> SearchHit:
    matched: dict[str, list[str]] = {}
    for place in row.pop("places"):
        words = matched.setdefault(place["field"], [])
        if place["word"] not in words:
            words.append(place["word"])
    return SearchHit(matched=matched, **row)
