"""The store's schema as ordered migrations: `sql/NNN_<name>.sql`, each applied with its record in one transaction.

`main.meta` has one row: the schema version the file is at, the DuckDB version that made it, and when.
`main.migrations` has one row a migration applied.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources

import duckdb

from .errors import StoreError

_BOOK_KEEPING = """
CREATE TABLE IF NOT EXISTS meta (
    schema_version INTEGER NOT NULL, engine_version VARCHAR NOT NULL, created TIMESTAMP NOT NULL
);
CREATE TABLE IF NOT EXISTS migrations (
    version INTEGER NOT NULL, name VARCHAR NOT NULL, applied TIMESTAMP NOT NULL
);
COMMENT ON TABLE meta IS 'What made this store: schema version, DuckDB version, time (UTC).';
"""


@dataclass(frozen=True)
class Migration:
    """One step of the schema; `version` counts from 1 without gaps."""

    version: int
    name: str
    sql: str


def sql_text(name: str) -> str:
    """Text of `sql/<name>.sql`."""
    return (resources.files("saeql.store") / "sql" / f"{name}.sql").read_text(encoding="utf-8")


@cache
def migrations() -> tuple[Migration, ...]:
    """Every migration this code knows, in order."""
    names = sorted(f.name for f in (resources.files("saeql.store") / "sql").iterdir() if f.name[:3].isdigit())
    found = []
    for expected, name in enumerate(names, start=1):
        stem = name.removesuffix(".sql")
        version = int(stem[:3])
        assert version == expected, f"migration {name} is out of order"
        found.append(Migration(version, stem[4:], sql_text(stem)))
    return tuple(found)


def schema_version() -> int:
    """The newest schema version this code writes and reads."""
    return migrations()[-1].version


def applied_version(connection: duckdb.DuckDBPyConnection) -> int:
    """Schema version of the open file, 0 for a file without a `meta` table."""
    query = "SELECT count(*) FROM duckdb_tables() WHERE schema_name = 'main' AND table_name = 'meta' AND NOT temporary"
    if _one(connection, query) == 0:
        return 0
    return _one(connection, "SELECT coalesce(max(schema_version), 0) FROM meta")


def apply(connection: duckdb.DuckDBPyConnection, steps: tuple[Migration, ...] | None = None) -> list[Migration]:
    """Bring the open file to the newest schema and return what was applied, in order.

    A migration that fails leaves the file as the one before it left it. Raises StoreError for a newer file.
    """
    steps = migrations() if steps is None else steps
    have = applied_version(connection)
    check_not_newer(have, steps[-1].version, "this file")
    done = []
    for step in steps[have:]:
        connection.execute("BEGIN TRANSACTION")
        try:
            connection.execute(_BOOK_KEEPING)
            connection.execute(step.sql)
            now = datetime.now(UTC).replace(tzinfo=None)
            connection.execute("INSERT INTO migrations VALUES (?, ?, ?)", [step.version, step.name, now])
            if _one(connection, "SELECT count(*) FROM meta") == 0:
                connection.execute("INSERT INTO meta SELECT 0, version(), ?", [now])
            connection.execute("UPDATE meta SET schema_version = ?", [step.version])
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        done.append(step)
    return done


def check_not_newer(have: int, known: int, name: str) -> None:
    """Raise StoreError where a file is at a schema version that this code does not know."""
    if have > known:
        raise StoreError(
            f"{name} has schema version {have}, this saeql knows up to {known}: upgrade saeql, or rebuild the store "
            "from its evidence with `saeql index --rebuild`"
        )


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]
