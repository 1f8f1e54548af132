"""Adapts what the store reads (shards) to what training and indexing consume (ActivationSource).

Shuffled reading holds two groups of blocks in memory: the rows of a batch are gathered out of one while a thread copies
the other from the mapped files. Both groups and what is needed to fill them stay within `buffer_bytes`.
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

from .row_buffer import RowBuffer, buffered_row_bytes

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

    Of `num_ranks` processes with the same arguments each hands out its `rank`'s part of every shuffled batch: together
    the rows, in the order, of one process alone. So a cursor is good for any number of ranks.
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
        self._spare: list[
            RowBuffer
        ] = []  # of the last pass, for the next: memory that is new costs a page fault a page
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
        return self._in_order() if self.seed is None else self._shuffled(cursor or Cursor())

    def _in_order(self) -> Iterator[ActivationBatch]:
        for start in range(0, self.num_rows, self.batch_tokens):
            stop = min(start + self.batch_tokens, self.num_rows)
            rows = self._room(stop - start)
            self._fill(rows, self._pieces([(start, stop)]))
            if len(rows.order):
                yield rows.batch(0, len(rows.order), Cursor(), self.device)

    def _shuffled(self, cursor: Cursor) -> Iterator[ActivationBatch]:
        assert self.seed is not None
        shuffle = BlockShuffle(self.num_rows, self.block_rows, self._group_rows(), self.seed)
        most = min(self.num_rows, shuffle.blocks_per_group * self.block_rows)
        spare, self._spare = self._spare, []
        current, other = spare or (self._room(most), self._room(most))
        epoch, group, offset = cursor.epoch, cursor.group, cursor.offset
        num_empty = 0  # groups in a row that held less than a batch
        stopped = threading.Event()

        def fill(rows: RowBuffer, epoch: int, group: int) -> None:
            self._fill(rows, self._pieces(shuffle.blocks(epoch, group)), (shuffle, epoch, group), stopped)

        try:
            with ThreadPoolExecutor(1, "shard-reader") as reading:
                filled = reading.submit(fill, current, epoch, group)
                try:
                    while True:
                        filled.result()
                        following = (epoch, group + 1) if group + 1 < shuffle.num_groups else (epoch + 1, 0)
                        filled = reading.submit(fill, other, *following)
                        # the last, incomplete batch of a group is left out of this epoch; another shuffle picks others
                        while offset + self.batch_tokens <= len(current.order):
                            start, offset = offset, offset + self.batch_tokens
                            own = range(start, offset)[self._own_part()]
                            yield current.batch(own.start, own.stop, Cursor(epoch, group, offset), self.device)
                        num_empty = 0 if offset else num_empty + 1
                        if num_empty > shuffle.num_groups:
                            raise ValueError(
                                f"{len(current.order)} rows are fewer than one batch of {self.batch_tokens}; "
                                "lower batch_tokens"
                            )
                        (epoch, group), offset = following, 0
                        current, other = other, current
                finally:
                    stopped.set()
        finally:  # the thread has ended
            self._spare = [current, other]

    def _own_part(self) -> slice:
        """This rank's rows of a batch."""
        cuts = [self.batch_tokens * rank // self.num_ranks for rank in (self.rank, self.rank + 1)]
        return slice(*cuts)

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

    def _room(self, rows: int) -> RowBuffer:
        return RowBuffer.room_for(rows, self._row_bytes, self.dtype)

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
        rows: RowBuffer,
        pieces: Sequence[_Piece],
        shuffled: tuple[BlockShuffle, int, int] | None = None,
        stopped: threading.Event | None = None,
    ) -> None:
        """Copy `pieces` into `rows`; the order of those that count is the stored or the shuffled one."""
        start, kept = 0, []
        for number, piece in enumerate(pieces):
            if stopped is not None and stopped.is_set():
                return
            if shuffled is not None and number % _BLOCKS_AHEAD == 0:
                self._read_ahead(pieces[number + _BLOCKS_AHEAD : number + 2 * _BLOCKS_AHEAD])
            self._copy(rows, piece, start)
            kept.append(start + self._kept(piece))
            start += piece.high - piece.low
        rows.order = np.concatenate(kept)
        if shuffled is not None:
            shuffle, epoch, group = shuffled
            rows.order = rows.order[shuffle.rows(epoch, group, len(rows.order))]

    def _kept(self, piece: _Piece) -> NDArray[np.int64]:
        """Rows of a piece that count, from its first."""
        keep = np.arange(piece.low, piece.high) % self.first.context_tokens >= self.first_position
        for name, reader in self.readers.items():
            keep &= reader.norms(piece.shard)[piece.low : piece.high] <= self.norm_limits[name]
        return np.flatnonzero(keep)

    def _read_ahead(self, pieces: Sequence[_Piece]) -> None:
        for piece in pieces:
            for reader in self.readers.values():
                reader.will_need(piece.shard, piece.low, piece.high)

    def _copy(self, rows: RowBuffer, piece: _Piece, start: int) -> None:
        shard, low, high = piece.shard, piece.low, piece.high
        stop, column = start + high - low, 0
        for reader in self.readers.values():
            width = reader.d_in * self.dtype.itemsize
            rows.acts[start:stop, column : column + width] = reader.rows(shard, low, high).view(np.uint8)
            column += width
        origins, row = rows.origins[start:stop], np.arange(low, high)
        origins["token_ids"] = self.first.token_ids(shard)[low:high]
        origins["document_ids"] = self.first.document_ids(shard)[low:high]
        origins["window_ids"] = self.first.window_ids(shard)[row // self.first.context_tokens]
        origins["positions"] = row % self.first.context_tokens


def window_column(reader: ShardReader, name: str) -> np.ndarray:
    """A column of all shards by window, [W, T]: "token_ids", "document_ids" or "norms"."""
    parts = [getattr(reader, name)(shard) for shard in range(len(reader))]
    return np.concatenate(parts).reshape(-1, reader.context_tokens)
