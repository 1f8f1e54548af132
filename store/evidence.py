"""The evidence folder: a table (`records.TABLES`) is one Parquet file, or a folder of parts that many ranks write.

`<table>.parquet` and all of `<table>/*.parquet` together are the table.
Every file is written under a temporary name and renamed, so a file that exists is whole.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .records import TABLES


class EvidenceError(ValueError):
    """An evidence file is missing or does not have the columns of `records.TABLES`."""


class Evidence:
    """Reads and writes the evidence tables of one run, `<run>/evidence/`.

    `names`: what a store is to call dictionaries of the folder, by the name that they have in it; others keep theirs.
    """

    def __init__(self, folder: str | Path, names: Mapping[str, str] | None = None):
        self.folder, self.names = Path(folder), dict(names or {})

    def path(self, table: str, part: str | None = None) -> Path:
        """File of `table`; `part` names one part file of a table that has many."""
        assert table in TABLES, table
        return self.folder / table / f"{part}.parquet" if part is not None else self.folder / f"{table}.parquet"

    def write(self, table: str, data: pa.Table, part: str | None = None) -> Path:
        """Write `data`, cast to the table's schema. Raises EvidenceError where the columns differ."""
        schema = TABLES[table]
        missing = [name for name in schema.names if name not in data.column_names]
        if missing:
            raise EvidenceError(f"evidence table {table}: column {missing[0]!r} is missing")
        path = self.path(table, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        try:
            pq.write_table(data.select(schema.names).cast(schema), temporary, compression="zstd")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def files(self, table: str) -> list[Path]:
        """The table's files in name order. Raises EvidenceError where there is none."""
        single = self.path(table)
        found = [*([single] if single.exists() else []), *sorted((self.folder / table).glob("*.parquet"))]
        if not found:
            raise EvidenceError(f"{self.folder} has no evidence table {table!r}: run `saeql index` first")
        return found

    def has(self, table: str) -> bool:
        """Whether the table has at least one file."""
        return self.path(table).exists() or any((self.folder / table).glob("*.parquet"))

    def read(self, table: str, columns: list[str] | None = None, split: str | None = None) -> pa.Table:
        """The whole table in file order; `split` keeps that split only."""
        filters = None if split is None else [("split", "=", split)]
        parts = [pq.read_table(f, columns=columns, filters=filters) for f in self.files(table)]
        return pa.concat_tables(parts)


class PartWriter:
    """One Parquet file that is never whole in memory; it exists once `publish` was called.

    Its folder must be there: one that another process renamed meanwhile is not made again.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema = path, schema
        self._temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd")

    def add(self, data: pa.Table) -> None:
        """Append rows; they are on their way to the disk when this returns."""
        self._writer.write_table(data.select(self.schema.names).cast(self.schema))

    def publish(self) -> Path:
        """Close the file and give it its name."""
        self._writer.close()
        self._temporary.replace(self.path)
        return self.path

    def discard(self) -> None:
        """Remove what was written."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)
