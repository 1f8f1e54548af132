"""Rows of a query in the form that was asked for, on stdout or in a file."""

import io
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from saeql.store.errors import StoreError

from .atomic import write_whole
from .output import csv_text, json_text, print_records

FORMATS = ("table", "json", "csv", "arrow", "parquet")
BINARY = ("arrow", "parquet")
_SUFFIXES = {".json": "json", ".csv": "csv", ".arrow": "arrow", ".feather": "arrow", ".parquet": "parquet"}


def chosen_format(format: str | None, out: Path | None) -> str:
    """The format asked for, else the one that the file's name says, else "table". Raises StoreError."""
    if format is None and out is not None:
        format = _SUFFIXES.get(out.suffix.lower())
        if format is None:
            raise StoreError(f"{out.name} does not say a format: end it in {', '.join(_SUFFIXES)}, or give --format")
    format = format or "table"
    if format not in FORMATS:
        raise StoreError(f"no format {format!r}: there are {', '.join(FORMATS)}")
    if out is not None and format == "table":
        raise StoreError(f"a table is for the screen: for {out.name} take --format {', '.join(FORMATS[1:])}")
    if out is None and format in BINARY and sys.stdout.isatty():
        raise StoreError(f"{format} is not for a terminal: give --out FILE, or redirect")
    return format


def write_result(table: pa.Table, format: str, out: Path | None = None) -> None:
    """Print `table`, or write it to the file `out`, whole or not at all.

    "arrow" is Arrow's file format (Feather 2) in a file and its stream format on stdout.
    """
    if format == "table":
        print_records(table.column_names, rows_of(table), "table")
    elif format in BINARY:
        content = _parquet(table) if format == "parquet" else _arrow(table, stream=out is None)
        if out is None:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            write_whole(out, content)
    else:
        text = (json_text if format == "json" else csv_text)(table.column_names, rows_of(table))
        if out is None:
            sys.stdout.write(text)
        else:
            write_whole(out, text)


def rows_of(table: pa.Table) -> list[list[Any]]:
    """Rows as Python values, columns of the same name kept apart."""
    return [list(row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def _arrow(table: pa.Table, *, stream: bool) -> bytes:
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()
