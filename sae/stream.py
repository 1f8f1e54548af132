"""Activation batches, where they come from, and the seeded shuffle that mixes them.

    ActivationSource.batches(cursor)  ->  ActivationBatch, ActivationBatch, ...

The cursor rides on the batch: it names where to go on AFTER that batch, which stays right under prefetch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

CURSOR_VERSION = 1


@dataclass(frozen=True)
class Cursor:
    """Position in a stream: `offset` rows of `group` in `epoch` have been handed out.

    `place` is what else the source needs to find that group again, as plain data; None where the numbers suffice.
    """

    epoch: int = 0
    group: int = 0
    offset: int = 0
    place: Mapping[str, Any] | None = field(default=None, hash=False)

    def state(self) -> dict[str, Any]:
        """Plain form for a checkpoint."""
        numbers = {"version": CURSOR_VERSION, "epoch": self.epoch, "group": self.group, "offset": self.offset}
        return numbers if self.place is None else {**numbers, "place": dict(self.place)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Cursor":
        """Inverse of `state`. Raises ValueError on another version."""
        if state.get("version") != CURSOR_VERSION:
            raise ValueError(f"stream cursor has version {state.get('version')}, this saeql reads {CURSOR_VERSION}")
        return cls(state["epoch"], state["group"], state["offset"], state.get("place"))


@dataclass(frozen=True)
class ActivationBatch:
    """Rows of activations with what each of them was read on."""

    acts: torch.Tensor  # [N, columns], float32 or bfloat16: the hook points of the stream side by side
    token_ids: torch.Tensor  # [N], int32
    document_ids: torch.Tensor  # [N], int32
    window_ids: torch.Tensor  # [N], int32
    positions: torch.Tensor  # [N], int16, position in the window
    cursor: Cursor


class ActivationSource(Protocol):
    """A stream of activation batches, endless for training or one pass for indexing."""

    @property
    def widths(self) -> dict[str, int]:
        """Columns of every hook point, in their order."""
        ...

    def batches(self, cursor: Cursor | None = None) -> Iterator[ActivationBatch]:
        """Batches from `cursor` (or the start) on."""
        ...


class BlockShuffle:
    """Order in which rows are visited: blocks shuffled over the whole set, then rows inside a group of blocks.

    A pure function of (seed, epoch, group), so that a cursor of three numbers resumes it exactly. Reading whole blocks
    keeps disk reads sequential where single rows would be a hundred times slower; a group of many blocks in memory
    mixes rows of many documents.
    """

    def __init__(self, num_rows: int, block_rows: int, group_rows: int, seed: int):
        if num_rows < 1:
            raise ValueError("there are no rows to shuffle")
        self.num_rows, self.block_rows, self.seed = num_rows, block_rows, seed
        self.num_blocks = -(-num_rows // block_rows)
        self.num_groups = -(-self.num_blocks // max(1, group_rows // block_rows))
        #: Of the largest group. Groups differ by a block at most: a short last one would mix fewer documents.
        self.blocks_per_group = -(-self.num_blocks // self.num_groups)

    def blocks(self, epoch: int, group: int) -> list[tuple[int, int]]:
        """(start, stop) rows of the blocks of a group, in the order in which they are read."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_blocks)
        first, last = (g * self.num_blocks // self.num_groups for g in (group, group + 1))
        chosen = order[first:last]
        return [(int(b) * self.block_rows, min((int(b) + 1) * self.block_rows, self.num_rows)) for b in chosen]

    def rows(self, epoch: int, group: int, num_rows: int) -> np.ndarray:
        """Permutation [num_rows] of the rows of a group once they are in memory."""
        return shuffled_rows(self.seed, epoch, group, num_rows)


def shuffled_rows(seed: int, epoch: int, group: int, num_rows: int) -> np.ndarray:
    """Permutation [num_rows] of the rows of one group of a stream."""
    return np.random.default_rng([seed, epoch, group, 1]).permutation(num_rows)
