"""Read-only DuckDB: a locked-down connection, and one statement on it with a deadline and a row cap."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from . import migrations
from .errors import OldStoreError, SQLError, StoreError, one_line

Params = Sequence[Any] | dict[str, Any] | None

#: What a reader may say; MULTI is how DuckDB sees PIVOT. This makes the message clear; read-only mode is the guard.
_READING = {"SELECT", "EXPLAIN", "MULTI"}
_BATCH_ROWS = 65_536


def connect_read_only(path: Path, *, memory_limit: str, threads: int | None) -> duckdb.DuckDBPyConnection:
    """Open the store at `path` so that SQL can neither write, nor reach files, network or this program's variables.

    Raises StoreError for a file that is missing, damaged, no store or newer, OldStoreError for an older one.
    """
    if not path.is_file():
        raise StoreError(f"{path} does not exist: build it with `saeql index --rebuild`")
    config: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
        "python_enable_replacements": "false",
        "memory_limit": memory_limit,
        "temp_directory": "",  # DuckDB would let COPY write into it
        "max_temp_directory_size": "0MB",
    }
    if threads is not None:
        config["threads"] = str(threads)
    try:
        connection = duckdb.connect(str(path), read_only=True, config=config)
    except duckdb.Error as error:
        raise StoreError(f"cannot open {path}: {_open_failure(one_line(error))}") from error
    try:
        # a second connection of this program to the same file shares the first one's settings, locked already
        if connection.execute("SELECT current_setting('lock_configuration')").fetchone() != (True,):
            connection.execute("SET enable_progress_bar = false")
            connection.execute("SET lock_configuration = true")
        _check_schema(connection, path)
    except duckdb.Error as error:
        connection.close()
        raise StoreError(f"cannot open {path}: {_open_failure(one_line(error))}") from error
    except StoreError:
        connection.close()
        raise
    return connection


def _open_failure(message: str) -> str:
    if "different configuration" in message:
        return "this program has it open with other memory_limit or threads, close that one first"
    if "not a valid DuckDB" in message:
        return "it is not a feature store, build one with `saeql index --rebuild`"
    return f"{message} (rebuild it from its evidence with `saeql index --rebuild`)"


def _check_schema(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    have, known = migrations.applied_version(connection), migrations.schema_version()
    if have == 0:
        raise StoreError(f"{path} is a DuckDB file but not a feature store: build one with `saeql index --rebuild`")
    migrations.check_not_newer(have, known, str(path))
    if have < known:
        raise OldStoreError(
            f"{path} has schema version {have}, this saeql reads {known}: rebuild it with `saeql index --rebuild`"
        )


def run_statement(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    query: str,
    params: Params = None,
    *,
    max_rows: int | None = None,
    timeout_seconds: float | None = None,
) -> pa.Table:
    """Run one reading statement on a cursor of its own and return its rows.

    A table cut at `max_rows` says so in its schema metadata, `{b"truncated": b"true"}`. Raises SQLError with one line,
    and StoreError where the file itself turns out to be damaged.
    """
    try:
        cursor = connection.cursor()
    except duckdb.Error as error:
        raise StoreError(f"{path} has been closed: open it again") from error
    deadline = _Deadline(cursor, timeout_seconds)
    try:
        statement = _only_statement(cursor, query)
        with deadline:
            return _rows(cursor.sql(statement, params=params), max_rows)  # pyright: ignore[reportArgumentType]
    except (duckdb.Error, pa.ArrowException, OSError, RuntimeError) as error:
        if deadline.passed:
            raise SQLError(f"the query ran longer than {timeout_seconds:g} s and was stopped") from error
        message = one_line(error)
        if is_damage(error):
            raise StoreError(damage(path, error)) from error
        raise SQLError(refusal(message)) from error
    finally:
        cursor.close()


def quoted(text: Path | str) -> str:
    """As a string of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


