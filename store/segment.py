"""A segment: one dictionary's activations on one corpus, in both physical orders, and what is derived of them.

The activations are sorted by document first. One pass over them in that order checks every place, counts, keeps the
features of the rows in a memory-mapped file, and spools the activations into one file a chunk of features. Each chunk
is then sorted and summarised by itself, two at a time while DuckDB stores the one before: memory is bounded by
`CHUNK_ROWS`, or by a single feature that has more.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import duckdb
import numpy as np
import pyarrow as pa

from . import feature_chunk
from .cofiring import RowFeatures, cofirings_table
from .errors import StoreError
from .evidence import Evidence
from .feature_chunk import NUM_SPLITS, RECORD, make_chunk
from .names import files, named_rows
from .text_rows import TextRows, columns, read_text_rows, run_starts
from .token_features import Pairs, TokenFeatures

CHUNK_ROWS = 4_000_000
_BATCH_ROWS = 1_000_000
#: Chunks that are summarised at the same time.
WORKERS = 2

Insert = Callable[[str, pa.Table], None]
T = TypeVar("T")
R = TypeVar("R")


def load_by_document(
    connection: duckdb.DuckDBPyConnection, evidence: Evidence, segment_id: int, dictionary: str, first_window: int
) -> None:
    """Store the activations of a dictionary in the order of the text."""
    connection.execute("SET preserve_insertion_order = false")  # the sort decides, and nothing waits for its turn
    connection.execute(
        f"""
        INSERT INTO evidence.activations_by_document
        SELECT {segment_id}, window_id + {first_window}, position, feature, activation
        FROM {named_rows(evidence)} WHERE dictionary = $name
        ORDER BY window_id, position, feature
        """,
        {"files": files(evidence, "activations"), "name": dictionary},
    )
    connection.execute("SET preserve_insertion_order = true")


def derive_segment(
    connection: duckdb.DuckDBPyConnection, segment_id: int, spool: Path, *, only_cofirings: bool = False
) -> None:
    """Everything that is derived of a stored segment; `spool` is a folder for temporary files.

    Raises StoreError for a feature or place that the dictionary or the text does not have.
    """
    name, d_sae, corpus_id = _about(connection, segment_id)
    text = read_text_rows(connection, corpus_id)
    spooled = _spool(connection, segment_id, name, d_sae, text, spool)

    best = TokenFeatures(segment_id, text, spooled.of_rows.num_activations)

    def work(number: int) -> tuple[dict[str, pa.Table], tuple[Pairs, np.ndarray] | None]:
        first, last = spooled.bounds[number], spooled.bounds[number + 1]
        chunk = make_chunk(segment_id, first, last - first, text, spooled.read(number))
        cofirings = cofirings_table(chunk, spooled.of_rows)
        if only_cofirings:
            return {"derived.cofirings": cofirings}, None
        tables = {
            "evidence.activations_by_feature": feature_chunk.by_feature_table(chunk),
            "derived.feature_stats": feature_chunk.stats_table(chunk),
            "derived.feature_tokens": feature_chunk.top_tokens_table(chunk),
            "derived.examples": feature_chunk.examples_table(chunk),
            "derived.cofirings": cofirings,
        }
        return tables, best.candidates(*chunk.token_pairs())

    for tables, pairs in _in_order(work, range(len(spooled.bounds) - 1)):
        for table, rows in tables.items():
            insert(connection, table, rows)
        if pairs is not None:
            best.add(pairs)
    if not only_cofirings:
        for table, rows in best.tables().items():
            insert(connection, table, rows)


def derive_token_features(connection: duckdb.DuckDBPyConnection, segment_id: int) -> None:
    """What stands for every token, of a stored segment that has all else."""
    name, d_sae, corpus_id = _about(connection, segment_id)
    text = read_text_rows(connection, corpus_id)
    counts = _counts(connection, segment_id, name, d_sae)
    best = TokenFeatures(segment_id, text, counts)
    bounds = chunk_bounds(counts)
    for first, last in pairwise(bounds):
        found = columns(
            connection,
            "SELECT feature, window_id, position FROM evidence.activations_by_feature "
            f"WHERE segment_id = {segment_id} AND feature BETWEEN {first} AND {last - 1}",
        )
        token = text.token_ids[text.rows(found["window_id"], found["position"])].astype(np.int64)
        keys = np.sort((found["feature"].astype(np.int64) << 32) | token)
        starts = run_starts(keys)
        count = np.diff(np.append(starts, len(keys)))
        best.add(best.candidates(keys[starts] >> 32, keys[starts] & (2**32 - 1), count))
    for table, rows in best.tables().items():
        insert(connection, table, rows)


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Append Arrow rows in their order, columns by name."""
    connection.register("arrow_rows", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM arrow_rows")
    connection.unregister("arrow_rows")


def _in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """work(item) of every item in their order, done by WORKERS threads, no further ahead than that."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: list[Future[R]] = []
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > WORKERS:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


class _Spooled:
    """Activations by chunk of features, and the features by row, both in files."""

    def __init__(self, bounds: list[int], of_rows: RowFeatures, folder: Path):
        self.bounds, self.of_rows, self.folder = bounds, of_rows, folder

    def read(self, number: int) -> np.ndarray:
        """[N] of RECORD: a chunk's activations in the order of rows. The file is gone afterwards."""
        file = self.folder / f"{number}.chunk"
        if not file.exists():
            return np.zeros(0, RECORD)
        records = np.fromfile(file, RECORD)
        file.unlink()
        return records


def _spool(
    connection: duckdb.DuckDBPyConnection, segment_id: int, name: str, d_sae: int, text: TextRows, folder: Path
) -> _Spooled:
    folder.mkdir(parents=True, exist_ok=True)
    assert text.num_rows < 2**32, "a row is 32 bits of a record"
    counts = _counts(connection, segment_id, name, d_sae)
    total = int(counts.sum())
    bounds = chunk_bounds(counts)
    chunk_of = np.repeat(np.arange(len(bounds) - 1, dtype=np.uint16), np.diff(bounds))
    first_of = np.repeat(np.array(bounds[:-1], np.int32), np.diff(bounds))
    row_counts = np.zeros(text.num_rows + 1, np.int64)
    features_file, at, last_row = folder / "features", 0, -1
    reader = connection.sql(
        "SELECT window_id, position, feature, activation FROM evidence.activations_by_document "
        f"WHERE segment_id = {segment_id}"
    ).to_arrow_reader(_BATCH_ROWS)

    def prepare(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(rows, features, records by chunk, end of every chunk) of activations."""
        window, position, feature, activation = (batch.column(n).to_numpy() for n in range(4))
        rows = text.rows(window, position)
        assert (np.diff(rows) >= 0).all(), "activations are not in the order of the text"
        if not np.isfinite(activation).all() or activation.min(initial=1) <= 0:
            raise StoreError(f"activations of {name} are not all positive: index again")
        records = np.empty(len(rows), RECORD)
        records["row"] = rows
        records["group"] = (feature - first_of[feature]) * NUM_SPLITS + text.splits[rows]
        records["activation"] = activation
        chunk = chunk_of[feature]
        ends = np.cumsum(np.bincount(chunk, minlength=len(bounds) - 1))
        return rows, np.ascontiguousarray(feature, np.int32), records[np.argsort(chunk, kind="stable")], ends

    with ExitStack() as stack:
        chunk_files = [
            stack.enter_context((folder / f"{number}.chunk").open("wb")) for number in range(len(bounds) - 1)
        ]
        by_row = stack.enter_context(features_file.open("wb"))
        for rows, feature, records, ends in _in_order(prepare, reader):
            if len(rows) == 0:
                continue
            assert rows[0] >= last_row, "activations are not in the order of the text"
            last_row = int(rows[-1])
            row_counts[rows[0] + 1 : last_row + 2] += np.bincount(rows - rows[0])
            by_row.write(feature.data)
            for number, end in enumerate(ends):
                start = ends[number - 1] if number else 0
                if end > start:
                    chunk_files[number].write(records[start:end].data)
            at += len(rows)
    assert at == total, f"{at} of {total} activations of {name} were read"
    features = np.memmap(features_file, np.int32, "r") if total else np.zeros(0, np.int32)
    return _Spooled(bounds, RowFeatures(features, np.cumsum(row_counts), counts), folder)


def _about(connection: duckdb.DuckDBPyConnection, segment_id: int) -> tuple[str, int, int]:
    """(dictionary, d_sae, corpus id) of a segment."""
    return connection.execute(
        "SELECT dictionary, d_sae, corpus_id FROM evidence.segments JOIN evidence.dictionaries USING (dictionary_id) "
        f"WHERE segment_id = {segment_id}"
    ).fetchall()[0]


def _counts(connection: duckdb.DuckDBPyConnection, segment_id: int, name: str, d_sae: int) -> np.ndarray:
    """[d_sae] int64: how often every feature fires."""
    rows = connection.execute(
        "SELECT feature, count(*) AS n FROM evidence.activations_by_document "
        f"WHERE segment_id = {segment_id} GROUP BY feature"
    ).fetchnumpy()
    feature, count = np.ma.getdata(rows["feature"]), np.ma.getdata(rows["n"])
    outside = (feature < 0) | (feature >= d_sae)
    if outside.any():
        raise StoreError(f"an activation of {name} names feature {feature[outside][0]}, it has {d_sae}: index again")
    counts = np.zeros(d_sae, np.int64)
    counts[feature] = count
    return counts


def chunk_bounds(counts: np.ndarray) -> list[int]:
    """First feature of every chunk, and d_sae: about CHUNK_ROWS activations each, one feature at least."""
    bounds, filled = [0], 0
    for feature, count in enumerate(counts.tolist()):
        if feature > bounds[-1] and (filled + count > CHUNK_ROWS or feature - bounds[-1] >= feature_chunk.MAX_FEATURES):
            bounds.append(feature)
            filled = 0
        filled += count
    return [*bounds, len(counts)]
