"""A store as a folder of Parquet files, one a table, under the same views and macros: to share or to keep on a bucket.

Its SQL is that of the file. This connection is for trusted code only: files have to stay readable, so statements can
read others too. Strangers get the same views over relations that `console_parquet` holds open.
"""

import json
import os
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from . import migrations
from .errors import OldStoreError, StoreError, one_line
from .query import arrow_reader, quoted, read_beside

STORE_FILE = "store.json"
_ROW_GROUP_ROWS = 122_880
#: Rows that are lists of a whole window: so few a group that twenty examples are shown without reading all others.
_LONG_ROWS, _LONG_GROUP_ROWS = "evidence.windows", 512
_SCHEMAS = ("evidence", "derived")


def write_parquet(store: Path, folder: Path) -> Path:
    """Write the store file `store` as a folder, in the order of its tables; whole or not at all.

    Raises StoreError where the folder exists and holds something else than a store, or the file cannot be read.
    """
    if folder.exists() and not (folder / STORE_FILE).exists():
        raise StoreError(f"{folder} exists and is no Parquet store: name another folder")
    temporary = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with read_beside(store) as connection:
            for name in _tables(connection):
                file = temporary / f"{name}.parquet"
                if name == _LONG_ROWS:
                    _write_small_groups(connection, name, file)
                else:
                    connection.execute(
                        f"COPY {name} TO {quoted(file)} "
                        f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROW_GROUP_ROWS})"
                    )
            version = migrations.applied_version(connection)
        (temporary / STORE_FILE).write_text(json.dumps({"schema_version": version}) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except duckdb.Error as error:
        raise StoreError(f"cannot write {store} to {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_small_groups(connection: duckdb.DuckDBPyConnection, table: str, file: Path) -> None:
    """DuckDB writes 2048 rows a group and more."""
    query = f"SELECT * REPLACE (split::VARCHAR AS split) FROM {table}"
    reader = arrow_reader(connection.sql(query))
    with pq.ParquetWriter(file, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]), _LONG_GROUP_ROWS)


def is_parquet_store(path: Path) -> bool:
    """Whether a path is a store in Parquet."""
    return (path / STORE_FILE).is_file()


def connect_parquet(folder: Path, *, memory_limit: str, threads: int | None) -> duckdb.DuckDBPyConnection:
    """A database in memory whose tables are the folder's files.

    Raises StoreError for a folder that is damaged or newer, OldStoreError for an older one.
    """
    check_version(folder)
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": memory_limit,
        "python_enable_replacements": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
    }
    if threads is not None:
        config["threads"] = str(threads)
    connection = duckdb.connect(config=config)
    try:
        connection.execute("SET enable_progress_bar = false; SET parquet_metadata_cache = true")
        files = sorted(folder.glob("*.*.parquet"))
        create_views(connection, {file.stem: f"read_parquet({quoted(file)})" for file in files})
    except duckdb.Error as error:
        connection.close()
        raise StoreError(f"cannot open {folder}: {one_line(error)}") from error
    return connection


def create_views(connection: duckdb.DuckDBPyConnection, tables: dict[str, str]) -> None:
    """Create every table of the store as a view of the relation it is read from, and the store's own views on them."""
    for schema in _SCHEMAS:
        connection.execute(f"CREATE SCHEMA {schema}")
    for name, relation in tables.items():
        connection.execute(f"CREATE VIEW {name} AS SELECT * FROM {relation}")
    for name in (
        "005_views",
        "006_questions",
        "009_comparison_views",
        "011_cards",
        "013_steering_views",
        "015_token_questions",
    ):
        connection.execute(migrations.sql_text(name))


def check_version(folder: Path) -> None:
    """Raise StoreError for a folder that is damaged or newer, OldStoreError for an older one."""
    version, known = _version(folder), migrations.schema_version()
    migrations.check_not_newer(version, known, str(folder))
    if version < known:
        raise OldStoreError(f"{folder} has schema version {version}, this saeql reads {known}: write it again")


def _version(folder: Path) -> int:
    try:
        return int(json.loads((folder / STORE_FILE).read_text(encoding="utf-8"))["schema_version"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise StoreError(f"{folder / STORE_FILE} is damaged ({error}): write the store again") from None


def _tables(connection: duckdb.DuckDBPyConnection) -> list[str]:
    rows = connection.execute(
        "SELECT schema_name || '.' || table_name FROM duckdb_tables() WHERE list_contains(?, schema_name) ORDER BY 1",
        [list(_SCHEMAS)],
    ).fetchall()
    return [row[0] for row in rows]
