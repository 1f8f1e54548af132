"""A store in Parquet for strangers: its files are opened here, once, and the engine gets relations, not paths.

DuckDB would have to be allowed to read the folder, and what it may read it may also write over.
"""

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from .errors import StoreError, one_line
from .parquet_store import check_version, create_views


class ParquetRelations:
    """The files of a store's folder, mapped into memory, and a database in memory with the store's views over them."""

    def __init__(self, folder: Path, *, memory_limit: str, threads: int | None):
        check_version(folder)
        config: dict[str, str | bool | int | float | list[str]] = {
            "enable_external_access": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "python_enable_replacements": "false",
            "memory_limit": memory_limit,
            "temp_directory": "",
            "max_temp_directory_size": "0MB",
        }
        if threads is not None:
            config["threads"] = str(threads)
        try:
            self._relations = {file.stem: _mapped(file) for file in sorted(folder.glob("*.*.parquet"))}
            self.connection = duckdb.connect(config=config)
            self._register(self.connection)
            create_views(self.connection, {name: _alias(name) for name in self._relations})
            self.connection.execute("SET enable_progress_bar = false; SET lock_configuration = true")
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise StoreError(f"cannot open the Parquet store: {one_line(error)}") from error

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection that sees the relations."""
        cursor = self.connection.cursor()
        self._register(cursor)
        return cursor

    def _register(self, connection: duckdb.DuckDBPyConnection) -> None:
        for name, relation in self._relations.items():
            connection.register(_alias(name), relation)


def _alias(name: str) -> str:
    return f"parquet_{name.replace('.', '_')}"


def _mapped(file: Path) -> ds.Dataset:
    """A file as a relation that holds it open: nothing is opened again when it is read."""
    form = ds.ParquetFileFormat()
    return ds.FileSystemDataset([form.make_fragment(pa.memory_map(str(file)))], pq.read_schema(file), form)
