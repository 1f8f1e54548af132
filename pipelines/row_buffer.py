"""Rows of activations in memory with what each was read on, and the order in which they are handed out."""

import weakref
from dataclasses import dataclass, field
from typing import Any

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


def _columns(origins: NDArray[np.void]) -> dict[str, torch.Tensor]:
    """Copies of what rows were read on, as a batch has it."""
    names = ("token_ids", "document_ids", "window_ids")
    positions = torch.from_numpy(origins["positions"].astype(np.int16))
    return {**{name: torch.from_numpy(origins[name].copy()) for name in names}, "positions": positions}


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
        on_device = acts.view(self.dtype).to(device, non_blocking=to_gpu)
        return ActivationBatch(on_device, **_columns(self.origins[chosen]), cursor=cursor)


@dataclass
class PlacedRows:
    """Rows in memory that stand where they are handed out: each was written to its place, and a batch is a view.

    Of the group `count` rows count; where several ranks read it each has its own of them here. Memory with a view that
    somebody still holds must not be filled again.
    """

    acts: NDArray[np.uint8]  # [rows, bytes]
    origins: NDArray[np.void]  # [rows] of _ORIGIN
    dtype: torch.dtype
    count: int = 0
    _views: list["weakref.ref[NDArray[np.uint8]]"] = field(default_factory=list)

    @classmethod
    def room_for(cls, rows: int, row_bytes: int, dtype: torch.dtype) -> "PlacedRows":
        """Room for `rows` rows."""
        return cls(np.empty((rows, row_bytes), np.uint8), np.empty(rows, _ORIGIN), dtype)  # huge pages, as above

    @property
    def is_held(self) -> bool:
        """Whether somebody holds a batch that is a view."""
        self._views = [view for view in self._views if view() is not None]
        return bool(self._views)

    def write(self, places: NDArray[np.int64], column: int, rows: NDArray[Any]) -> None:
        """Put `rows` [n, d] at `places` [n], from byte `column` of each row on."""
        width = rows.shape[1] * rows.itemsize
        item = np.dtype((np.void, width))  # a row is one item, so that it is moved at once
        self.acts[:, column : column + width].view(item)[places, 0] = rows.view(item)[:, 0]

    def write_origins(self, places: NDArray[np.int64], **columns: NDArray[np.int32]) -> None:
        """Put what rows were read on at `places` [n]."""
        origins = np.empty(len(places), _ORIGIN)
        for name, column in columns.items():
            origins[name] = column
        self.origins[places] = origins

    def batch(
        self, start: int, stop: int, cursor: Cursor, device: torch.device, *, copy: bool = False
    ) -> ActivationBatch:
        """Rows `start` to `stop - 1`, on a CPU a view unless a `copy` is asked for."""
        view = self.acts[start:stop]
        acts = torch.from_numpy(view).view(self.dtype)
        if device.type == "cuda":  # from pinned memory, so that nobody waits for the copy
            acts = acts.pin_memory().to(device, non_blocking=True)
        elif copy:
            acts = acts.clone()
        else:
            self._views.append(weakref.ref(view))
        return ActivationBatch(acts.to(device), **_columns(self.origins[start:stop]), cursor=cursor)
