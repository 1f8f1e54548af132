"""Which evidence a store was built from, so that only what is new is added.

A file is known by its size and the hash of its Parquet footer, which holds the size and range of every column of every
row group; small files by the hash of all of it. Which corpus a folder is, is known by its text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from .evidence import Evidence
from .load import SMALL_TABLES, TEXT_TABLES
from .names import dictionary_names
from .records import OPTIONAL_TABLES

ALL = (*TEXT_TABLES, "dictionaries", "activations", *SMALL_TABLES, "runs")
_WHOLE_BYTES = 2**24

Fingerprints = set[tuple[str, int, str]]  # file name, bytes, hash


@dataclass
class Missing:
    """What a store does not have of a folder."""

    text: bool = False
    dictionaries: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # small tables that changed


def fingerprint(file: Path) -> str:
    """Hash that tells one evidence file from another."""
    size = file.stat().st_size
    with file.open("rb") as data:
        if size > _WHOLE_BYTES:
            data.seek(size - 8)
            data.seek(size - 8 - int.from_bytes(data.read(4), "little"))
        return hashlib.file_digest(data, "sha256").hexdigest()


def fingerprints(evidence: Evidence, table: str) -> Fingerprints:
    """Of all files of a table."""
    if not evidence.has(table):
        return set()
    return {
        (file.relative_to(evidence.folder).as_posix(), file.stat().st_size, fingerprint(file))
        for file in evidence.files(table)
    }


def text_key(evidence: Evidence) -> frozenset[tuple[str, int, str]]:
    """Equal for folders with the same text."""
    return frozenset().union(*(fingerprints(evidence, table) for table in TEXT_TABLES))


def _noted(connection: duckdb.DuckDBPyConnection, corpus_id: int, *tables: str) -> Fingerprints:
    rows = connection.execute(
        "SELECT file, bytes, fingerprint FROM evidence.sources "
        "WHERE corpus_id = ? AND list_contains(?, evidence_table)",
        [corpus_id, list(tables)],
    ).fetchall()
    return set(rows)


def note(connection: duckdb.DuckDBPyConnection, evidence: Evidence, corpus_id: int, tables: Sequence[str]) -> None:
    """Remember the folder's files of `tables`."""
    for table in tables:
        for source in fingerprints(evidence, table) - _noted(connection, corpus_id, table):
            connection.execute("INSERT INTO evidence.sources VALUES (?, ?, ?, ?, ?)", [corpus_id, table, *source])


def forget(connection: duckdb.DuckDBPyConnection, folders: Sequence[Evidence]) -> None:
    """Drop what was remembered of files that `folders`, all that the store is made of, do not have any more."""
    now: dict[int | None, Fingerprints] = {}
    for folder in folders:
        now.setdefault(corpus_of(connection, folder), set()).update(*(fingerprints(folder, t) for t in ALL))
    for corpus_id, kept in now.items():
        assert corpus_id is not None
        for file, size, found in _noted(connection, corpus_id, *ALL) - kept:
            connection.execute(
                "DELETE FROM evidence.sources WHERE corpus_id = ? AND file = ? AND bytes = ? AND fingerprint = ?",
                [corpus_id, file, size, found],
            )


def corpus_of(connection: duckdb.DuckDBPyConnection, evidence: Evidence) -> int | None:
    """The corpus that has the folder's text, None where none has."""
    text = text_key(evidence)
    ids = [row[0] for row in connection.execute("SELECT corpus_id FROM evidence.corpora ORDER BY corpus_id").fetchall()]
    return next((i for i in ids if _noted(connection, i, *TEXT_TABLES) == text), None)


def _stored(connection: duckdb.DuckDBPyConnection, corpus_id: int) -> set[str]:
    """Dictionaries that were indexed on a corpus."""
    rows = connection.execute(
        "SELECT dictionary FROM evidence.segments JOIN evidence.dictionaries USING (dictionary_id) WHERE corpus_id = ?",
        [corpus_id],
    ).fetchall()
    return {row[0] for row in rows}


def missing(connection: duckdb.DuckDBPyConnection, evidence: Evidence) -> Missing:
    """What has to be added to the store."""
    names = dictionary_names(connection, evidence)
    corpus_id = corpus_of(connection, evidence)
    if corpus_id is None:
        return Missing(True, names)
    known = _stored(connection, corpus_id)
    changed = [
        table
        for table in (*SMALL_TABLES, "runs")
        if fingerprints(evidence, table) - _noted(connection, corpus_id, table)
    ]
    return Missing(False, [name for name in names if name not in known], changed)


def contradiction(connection: duckdb.DuckDBPyConnection, folders: Sequence[Evidence]) -> str | None:
    """Why the store cannot be added to: it holds what `folders` do not have any more. None where it can."""
    by_corpus: dict[int, list[Evidence]] = {}
    for folder in folders:
        corpus_id = corpus_of(connection, folder)
        if corpus_id is not None:
            by_corpus.setdefault(corpus_id, []).append(folder)
    for (corpus_id,) in connection.execute("SELECT corpus_id FROM evidence.corpora ORDER BY corpus_id").fetchall():
        if corpus_id not in by_corpus:
            return "a text changed"
        noted, now = _noted(connection, corpus_id, "activations"), set[tuple[str, int, str]]()
        names: set[str] = set()
        for folder in by_corpus[corpus_id]:
            now |= fingerprints(folder, "activations")
            names |= set(dictionary_names(connection, folder))
        stored = _stored(connection, corpus_id)
        if stored - names:
            return "a dictionary is gone"
        if noted - now or (noted != now and stored == names):
            return "activations changed"
        for table in OPTIONAL_TABLES:
            has = any(folder.has(table) for folder in by_corpus[corpus_id])
            if not has and _noted(connection, corpus_id, table):
                return f"the table {table} is gone"
    return None
