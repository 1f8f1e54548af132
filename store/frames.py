"""Results as pandas or polars frames; neither is needed until it is asked for."""

from importlib import import_module
from typing import Any

import pyarrow as pa

from .errors import StoreError

FRAMES = ("pandas", "polars")


def as_frame(table: pa.Table, library: str) -> Any:
    """`table` as a DataFrame of "pandas" or "polars". Raises StoreError for another name or a missing package."""
    if library not in FRAMES:
        raise StoreError(f"no results as {library!r}: there are arrow, {', '.join(FRAMES)}")
    try:
        package = import_module(library)
    except ImportError as error:
        raise StoreError(f"results as {library} need the package {library}: pip install {library}") from error
    return table.to_pandas() if library == "pandas" else package.from_arrow(table)