@contextmanager
def read_beside(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection for saeql's own reading, whatever else of this program has the file open in which way."""
    connection = duckdb.connect()
    try:
        connection.execute("SET enable_progress_bar = false")
        connection.execute(f"ATTACH {quoted(path)} AS store (READ_ONLY); USE store")
        yield connection
    finally:
        connection.close()


def run_own(
    connection: duckdb.DuckDBPyConnection, path: Path, query: str, params: Params = None
) -> list[dict[str, Any]]:
    """Rows of a query of saeql's own, without checks and without Arrow: less than half the time for a few rows.

    Raises StoreError for a damaged or closed file, and where the question takes more memory than the store may have.
    """
    with own_cursor(connection, path) as cursor:
        found = cursor.execute(query, params) if params else cursor.execute(query)
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def own_columns(
    connection: duckdb.DuckDBPyConnection, path: Path, query: str, params: Params = None
) -> dict[str, np.ndarray]:
    """Columns without nulls of a query of saeql's own: for many rows. Raises StoreError as `run_own` does."""
    with own_cursor(connection, path) as cursor:
        found = cursor.execute(query, params) if params else cursor.execute(query)
        return {name: np.ma.getdata(values) for name, values in found.fetchnumpy().items()}


@contextmanager
def own_cursor(connection: duckdb.DuckDBPyConnection, path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A cursor for saeql's own reading. Raises StoreError as `run_own` does."""
    try:
        with connection.cursor() as cursor:
            yield cursor
    except duckdb.ConnectionException as error:
        raise StoreError(f"{path} has been closed: open it again") from error
    except duckdb.Error as error:
        if is_damage(error):
            raise StoreError(damage(path, error)) from error
        raise StoreError(f"{path} cannot answer: {one_line(error)}") from error


def is_damage(error: Exception) -> bool:
    """Nothing but the store's own files can be read, so a read that failed is a damaged file."""
    return isinstance(error, (duckdb.IOException, duckdb.FatalException)) or "Corrupt database file" in str(error)


def damage(path: Path | str, error: Exception | str) -> str:
    """What to say of it."""
    return f"{path} is damaged, rebuild it from its evidence with `saeql index --rebuild`: {one_line(error)}"


def _only_statement(cursor: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
    statements = cursor.extract_statements(query)
    if len(statements) != 1:
        raise SQLError(f"give one SQL statement, not {len(statements)}")
    kind = statements[0].type.name
    if kind not in _READING:
        raise SQLError(f"this store is read-only: {kind} statements are refused, SELECT, DESCRIBE and EXPLAIN are not")
    return statements[0]


def refusal(message: str) -> str:
    """DuckDB's message, said of this store where it is about read-only mode."""
    if "read-only mode" in message:
        return f"this store is read-only: {message}"
    return message


def _rows(relation: duckdb.DuckDBPyRelation, max_rows: int | None) -> pa.Table:
    if max_rows is None:
        return arrow_reader(relation).read_all()
    table = arrow_reader(relation.limit(max_rows + 1)).read_all()
    if table.num_rows <= max_rows:
        return table
    return table.slice(0, max_rows).replace_schema_metadata({"truncated": "true"})


def arrow_reader(relation: duckdb.DuckDBPyRelation) -> pa.RecordBatchReader:
    """The rows as Arrow, a batch at a time; DuckDB 2 names the reader differently from 1.5."""
    if hasattr(relation, "to_arrow_reader"):
        return relation.to_arrow_reader(_BATCH_ROWS)
    return relation.fetch_record_batch(_BATCH_ROWS)


def plain_numbers(column: pa.Array, kind: Any) -> np.ndarray:
    """The numbers of a column without nulls, of the numpy type that they have. Arrow's own way would import pandas."""
    if len(column) == 0:
        return np.zeros(0, kind)
    return np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column)]


class _Deadline:
    """Interrupts the cursor's statement after a number of seconds, never after the block has ended."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, seconds: float | None):
        self.cursor = cursor
        self.passed = False
        self._ended = False
        self._lock = threading.Lock()
        self._timer = None if seconds is None else threading.Timer(seconds, self._interrupt)

    def __enter__(self) -> "_Deadline":
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _interrupt(self) -> None:
        with self._lock:
            if not self._ended:
                self.passed = True
                self.cursor.interrupt()
