"""Rows of activations in memory with what each was read on, and the order in which they are handed out."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from saeql.sae.stream import ActivationBatch, Cursor

#: Bytes of a row beside its activations: its origin, and its place in the order (six times in two groups while one is
#: made).
_EXTRA_ROW_BYTES = 16 + 24

#: What a row was read on, beside its activations: one item, so that it is moved at once.
_ORIGIN = np.dtype([("token_ids", "<i4"), ("document_ids", "<i4"), ("window_ids", "<i4"), ("positions", "<i4")])


def buffered_row_bytes(acts_bytes: int) -> int:
    """Memory of one buffered row, given that of its activations."""
    return acts_bytes + _EXTRA_ROW_BYTES


@dataclass
class RowBuffer:
    """Rows in memory in stored order, and the order in which those that count are handed out."""

    acts: NDArray[np.uint8]  # [rows, bytes]
    origins: NDArray[np.void]  # [rows] of _ORIGIN
    dtype: torch.dtype
    order: NDArray[np.int64]  # [kept rows]

    @classmethod
    def room_for(cls, rows: int, row_bytes: int, dtype: torch.dtype) -> "RowBuffer":
        """A buffer of `rows` rows, none of which counts yet."""
        # numpy asks for huge pages, torch does not: gathering rows is mostly address translation without them
        return cls(np.empty((rows, row_bytes), np.uint8), np.empty(rows, _ORIGIN), dtype, np.empty(0, np.int64))

    def batch(self, start: int, stop: int, cursor: Cursor, device: torch.device) -> ActivationBatch:
        """Copies of rows `start` to `stop - 1` of the order; the activations on `device`."""
        chosen = self.order[start:stop]
        to_gpu = device.type == "cuda"  # from pinned memory, so that nobody waits for the copy
        acts = torch.empty((len(chosen), self.acts.shape[1]), dtype=torch.uint8, pin_memory=to_gpu)
        torch.index_select(torch.from_numpy(self.acts), 0, torch.from_numpy(chosen), out=acts)
        origins = self.origins[chosen]
        columns = {name: torch.from_numpy(origins[name].copy()) for name in ("token_ids", "document_ids", "window_ids")}
        positions = torch.from_numpy(origins["positions"].astype(np.int16))
        on_device = acts.view(self.dtype).to(device, non_blocking=to_gpu)
        return ActivationBatch(on_device, **columns, positions=positions, cursor=cursor)
