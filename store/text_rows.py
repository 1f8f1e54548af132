"""The rows of one corpus as arrays: row r is one position of one window, numbered in the order of the text."""

from dataclasses import dataclass
from functools import cached_property

import duckdb
import numpy as np

from .errors import StoreError
from .query import arrow_reader, plain_numbers
from .records import SPLITS

#: Visible context of an example, in tokens before and after its peak.
BEFORE, AFTER = 16, 8


@dataclass(frozen=True)
class TextRows:
    """What a row number stands for. R rows, W window ids from `first_window` on.

    What follows from the windows is made when it is asked for: a reader that shows examples never does.
    """

    first_window: int
    starts: np.ndarray  # [W + 1] int64: first row of each window
    token_ids: np.ndarray  # [R] int32
    document_ids: np.ndarray  # [R] int32
    split_of_window: np.ndarray  # [W] int8, index into SPLITS
    vocabulary: np.ndarray  # [V] object: text of every token id
    num_kept_rows: np.ndarray  # [S] int64 by split

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.token_ids)

    @cached_property
    def window_ids(self) -> np.ndarray:
        """[R] int32."""
        windows = np.arange(self.first_window, self.first_window + len(self.starts) - 1, dtype=np.int32)
        return np.repeat(windows, np.diff(self.starts))

    @cached_property
    def positions(self) -> np.ndarray:
        """[R] int16."""
        lengths = np.diff(self.starts)
        return (np.arange(self.num_rows) - np.repeat(self.starts[:-1], lengths)).astype(np.int16)

    @cached_property
    def splits(self) -> np.ndarray:
        """[R] int8, index into SPLITS."""
        return np.repeat(self.split_of_window, np.diff(self.starts))

    def rows(self, window_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[N] int64 row numbers. Raises StoreError for a place that is in no window."""
        windows = window_ids.astype(np.int64) - self.first_window
        known = (windows >= 0) & (windows < len(self.starts) - 1)
        rows = self.starts[np.where(known, windows, 0)] + positions
        known &= (positions >= 0) & (rows < self.starts[np.where(known, windows + 1, 0)])
        if not known.all():
            first = int(window_ids[~known].min()) - self.first_window
            raise StoreError(
                f"{(~known).sum()} activations lie outside the windows, first in window {first}: index again"
            )
        return rows

    @cached_property
    def _document_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """(document, window) of every document in every window that it has rows in, by document."""
        pairs = self.document_ids.astype(np.int64) << 32
        pairs |= np.repeat(np.arange(len(self.starts) - 1) + self.first_window, np.diff(self.starts))
        pairs = np.unique(pairs[run_starts(pairs)])
        return pairs >> 32, (pairs & (2**32 - 1)).astype(np.int32)

    def windows_of(self, document_id: int) -> np.ndarray:
        """[n] ids of the windows that a document has rows in, ascending; none where it has none."""
        documents, windows = self._document_windows
        return windows[slice(*np.searchsorted(documents, [document_id, document_id + 1]))]

    @cached_property
    def has_whole_documents(self) -> bool:
        """Whether the rows of every document of a split follow each other, other splits left out."""
        for split in range(len(SPLITS)):
            documents = self.document_ids[self.splits == split]
            if len(documents) and (np.diff(documents) != 0).sum() + 1 != len(np.unique(documents)):
                return False
        return True


def read_vocabulary(connection: duckdb.DuckDBPyConnection, vocabulary_id: int) -> np.ndarray:
    """[V] object: text of every token id, None for one that has none."""
    texts = connection.execute(
        f"SELECT token_id, token FROM evidence.vocabulary WHERE vocabulary_id = {vocabulary_id}"
    ).fetchall()
    vocabulary = np.full(max((token_id for token_id, _ in texts), default=-1) + 1, None, object)
    for token_id, text in texts:
        vocabulary[token_id] = text
    return vocabulary


def read_text_rows(
    connection: duckdb.DuckDBPyConnection, corpus_id: int, known: dict[int, np.ndarray] | None = None
) -> TextRows:
    """The rows of a corpus that is loaded; vocabularies by id are taken from `known`, and put there when read."""
    first, count, vocabulary_id = connection.execute(
        "SELECT first_window, num_windows, vocabulary_id FROM evidence.corpora WHERE corpus_id = ?", [corpus_id]
    ).fetchall()[0]
    inside = f"FROM evidence.tokens WHERE window_id BETWEEN {first} AND {first + count - 1}"
    counted = columns(connection, f"SELECT window_id, count(*) AS n {inside} GROUP BY window_id")
    lengths = np.zeros(count, np.int64)
    lengths[counted["window_id"] - first] = counted["n"]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    token_ids, document_ids = np.zeros((2, starts[-1]), np.int32)
    # batch by batch and in any order: sorting a text takes more memory than the text
    for batch in arrow_reader(connection.sql(f"SELECT window_id, position, token_id, document_id {inside}")):
        types = (np.int32, np.int16, np.int32, np.int32)
        window, position, token, document = (plain_numbers(batch.column(n), kind) for n, kind in enumerate(types))
        rows = starts[window - first] + position
        token_ids[rows], document_ids[rows] = token, document
    windows = connection.execute(
        f"SELECT window_id, split FROM evidence.windows WHERE corpus_id = {corpus_id}"
    ).fetchall()
    split_of_window = np.zeros(count, np.int8)
    for window, split in windows:
        split_of_window[window - first] = SPLITS.index(split)
    kept = dict(
        connection.execute(
            f"SELECT split, num_kept_rows FROM evidence.split_rows WHERE corpus_id = {corpus_id}"
        ).fetchall()
    )
    known = {} if known is None else known
    if vocabulary_id not in known:
        known[vocabulary_id] = read_vocabulary(connection, vocabulary_id)
    texts = known[vocabulary_id]
    vocabulary = np.full(max(int(token_ids.max(initial=0)) + 1, len(texts)), "", object)
    vocabulary[: len(texts)] = np.where(texts == None, "", texts)  # noqa: E711
    return TextRows(
        first_window=first,
        starts=starts,
        token_ids=token_ids,
        document_ids=document_ids,
        split_of_window=split_of_window,
        vocabulary=vocabulary,
        num_kept_rows=np.array([kept.get(s) or 0 for s in SPLITS], np.int64),
    )


def columns(connection: duckdb.DuckDBPyConnection, query: str) -> dict[str, np.ndarray]:
    """Columns of a query without nulls, in its order."""
    found = connection.execute(query).fetchnumpy()
    return {name: np.ascontiguousarray(np.ma.getdata(values)) for name, values in found.items()}


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of every range, one range after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def run_starts(keys: np.ndarray) -> np.ndarray:
    """Where a new value begins in ascending `keys`."""
    if len(keys) == 0:
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
