"""Training rows straight from the model: text -> windows -> forward pass -> a buffer that mixes them -> batches.

The rows, and which of them count, are those that a harvest of the same text would store. They come in groups of whole
windows: a group is in memory, its rows are handed out in shuffled order, and the next group follows the text. On a GPU
the model fills one buffer, in a thread and on a stream of its own, while training empties the other; elsewhere both
would fight for the same cores, so one buffer of twice the size is filled and emptied in turn. Nothing is stored.

The order is a pure function of (seed, epoch, group). A cursor carries the place in the text where its group begins: a
resume computes that group again.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saeql.sae.stream import ActivationBatch, Cursor, shuffled_rows

from .corpus import CorpusConfig, CorpusError
from .forward import ForwardPass, HookRows, stored_dtype
from .harvest_config import HarvestConfig
from .models import LanguageModel
from .reading import one_ahead
from .row_buffer import RowBuffer, buffered_row_bytes
from .train_windows import TrainBatch, TrainWindows

#: Share of rows that a group must be able to lose to massive norms and still hold a batch.
_SPARE_SHARE = 1 / 8


class LiveError(ValueError):
    """Training from the live model cannot go on; the message names the setting or the value."""


def group_sizes(
    config: HarvestConfig,
    row_bytes: int,
    batch_tokens: int,
    buffer_bytes: int,
    *,
    num_groups: int,
    wanted_rows: int = 0,
) -> tuple[int, int]:
    """Windows of the smallest group and of a full one, in whole forward passes, with `num_groups` in memory at once.

    Raises LiveError where there is no room for a batch.
    """
    tokens, at_once = config.context_tokens, config.batch_windows
    window_bytes = num_groups * tokens * buffered_row_bytes(row_bytes)
    least = -(-batch_tokens * (1 + _SPARE_SHARE) // (tokens - 1))
    least = int(-(-least // at_once) * at_once)
    most = buffer_bytes // window_bytes // at_once * at_once
    if most < least:
        raise LiveError(
            f"train.shuffle_buffer_bytes = {buffer_bytes} has no room for a batch of {batch_tokens} rows in "
            f"{'a group' if num_groups == 1 else f'{num_groups} groups'} of whole forward passes "
            f"(harvest.batch_windows): set at least {least * window_bytes}"
        )
    if not wanted_rows:
        return least, most
    lost = 1.002 * wanted_rows / most / (tokens - 1) + 1  # groups, each of which leaves out less than a batch
    wanted = (1.002 * wanted_rows + lost * batch_tokens) / (tokens - 1)
    equal = wanted / -(-wanted // most)
    return least, min(most, max(least, int(-(-equal // at_once) * at_once)))


@dataclass
class _Group:
    """Rows of windows that follow each other in the text."""

    epoch: int
    number: int
    rows: RowBuffer
    place: dict[str, Any]  # what it takes to compute it again
    following: Cursor  # the start of the next group


class LiveSource:
    """Kept rows of the train split at several hook points, endless, computed by the model as they are needed.

    Kept are positions after the first whose norm exceeds `norm_limits` nowhere. `buffer_bytes` bounds the rows in
    memory; the model and its forward pass come on top. `wanted_rows` is how many rows will be taken in all: groups are
    then of one size, so that the last of them is not computed for nothing. `overlap` fills one buffer in a thread
    while the other is emptied; unset does so on a GPU. `part` of `parts` reads its own rows of every source of text,
    for processes that train together. `should_stop` is asked after every forward pass; the stream then ends.

    To be used inside its `with` block. One stream at a time: `batches` ends the one before.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        widths: Mapping[str, int],
        corpus: CorpusConfig,
        config: HarvestConfig,
        *,
        batch_tokens: int,
        norm_limits: Mapping[str, float],
        seed: int,
        buffer_bytes: int = 1_000_000_000,
        wanted_rows: int = 0,
        device: torch.device | None = None,
        overlap: bool | None = None,
        part: int = 0,
        parts: int = 1,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.part, self.parts, self.should_stop = part, parts, should_stop
        self.lm, self.corpus, self.config = language_model, corpus, config
        self.batch_tokens, self.norm_limits, self.seed = batch_tokens, dict(norm_limits), seed
        self.device = device or language_model.device
        self.overlap = language_model.device.type == "cuda" if overlap is None else overlap
        self._widths = dict(widths)
        self._dtype = getattr(torch, stored_dtype(language_model))
        self._row_bytes = sum(self._widths.values()) * self._dtype.itemsize
        self.least_windows, self.group_windows = group_sizes(
            config, self._row_bytes, batch_tokens, buffer_bytes, num_groups=1 + self.overlap, wanted_rows=wanted_rows
        )
        self.forward = ForwardPass(language_model, list(self._widths), stream_of_its_own=self.overlap)
        self._buffers: list[RowBuffer] = []
        self._current: _Group | None = None
        self._ahead: Future[_Group | None] | None = None
        self._stopped = threading.Event()
        self._stream = 0
        self._start(0)

    def __enter__(self) -> "LiveSource":
        self.forward.__enter__()
        rows = self.group_windows * self.config.context_tokens
        self._buffers = [RowBuffer.room_for(rows, self._row_bytes, self._dtype) for _ in range(1 + self.overlap)]
        self._thread = ThreadPoolExecutor(1, "live-model") if self.overlap else None
        return self

    def __exit__(self, *exception: object) -> None:
        self._forget()
        if self._thread is not None:
            self._thread.shutdown()
        self.forward.__exit__(*exception)
        self._buffers = []

    @property
    def widths(self) -> dict[str, int]:
        """Columns of every hook point, in their order."""
        return self._widths

    def batches(self, cursor: Cursor | None = None) -> Iterator[ActivationBatch]:
        """Batches from `cursor` on, endless. A cursor of another part begins the next epoch.

        Raises LiveError where the text has no batch in it or is another one than the cursor was made on, ModelError
        where memory does not suffice for the forward pass.
        """
        cursor = cursor or Cursor()
        self._stream = stream = self._stream + 1
        if cursor.place and cursor.place["part"] != [self.part, self.parts]:
            cursor = Cursor(cursor.epoch + 1)  # others shared the text out before
        group, offset = self._seek(cursor), cursor.offset
        from_start, num_batches = offset == 0 and group is not None and group.number == 0, 0
        while group is not None:
            self._fill_ahead()
            while offset + self.batch_tokens <= len(group.rows.order):
                start, offset, num_batches = offset, offset + self.batch_tokens, num_batches + 1
                yield group.rows.batch(start, offset, self._after(group, offset), self.device)
                assert stream == self._stream, "another stream of this source was started"
            epoch, group, offset = group.epoch, self._advance(), 0
            if group is not None and group.epoch > epoch:
                if from_start and num_batches == 0:
                    raise LiveError(
                        f"the train split of {self.corpus.title} has fewer rows than one batch of {self.batch_tokens}; "
                        "lower train.batch_tokens or give more text"
                    )
                from_start, num_batches = True, 0

    def _after(self, group: _Group, offset: int) -> Cursor:
        """Where to go on after `offset` rows of a group; what is left of it beyond its last batch is not handed out."""
        is_over = offset + self.batch_tokens > len(group.rows.order)
        return group.following if is_over else Cursor(group.epoch, group.number, offset, group.place)

    # --- groups --------------------------------------------------------------------------------------------------

    def _num_windows(self, epoch: int, number: int) -> int:
        """Windows of a group. The first of later epochs is smaller by chance: its rows meet others than before."""
        if epoch == 0 or number > 0:
            return self.group_windows
        at_once = self.config.batch_windows
        random = np.random.default_rng([self.seed, epoch, 0, 2])
        return at_once * int(random.integers(self.least_windows // at_once, self.group_windows // at_once + 1))

    def _seek(self, cursor: Cursor) -> _Group | None:
        """The group of a cursor: the one in memory, or computed again; None where it was given up."""
        if self._current is not None and (self._current.epoch, self._current.number) == (cursor.epoch, cursor.group):
            return self._current
        self._forget()
        if cursor.place is None and (cursor.group or cursor.offset):
            raise LiveError(f"the cursor {cursor.state()} does not come from a live model")
        self._start(cursor.epoch, cursor.group, cursor.place)
        self._current = group = self._fill(self._free())
        expected = (cursor.place or {}).get("tokens_sha256")
        if group is not None and cursor.place and expected not in (None, group.place["tokens_sha256"]):
            first = cursor.place["start"]["num_taken"]
            raise LiveError(
                f"the text of {self.corpus.title} changed since the checkpoint: from window {first} on its tokens have "
                f"hash {group.place['tokens_sha256'][:16]}, not {expected[:16]}; put the text back, or start anew"
            )
        return group

    def _start(self, epoch: int, number: int = 0, place: Mapping[str, Any] | None = None) -> None:
        """The next group to be filled is this one."""
        self._next = (epoch, number)
        state = place["start"] if place else None
        self._windows = TrainWindows(self.lm, self.corpus, self.config, state, part=self.part, parts=self.parts)
        if place:
            self.forward.max_windows = place["max_windows"]

    def _advance(self) -> _Group | None:
        """The group that follows, in place of the one in memory; None where it was given up."""
        if self._ahead is not None:
            self._current, self._ahead = self._ahead.result(), None
        else:
            self._current = None
            self._current = self._fill(self._free())
        return self._current

    def _fill_ahead(self) -> None:
        if self._thread is not None and self._ahead is None:
            self._ahead = self._thread.submit(self._fill, self._free())

    def _free(self) -> RowBuffer:
        return next(rows for rows in self._buffers if self._current is None or rows is not self._current.rows)

    def _forget(self) -> None:
        """Drop what is in memory; a group that is being filled is given up."""
        ahead, self._ahead, self._current = self._ahead, None, None
        if ahead is not None:
            self._stopped.set()
            with suppress(Exception):  # what it may have failed of concerns nobody any more
                ahead.result()
            self._stopped.clear()

    def _fill(self, rows: RowBuffer) -> _Group | None:
        """The next group of the text that has windows; None where it was given up. Runs in the thread, if any."""
        while True:
            (epoch, number), start = self._next, self._windows.state()
            place = {"start": start, "max_windows": self.forward.max_windows, "part": [self.part, self.parts]}
            digest, stop, kept = hashlib.sha256(), 0, []
            wanted = self._num_windows(epoch, number)
            taken = self._taken(wanted)
            if self.overlap:
                taken = one_ahead(taken)  # ends with the group: what was read is what was taken
            for windows, found in self.forward.over(taken, lambda batch: batch.token_ids):
                if self._stopped.is_set() or self.should_stop():
                    return None
                digest.update(windows.token_ids.tobytes())
                kept.append(stop + self._put(rows, stop, windows, found))
                stop += windows.token_ids.size
            ended = stop < wanted * self.config.context_tokens
            following = Cursor(epoch + 1)
            if ended:
                self._start(epoch + 1)
            else:
                after = {**place, "start": self._windows.state(), "max_windows": self.forward.max_windows}
                self._next, following = (epoch, number + 1), Cursor(epoch, number + 1, 0, after)
            if stop:
                rows.order = np.concatenate(kept)
                rows.order = rows.order[shuffled_rows(self.seed, epoch, number, len(rows.order))]
                return _Group(epoch, number, rows, {**place, "tokens_sha256": digest.hexdigest()}, following)
            if number == 0:
                raise CorpusError(
                    f"the corpus {self.corpus.title} is too small: no window of {self.config.context_tokens} tokens "
                    "for the split 'train'; add text or lower harvest.context_tokens"
                )

    def _taken(self, count: int) -> Iterator[TrainBatch]:
        """The next `count` windows of the epoch in forward passes; fewer where it ends."""
        while count > 0 and (batch := self._windows.take(min(count, self.config.batch_windows))) is not None:
            count -= len(batch.token_ids)
            yield batch

    def _put(
        self, rows: RowBuffer, start: int, windows: TrainBatch, found: Mapping[str, HookRows]
    ) -> NDArray[np.int64]:
        """Copy windows into the buffer from row `start` on. Returns which of their rows count, from their first."""
        (count, tokens), column = windows.token_ids.shape, 0
        stop, place = start + count * tokens, np.arange(count * tokens)
        keep = place % tokens > 0
        for name, width in self._widths.items():
            width *= self._dtype.itemsize
            values = np.ascontiguousarray(found[name].values).reshape(count * tokens, -1)
            rows.acts[start:stop, column : column + width] = values.view(np.uint8)
            keep &= found[name].norms.ravel() <= self.norm_limits[name]
            column += width
        origins = rows.origins[start:stop]
        origins["token_ids"], origins["document_ids"] = windows.token_ids.ravel(), windows.document_ids.ravel()
        origins["window_ids"], origins["positions"] = windows.first + place // tokens, place % tokens
        return np.flatnonzero(keep)
