"""Adapts what the store reads (shards) to what training and indexing consume (ActivationSource)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from saeql.sae.stream import ActivationBatch, BlockShuffle, Cursor
from saeql.store.shards import ShardError, ShardReader


class ShardSource:
    """Rows of one split at one or several hook points, side by side in `acts`: kept rows only.

    Kept are positions after the first (`first_positions` keeps those too) whose norm exceeds `norm_limits` nowhere.
    `shuffle_seed` None gives one pass in stored order; a seed gives an endless stream, shuffled by blocks and then by
    rows inside the `buffer_bytes` that are in memory at once. Everything else is mapped from the files.
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
    ):
        self.readers = {name: ShardReader(folder) for name, folder in folders.items()}
        self.first = next(iter(self.readers.values()))
        for name, reader in self.readers.items():
            if [r.rows for r in reader.records] != [r.rows for r in self.first.records]:
                raise ShardError(
                    f"{reader.folder}: the shards of {name} do not line up with those of the other hook points"
                )
        self.batch_tokens, self.norm_limits, self.seed = batch_tokens, norm_limits, shuffle_seed
        self.first_position = 0 if first_positions else 1
        self.block_rows, self.buffer_bytes = block_rows, buffer_bytes
        self.device = device or torch.device("cpu")
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
        """Batches from `cursor` on: endless where shuffled, else one pass."""
        return self._in_order() if self.seed is None else self._shuffled(cursor or Cursor())

    def _in_order(self) -> Iterator[ActivationBatch]:
        for start in range(0, self.num_rows, self.batch_tokens):
            stop = min(start + self.batch_tokens, self.num_rows)
            rows = self._read([(start, stop)])
            if len(rows.acts):
                yield rows

    def _shuffled(self, cursor: Cursor) -> Iterator[ActivationBatch]:
        assert self.seed is not None
        group_rows = max(self.batch_tokens, self.buffer_bytes // buffered_row_bytes(self._acts_bytes))
        shuffle = BlockShuffle(self.num_rows, self.block_rows, group_rows, self.seed)
        epoch, group, offset = cursor.epoch, cursor.group, cursor.offset
        while True:
            rows = self._read(shuffle.blocks(epoch, group))
            order = torch.from_numpy(shuffle.rows(epoch, group, len(rows.acts)))
            # the last, incomplete batch of a group is left out of this epoch; another shuffle picks others next time
            while offset + self.batch_tokens <= len(order):
                chosen = order[offset : offset + self.batch_tokens]
                offset += self.batch_tokens
                yield _take(rows, chosen, Cursor(epoch, group, offset), self.device)
            if offset == 0:
                raise ValueError(
                    f"{len(order)} rows are fewer than one batch of {self.batch_tokens}; lower batch_tokens"
                )
            del rows, order  # before the next group is read: one of them is in memory, never two
            offset, group = 0, group + 1
            if group == shuffle.num_groups:
                epoch, group = epoch + 1, 0

    @property
    def _acts_bytes(self) -> int:
        return sum(r.d_in * (2 if r.dtype == "bfloat16" else 4) for r in self.readers.values())

    def _read(self, blocks: list[tuple[int, int]]) -> ActivationBatch:
        """Kept rows of the given row ranges, copied from the mapped files to where they stay."""
        pieces = [piece for start, stop in blocks for piece in self._pieces(start, stop)]
        count = sum(len(piece.rows) for piece in pieces)
        dtypes = {torch.bfloat16 if r.dtype == "bfloat16" else torch.float32 for r in self.readers.values()}
        acts = torch.empty(count, sum(self.widths.values()), dtype=max(dtypes, key=lambda d: d.itemsize))
        fields = {
            "token_ids": np.empty(count, np.int32),
            "document_ids": np.empty(count, np.int32),
            "window_ids": np.empty(count, np.int32),
            "positions": np.empty(count, np.int16),
        }
        at = 0
        for piece in pieces:
            shard, to, column = piece.shard, slice(at, at + len(piece.rows)), 0
            for reader in self.readers.values():
                # a slice first: numpy copies all of a mapped array whose offset in the file is not aligned
                near = reader.rows(shard, piece.low, piece.high)[piece.rows - piece.low]
                acts[to, column : column + reader.d_in] = _acts(near)
                column += reader.d_in
            for name in ("token_ids", "document_ids"):
                fields[name][to] = getattr(self.first, name)(shard)[piece.low : piece.high][piece.rows - piece.low]
            fields["window_ids"][to] = self.first.window_ids(shard)[piece.rows // self.first.context_tokens]
            fields["positions"][to] = piece.rows % self.first.context_tokens
            at = to.stop
        columns = {name: torch.from_numpy(values) for name, values in fields.items()}
        return ActivationBatch(acts.to(self.device), **columns, cursor=Cursor())

    def _pieces(self, start: int, stop: int) -> Iterator["_Piece"]:
        """Kept rows of one range over the stored rows, one piece for every shard that it touches."""
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        for shard in range(first, len(self.first)):
            base = int(self._offsets[shard])
            low, high = max(start - base, 0), min(stop - base, self.first.records[shard].rows)
            if low >= high:
                return
            kept = np.arange(low, high) % self.first.context_tokens >= self.first_position
            for name, reader in self.readers.items():
                kept &= reader.norms(shard)[low:high] <= self.norm_limits[name]
            yield _Piece(shard, low, high, low + np.flatnonzero(kept))


@dataclass(frozen=True)
class _Piece:
    """Kept rows of a shard, all of them from `low` to `high - 1`."""

    shard: int
    low: int
    high: int
    rows: np.ndarray


def buffered_row_bytes(acts_bytes: int) -> int:
    """Memory of one buffered row: its activations, what it was read on, and its places (int64, twice)."""
    return acts_bytes + 3 * 4 + 2 + 2 * 8


def _acts(values: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def window_column(reader: ShardReader, name: str) -> np.ndarray:
    """A column of all shards by window, [W, T]: "token_ids", "document_ids" or "norms"."""
    parts = [getattr(reader, name)(shard) for shard in range(len(reader))]
    return np.concatenate(parts).reshape(-1, reader.context_tokens)


def _take(rows: ActivationBatch, chosen: torch.Tensor, cursor: Cursor, device: torch.device) -> ActivationBatch:
    return ActivationBatch(
        acts=rows.acts[chosen.to(rows.acts.device)].to(device),
        token_ids=rows.token_ids[chosen],
        document_ids=rows.document_ids[chosen],
        window_ids=rows.window_ids[chosen],
        positions=rows.positions[chosen],
        cursor=cursor,
    )
