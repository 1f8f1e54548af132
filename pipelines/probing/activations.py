"""Activations of a text's rows: read from the run's shards, computed by a forward pass, or the raw token embeddings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from saeql.store.shards import ShardReader

from ..forward import ForwardPass
from ..harvest import HarvestInfo, shard_folder
from ..models import LanguageModel
from .tasks import TaskError
from .text import PADDING, ProbedText, TextSplit, without

#: Windows of one forward pass.
BATCH_WINDOWS = 16


class RowSource(Protocol):
    """Where vectors of rows come from."""

    name: str

    def acts(self, split: str, rows: np.ndarray) -> np.ndarray:
        """[n, d] float32 of rows [n] of a split."""
        ...


class StoredRows:
    """Harvested activations at one or several hook points side by side, memory-mapped."""

    def __init__(self, activations: Path, info: HarvestInfo, hook_points: Sequence[str], text: ProbedText):
        """Raises ShardError where they are missing or damaged."""
        self.name = " + ".join(hook_points)
        self._readers = {
            split: [ShardReader(shard_folder(activations, name, split)) for name in hook_points]
            for split in text.splits
        }
        self._limits = [info.norm_limit(name) for name in hook_points]
        self._windows = {split: self._stored_windows(split, part) for split, part in text.splits.items()}

    def _stored_windows(self, split: str, part: TextSplit) -> np.ndarray:
        """[W] number among the stored windows of each window of the text."""
        reader = self._readers[split][0]
        stored = np.concatenate([reader.window_ids(shard) for shard in range(len(reader))])
        order = np.argsort(stored, kind="stable")
        at = np.minimum(np.searchsorted(stored[order], part.window_ids), len(stored) - 1)
        if (stored[order[at]] != part.window_ids).any():
            raise TaskError(f"{reader.folder} lacks windows that the evidence has: harvest and index again")
        return order[at]

    def massive(self, split: str, part: TextSplit) -> np.ndarray:
        """[W * T] bool: rows whose norm is massive, which nothing was trained on."""
        out = np.zeros(part.token_ids.shape, bool)
        for reader, limit in zip(self._readers[split], self._limits, strict=True):
            norms = np.concatenate([reader.norms(shard) for shard in range(len(reader))])
            norms = norms.reshape(-1, reader.context_tokens)[self._windows[split]]
            out |= norms[:, : part.token_ids.shape[1]] > limit
        return out.ravel()

    def acts(self, split: str, rows: np.ndarray) -> np.ndarray:
        readers = self._readers[split]
        width = readers[0].context_tokens
        window, position = np.divmod(rows, width)
        stored = self._windows[split][window] * width + position
        ends = np.cumsum([record.rows for record in readers[0].records])
        shard = np.searchsorted(ends, stored, side="right")
        parts = []
        for reader in readers:
            out = np.empty((len(rows), reader.d_in), np.float32)
            for number in np.unique(shard):
                mine = shard == number
                start = ends[number] - reader.records[number].rows
                out[mine] = as_float(reader.acts(int(number))[stored[mine] - start])
            parts.append(out)
        return np.concatenate(parts, axis=1)


def as_float(values: np.ndarray) -> np.ndarray:
    """Stored activations as float32: uint16 holds the bits of bfloat16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(values, np.float32)


class ModelRows:
    """Activations of a language model on windows of a text, computed once for the rows that will be asked for."""

    def __init__(
        self,
        lm: LanguageModel,
        hook_points: Sequence[str],
        text: ProbedText,
        wanted: Mapping[str, np.ndarray],
        *,
        name: str = "",
    ):
        """`wanted`: split -> rows [n]. Raises HookPointError where the model has no such hook point."""
        self.name = name or " + ".join(hook_points)
        self._rows = {split: np.unique(rows) for split, rows in wanted.items()}
        self._acts = {}
        for split, rows in self._rows.items():
            self._acts[split] = _forward(lm, hook_points, text.splits[split].token_ids, rows)

    def acts(self, split: str, rows: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self._rows[split], rows)
        assert (self._rows[split][at] == rows).all(), "rows that were not asked for when the model was run"
        return self._acts[split][at]


def _forward(lm: LanguageModel, hook_points: Sequence[str], token_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[n, d] activations of rows [n], sorted; windows of one length go through the model together."""
    width = token_ids.shape[1]
    lengths = (token_ids != PADDING).sum(1)
    windows = np.unique(rows // width)
    windows = windows[np.argsort(lengths[windows], kind="stable")]
    if lm.is_causal:  # what stands behind a token changes nothing, so lengths may be mixed
        batches = [windows[n : n + BATCH_WINDOWS] for n in range(0, len(windows), BATCH_WINDOWS)]
    else:
        cuts = np.flatnonzero(np.diff(lengths[windows])) + 1
        same = np.split(windows, cuts)
        batches = [part[n : n + BATCH_WINDOWS] for part in same for n in range(0, len(part), BATCH_WINDOWS)]
    out: np.ndarray | None = None
    with ForwardPass(lm, hook_points) as forward:
        for batch in batches:
            longest = int(lengths[batch].max())
            ids = token_ids[batch, :longest]
            found = forward.run(np.where(ids == PADDING, lm.separator_id, ids).astype(np.int32))
            acts = np.concatenate([as_float(found[name].values) for name in hook_points], axis=-1)
            for window, values in zip(batch, acts, strict=True):
                low, high = np.searchsorted(rows, [window * width, (window + 1) * width])
                if out is None:
                    out = np.empty((len(rows), values.shape[-1]), np.float32)
                out[low:high] = values[rows[low:high] - window * width]
    return np.zeros((0, 1), np.float32) if out is None else out


class TokenEmbeddings:
    """The model's input embedding of each row's own token: what is known before any context."""

    name = "token embeddings"

    def __init__(self, lm: LanguageModel, text: ProbedText):
        self._weight = lm.model.get_input_embeddings().weight.detach().float().cpu().numpy()
        self._ids = {split: part.token_ids.ravel() for split, part in text.splits.items()}

    def acts(self, split: str, rows: np.ndarray) -> np.ndarray:
        return self._weight[self._ids[split][rows]]


def without_massive(text: ProbedText, source: StoredRows) -> ProbedText:
    """The text with rows of massive norm left out of the cases."""
    splits = {split: without(part, source.massive(split, part)) for split, part in text.splits.items()}
    return ProbedText(text.name, text.vocabulary, splits)
