"""Adapts what the store reads (shards) to what training and indexing consume (ActivationSource).

Shuffled reading holds two groups of blocks in memory: batches are views of one while a thread copies the other from the
mapped files, each row to its shuffled place. Both groups and what is needed to fill them stay within `buffer_bytes`,
those of all ranks together that read one stream; a group whose batches are held on to is not filled again, and other
memory is taken.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from saeql.sae.stream import ActivationBatch, BlockShuffle, Cursor
from saeql.store.shards import ShardError, ShardReader

from .row_buffer import PlacedRows, buffered_row_bytes

#: Blocks that the kernel is asked to read ahead of the one that is copied.
_BLOCKS_AHEAD = 8


@dataclass(frozen=True)
class _Piece:
    """Rows `low` to `high - 1` of one shard."""

    shard: int
    low: int
    high: int


class ShardSource:
    """Rows of one split at one or several hook points, side by side in `acts`: kept rows only.

    Kept are positions after the first (`first_positions` keeps those too) whose norm exceeds `norm_limits` nowhere.
    `shuffle_seed` None gives one pass in stored order; a seed gives an endless stream, shuffled by blocks and then by
    rows inside the blocks that are in memory at once: half of `buffer_bytes`, since the next ones are read meanwhile.

    Of `num_ranks` processes with the same arguments each hands out its `rank`'s part of every shuffled batch, and holds
    only those rows: together the rows, in the order, and in the memory of one process alone. So a cursor is good for
    any number of ranks.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        batch_tokens: int,
        norm_limits: Mapping[str, float],
        first_positions: bool = False,
        shuffle_seed: int | None = None,
        block_rows: int = 1024,
        buffer_bytes: int = 1_000_000_000,
        device: torch.device | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.rank, self.num_ranks = rank, num_ranks
        self.readers = {name: ShardReader(folder) for name, folder in folders.items()}
        self.first = next(iter(self.readers.values()))
        for name, reader in self.readers.items():
            if [r.rows for r in reader.records] != [r.rows for r in self.first.records] or (
                reader.dtype != self.first.dtype
            ):
                raise ShardError(
                    f"{reader.folder}: the shards of {name} do not line up with those of the other hook points"
                )
        self.batch_tokens, self.norm_limits, self.seed = batch_tokens, norm_limits, shuffle_seed
        self.first_position = 0 if first_positions else 1
        self.block_rows, self.buffer_bytes = block_rows, buffer_bytes
        self.device = device or torch.device("cpu")
        self.dtype = torch.bfloat16 if self.first.dtype == "bfloat16" else torch.float32
        self._row_bytes = sum(reader.d_in for reader in self.readers.values()) * self.dtype.itemsize
        # of the last pass, for the next: memory that is new costs a page fault a page
        self._spare: list[PlacedRows] = []
        self._offsets = np.cumsum([0, *(record.rows for record in self.first.records)])

    @property
    def widths(self) -> dict[str, int]:
        """Columns of every hook point, in their order."""
        return {name: reader.d_in for name, reader in self.readers.items()}

    @property
    def num_rows(self) -> int:
        """Stored rows, left-out ones included."""
        return self.first.num_rows

    def batches(self, cursor: Cursor | None = None) -> Iterator[ActivationBatch]:
        """Batches from `cursor` on: endless where shuffled, else one pass. Raises ShardError for too small a buffer."""
        return self.in_order(range(self.num_rows)) if self.seed is None else self._shuffled(cursor or Cursor())

    def in_order(self, stored: range) -> Iterator[ActivationBatch]:
        """The kept ones of a range of stored rows, in stored order; every batch is of `batch_tokens` stored rows."""
        for start in range(stored.start, stored.stop, self.batch_tokens):
            stop = min(start + self.batch_tokens, stored.stop)
            rows = self._room(stop - start)
            self._fill(rows, self._pieces([(start, stop)]))
            if rows.count:
                yield rows.batch(0, rows.count, Cursor(), self.device)

    def _shuffled(self, cursor: Cursor) -> Iterator[ActivationBatch]:
        assert self.seed is not None
        shuffle = BlockShuffle(self.num_rows, self.block_rows, self._group_rows(), self.seed)
        most = min(self.num_rows, shuffle.blocks_per_group * self.block_rows)
        own = len(self._own_part())
        if self.num_ranks > 1:
            most = most // self.batch_tokens * own
        spare, self._spare = self._spare, []
        current, other = (self._room(most) if rows is None or rows.is_held else rows for rows in spare or (None, None))
        epoch, group, offset = cursor.epoch, cursor.group, cursor.offset
        num_empty = 0  # groups in a row that held less than a batch
        stopped = threading.Event()

        def fill(rows: PlacedRows, epoch: int, group: int) -> None:
            self._fill(rows, self._pieces(shuffle.blocks(epoch, group)), (shuffle, epoch, group), stopped)

        try:
            with ThreadPoolExecutor(1, "shard-reader") as reading:
                filled = reading.submit(fill, current, epoch, group)
                try:
                    while True:
                        filled.result()
                        following = (epoch, group + 1) if group + 1 < shuffle.num_groups else (epoch + 1, 0)
                        other = self._room(most) if other.is_held else other
                        filled = reading.submit(fill, other, *following)
                        # the last, incomplete batch of a group is left out of this epoch; another shuffle picks others
                        while offset + self.batch_tokens <= current.count:
                            start, offset = offset, offset + self.batch_tokens
                            after, first = Cursor(epoch, group, offset), start // self.batch_tokens * own
                            # a loop still holds it when this memory is filled again
                            last = offset + self.batch_tokens > current.count
                            yield current.batch(first, first + own, after, self.device, copy=last)
                        num_empty = 0 if offset else num_empty + 1
                        if num_empty > shuffle.num_groups:
                            raise ValueError(
                                f"{current.count} rows are fewer than one batch of {self.batch_tokens}; "
                                "lower batch_tokens"
                            )
                        (epoch, group), offset = following, 0
                        current, other = other, current
                finally:
                    stopped.set()
        finally:  # the thread has ended
            self._spare = [current, other]

    def _own_part(self) -> range:
        """This rank's rows of a batch."""
        return range(*(self.batch_tokens * rank // self.num_ranks for rank in (self.rank, self.rank + 1)))

    def _own_places(self, places: NDArray[np.int64], num_batches: int) -> NDArray[np.int64]:
        """Where rows at `places` of a group stand in this rank's memory; -1 for those of others, and of no batch."""
        own = self._own_part()
        batch, row = np.divmod(places, self.batch_tokens)
        is_own = (row >= own.start) & (row < own.stop) & (batch < num_batches)
        return np.where(is_own, batch * len(own) + row - own.start, -1)

    def _group_rows(self) -> int:
        row_bytes = buffered_row_bytes(self._row_bytes)
        # whole blocks with room for a batch beside the rows that are left out
        least = 2 * row_bytes * self.block_rows * -(-(self.batch_tokens * 9 // 8) // self.block_rows)
        if self.buffer_bytes < least:
            raise ShardError(
                f"train.shuffle_buffer_bytes = {self.buffer_bytes} has no room for two groups of a batch of "
                f"{self.batch_tokens} rows in blocks of {self.block_rows}: set at least {least}"
            )
        return self.buffer_bytes // (2 * row_bytes)

    def _room(self, rows: int) -> PlacedRows:
        return PlacedRows.room_for(rows, self._row_bytes, self.dtype)

    def _pieces(self, blocks: Sequence[tuple[int, int]]) -> list[_Piece]:
        """Row ranges over all shards as ranges inside single ones."""
        pieces = []
        for start, stop in blocks:
            shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
            while start < stop:
                base, end = int(self._offsets[shard]), int(self._offsets[shard + 1])
                if start < end:
                    pieces.append(_Piece(shard, start - base, min(stop, end) - base))
                start, shard = max(start, min(stop, end)), shard + 1
        return pieces

    def _fill(
        self,
        rows: PlacedRows,
        pieces: Sequence[_Piece],
        shuffled: tuple[BlockShuffle, int, int] | None = None,
        stopped: threading.Event | None = None,
    ) -> None:
        """Copy `pieces` into `rows`: those that count in the stored or the shuffled order, the others behind them."""
        keep = np.concatenate([self._kept(piece) for piece in pieces])
        rows.count = int(keep.sum())
        places = np.empty(len(keep), np.int64)
        places[~keep] = np.arange(rows.count, len(keep))
        kept = np.arange(rows.count)
        if shuffled is not None:
            shuffle, epoch, group = shuffled
            order = shuffle.rows(epoch, group, rows.count)
            kept[order] = np.arange(rows.count)
        places[keep] = kept
        start = 0
        for number, piece in enumerate(pieces):
            if stopped is not None and stopped.is_set():
                return
            if shuffled is not None and number % _BLOCKS_AHEAD == 0:
                self._read_ahead(pieces[number + _BLOCKS_AHEAD : number + 2 * _BLOCKS_AHEAD])
            stop = start + piece.high - piece.low
            if shuffled is None or self.num_ranks == 1:
                self._copy(rows, piece, places[start:stop])
            else:
                self._copy(rows, piece, self._own_places(places[start:stop], rows.count // self.batch_tokens))
            start = stop

    def _kept(self, piece: _Piece) -> NDArray[np.bool_]:
        """Which rows of a piece count."""
        keep = np.arange(piece.low, piece.high) % self.first.context_tokens >= self.first_position
        for name, reader in self.readers.items():
            keep &= reader.norms(piece.shard)[piece.low : piece.high] <= self.norm_limits[name]
        return keep

    def _read_ahead(self, pieces: Sequence[_Piece]) -> None:
        for piece in pieces:
            for reader in self.readers.values():
                reader.will_need(piece.shard, piece.low, piece.high)

    def _copy(self, rows: PlacedRows, piece: _Piece, places: NDArray[np.int64]) -> None:
        """Put the rows of a piece at `places`, but for those whose place is below 0."""
        shard, low, high = piece.shard, piece.low, piece.high
        chosen: slice | NDArray[np.intp] = slice(None)  # all of them: views, nothing is gathered
        if places.min(initial=0) < 0:
            chosen = np.flatnonzero(places >= 0)
            places = places[chosen]
        column = 0
        for reader in self.readers.values():
            rows.write(places, column, reader.rows(shard, low, high)[chosen])
            column += reader.d_in * self.dtype.itemsize
        numbers = np.arange(low, high, dtype=np.int32)[chosen]
        windows, positions = np.divmod(numbers, self.first.context_tokens)
        rows.write_origins(
            places,
            token_ids=self.first.token_ids(shard)[low:high][chosen],
            document_ids=self.first.document_ids(shard)[low:high][chosen],
            window_ids=self.first.window_ids(shard)[windows],
            positions=positions,
        )


def window_column(reader: ShardReader, name: str) -> np.ndarray:
    """A column of all shards by window, [W, T]: "token_ids", "document_ids" or "norms"."""
    parts = [getattr(reader, name)(shard) for shard in range(len(reader))]
    return np.concatenate(parts).reshape(-1, reader.context_tokens)
