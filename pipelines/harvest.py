"""Harvest: documents -> windows -> activations at all hook points in one pass -> shards, by hook point and split.

Windows of `context_tokens` ids are packed from the documents of one split under the rules of `windows.py`. The
forward pass stops at the deepest hook point. All rows are stored with their norm; which of them count is decided when
they are read: not the first position of a window, and no row whose norm exceeds `massive_norm_multiple` times the
median, which is measured once, on the first training rows, and frozen in `harvest.json`.
"""

import errno
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from saeql.sae.config import ConfigError
from saeql.sae.hooks import capture, resolve
from saeql.store.evidence import Evidence
from saeql.store.records import SPLITS
from saeql.store.shards import ShardReader, ShardWriter

from .atomic import write_whole
from .corpus import CorpusConfig, CorpusError, CorpusReader, Document
from .forward import ForwardPass, stored_dtype
from .models import LanguageModel, ModelIdentity
from .progress import progress
from .sources import ShardSource, window_column
from .windows import WindowPacker, WindowRules

HARVEST_FILE = "harvest.json"
_MEDIAN_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """How text becomes stored activations."""

    context_tokens: int = 128
    """Tokens of one model input."""
    batch_windows: int = 16
    """Windows of one forward pass."""
    windows_per_shard: int = 512
    """Windows of one shard file."""
    max_heldout_document_tokens: int = 2600
    """Tokens taken of one calibration or test document; fewer than of training ones, so that more documents count."""
    max_train_tokens: int | None = None
    """Tokens of the train split that are stored; 0: all. Unset: all, or 1,000,000 (to label from) with train.source = "live"."""  # noqa: E501
    massive_norm_multiple: float = 10.0
    """Rows whose norm exceeds this multiple of the median are left out of training and of statistics."""

    def __post_init__(self) -> None:
        if self.context_tokens < 2:
            raise ConfigError(f"harvest.context_tokens must be at least 2, got {self.context_tokens}")
        for name in ("batch_windows", "windows_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"harvest.{name} must be at least 1, got {getattr(self, name)}")
        if self.max_train_tokens is not None and self.max_train_tokens < 0:
            raise ConfigError(f"harvest.max_train_tokens must be at least 0, got {self.max_train_tokens}")


@dataclass(frozen=True)
class HarvestInfo:
    """What later stages need to know of a harvest; `harvest.json`."""

    identity: ModelIdentity  # hook_point is the first one
    widths: dict[str, int]  # by hook point, in the order of the configuration
    dtype: str
    context_tokens: int
    median_norms: dict[str, float]  # by hook point
    massive_norm_multiple: float
    num_dropped_tail_tokens: int  # of the last, incomplete window of every split (of every document if not packed)
    #: TransformerLens's name and the module's path of every hook point; empty in harvests of older versions
    module_names: dict[str, tuple[str, str]] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)  # rules of the windows; what became of the rows of every source
    num_batch_halvings: int = 0  # times that memory ran out, after which fewer windows were put through at once

    def norm_limit(self, hook_point: str) -> float:
        """Norm above which a row counts as massive at a hook point."""
        return self.median_norms[hook_point] * self.massive_norm_multiple

    @classmethod
    def load(cls, folder: Path) -> "HarvestInfo":
        """Read `harvest.json` of a run's activations folder."""
        data = json.loads((folder / HARVEST_FILE).read_text(encoding="utf-8"))
        return cls(**{**data, "identity": ModelIdentity(**data["identity"])})

    def save(self, folder: Path) -> None:
        """Write `harvest.json`, whole or not at all."""
        write_whole(folder / HARVEST_FILE, json.dumps(asdict(self), indent=2) + "\n")


def open_source(
    activations: Path,
    split: str,
    info: HarvestInfo,
    hook_points: Sequence[str],
    batch_tokens: int,
    device: torch.device | None = None,
    **options: Any,
) -> ShardSource:
    """The kept rows of a split at some of the harvested hook points; `options` are those of ShardSource."""
    folders = {name: shard_folder(activations, name, split) for name in hook_points}
    limits = {name: info.norm_limit(name) for name in hook_points}
    return ShardSource(folders, batch_tokens=batch_tokens, norm_limits=limits, device=device, **options)


@dataclass
class _Window:
    split: str
    token_ids: np.ndarray  # [T]
    document_ids: np.ndarray  # [T]


def shard_folder(activations: Path, hook_point: str, split: str) -> Path:
    """Where the shards of a hook point and split are."""
    return activations / hook_point / split


def harvest(
    language_model: LanguageModel,
    hook_points: Sequence[str],
    corpus: CorpusConfig,
    config: HarvestConfig,
    folder: Path,
    evidence: Evidence,
    *,
    max_train_tokens: int = 0,
) -> HarvestInfo:
    """Fill `folder/<hook point>/<split>/` with shards, and the evidence on documents, windows, vocabulary and rows.

    `max_train_tokens` bounds what is stored of the train split; 0 stores all of it.

    Raises CorpusError where the text is missing or too short for one window of every split, OSError where the disk
    has no room.
    """
    shutil.rmtree(folder, ignore_errors=True)
    widths = probe_widths(language_model, hook_points)
    value_bytes = 2 if stored_dtype(language_model) == "bfloat16" else 4
    wanted = wanted_tokens(corpus, max_train_tokens)
    _require_room(folder, wanted, sum(widths.values()) * value_bytes + 16)
    reading = _Reading(language_model, corpus, config, wanted)
    with ExitStack() as stack:
        writers = {
            (name, split): stack.enter_context(_writer(folder, name, split, language_model, config, width))
            for name, width in widths.items()
            for split in SPLITS
        }
        advance = stack.enter_context(progress("harvest", corpus.max_tokens or None, "tok"))
        forward = stack.enter_context(ForwardPass(language_model, list(widths)))
        for batch in reading.batches():
            _run_batch(forward, batch, reading, writers)
            advance(len(batch) * config.context_tokens)
    reading.require_every_split()
    info = HarvestInfo(
        identity=language_model.identity,
        widths=widths,
        dtype=str(language_model.model.dtype).removeprefix("torch."),
        context_tokens=config.context_tokens,
        median_norms={name: _median_norm(ShardReader(shard_folder(folder, name, "train"))) for name in widths},
        massive_norm_multiple=config.massive_norm_multiple,
        num_dropped_tail_tokens=sum(p.num_pending_tokens + p.num_dropped_tokens for p in reading.packers.values()),
        module_names=module_names(language_model.model, hook_points),
        text={"rules": asdict(reading.rules), "sources": reading.reader.report()},
        num_batch_halvings=forward.num_halvings,
    )
    reading.write_evidence(evidence, folder, info)
    info.save(folder)
    return info


def probe_widths(language_model: LanguageModel, hook_points: Sequence[str]) -> dict[str, int]:
    """Width of the activations at every hook point, read from one short forward pass."""
    ids = torch.full((1, 2), language_model.bos_id, device=language_model.input_device)
    with torch.no_grad(), capture(language_model.model, list(hook_points)) as reader:
        acts = reader.run(ids)
    return {name: acts[name].shape[-1] for name in hook_points}


def module_names(model: Any, hook_points: Sequence[str]) -> dict[str, tuple[str, str]]:
    """TransformerLens's name and the module's path of every hook point."""
    points = [resolve(model, name) for name in hook_points]
    return {point.name: (point.transformer_lens_name, point.module_path) for point in points}


def wanted_tokens(corpus: CorpusConfig, max_train_tokens: int = 0) -> dict[str, float]:
    """Tokens to be stored of every split; infinite where the text decides."""
    wanted = {s: corpus.max_tokens * share if corpus.max_tokens else math.inf
              for s, share in corpus.split_shares().items()}  # fmt: skip
    return {**wanted, "train": min(wanted["train"], max_train_tokens or math.inf)}


def _require_room(folder: Path, wanted: dict[str, float], row_bytes: int) -> None:
    needed = sum(tokens for tokens in wanted.values() if tokens < math.inf) * row_bytes
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"no room for the activations: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "lower corpus.max_tokens or choose another folder", str(folder)
        )  # fmt: skip


def _writer(
    folder: Path, hook_point: str, split: str, lm: LanguageModel, config: HarvestConfig, width: int
) -> ShardWriter:
    return ShardWriter(
        shard_folder(folder, hook_point, split),
        d_in=width,
        context_tokens=config.context_tokens,
        attributes={**asdict(lm.identity.at([hook_point])), "split": split},
        windows_per_shard=config.windows_per_shard,
        dtype=stored_dtype(lm),
    )


def _run_batch(
    forward: ForwardPass,
    batch: list[_Window],
    reading: "_Reading",
    writers: dict[tuple[str, str], ShardWriter],
) -> None:
    token_ids = np.stack([w.token_ids for w in batch])
    captured = forward.run(token_ids)
    first = len(reading.windows)
    window_ids = np.arange(first, first + len(batch), dtype=np.int32)
    chosen = {split: [i for i, w in enumerate(batch) if w.split == split] for split in SPLITS}
    owners = np.stack([w.document_ids for w in batch])
    for name, found in captured.items():
        for split, rows in chosen.items():
            if rows:
                writers[name, split].append(
                    found.values[rows], token_ids[rows], owners[rows], window_ids[rows], found.norms[rows]
                )
    reading.windows += batch


class _Reading:
    """Reads documents into windows and remembers what was read, for the evidence tables."""

    def __init__(self, lm: LanguageModel, corpus: CorpusConfig, config: HarvestConfig, wanted: dict[str, float]):
        self.lm, self.corpus, self.config, self.wanted = lm, corpus, config, wanted
        self.rules = WindowRules.of(corpus, lm)
        self.packers = {s: WindowPacker(config.context_tokens, self.rules) for s in SPLITS}
        self.reader = CorpusReader(corpus, lm.tokenizer, tokenizer_sha256=lm.identity.tokenizer_sha256)
        self.windows: list[_Window] = []
        self.read: list[tuple[Document, int]] = []

    def batches(self) -> Iterator[list[_Window]]:
        """Windows in batches, until every split has its share of `max_tokens` or the text ends."""
        batch: list[_Window] = []
        for window in self._windows():
            batch.append(window)
            if len(batch) == self.config.batch_windows:
                yield batch
                batch = []
        if batch:
            yield batch

    def _windows(self) -> Iterator[_Window]:
        left = dict(self.wanted)
        for document in self.reader:
            split = document.split
            if left[split] <= 0:
                if max(left.values()) <= 0:
                    return
                continue
            ids = self._token_ids(document, None if left[split] == math.inf else int(left[split]))
            if not ids:
                continue
            left[split] -= len(ids)
            # what it says is not needed any more
            self.read.append((replace(document, text="", token_ids=None), len(ids)))
            for token_ids, document_ids in self.packers[split].add(ids, document.document_id):
                yield _Window(split, token_ids, document_ids)

    def _token_ids(self, document: Document, room: int | None) -> list[int]:
        heldout = document.split != "train"
        limit = self.config.max_heldout_document_tokens if heldout else self.corpus.max_document_tokens
        ids = document.token_ids
        if ids is None:
            ids = self.lm.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        taken = list(ids[: limit if room is None else min(limit, max(1, room))])
        self.reader.credit(document, len(taken), is_cut=len(ids) > limit)
        return taken

    def require_every_split(self) -> None:
        """Raise CorpusError unless every split has at least one window."""
        found = {w.split for w in self.windows}
        missing = [s for s in SPLITS if s not in found]
        if missing:
            raise CorpusError(
                f"the corpus {self.corpus.title} is too small: no window of {self.config.context_tokens} tokens for "
                f"the split {missing[0]!r} ({len(self.read)} documents); add text or lower harvest.context_tokens"
            )

    def write_evidence(self, evidence: Evidence, folder: Path, info: HarvestInfo) -> None:
        """Write the tables documents, windows, vocabulary and split_rows."""
        sources = self.corpus.sources
        rows = [
            {"document_id": d.document_id, "split": d.split, "title": d.title, "source": sources[d.source].source,
             "num_tokens": n, "sha256": d.sha256}
            for d, n in self.read
        ]  # fmt: skip
        evidence.write("documents", pa.Table.from_pylist(rows))
        evidence.write(
            "windows",
            pa.table(
                {
                    "window_id": np.arange(len(self.windows), dtype=np.int32),
                    "split": [w.split for w in self.windows],
                    "token_ids": [w.token_ids for w in self.windows],
                    "document_ids": [w.document_ids for w in self.windows],
                }
            ),
        )
        ids = list(range(len(self.lm.tokenizer)))
        evidence.write("vocabulary", pa.table({"token_id": ids, "token": self.lm.token_texts(ids)}))
        evidence.write("split_rows", pa.Table.from_pylist([self._split_rows(s, folder, info) for s in SPLITS]))

    def _split_rows(self, split: str, folder: Path, info: HarvestInfo) -> dict:
        massive = None
        for name in info.widths:
            norms = window_column(ShardReader(shard_folder(folder, name, split)), "norms")  # [W, T]
            above = norms > info.norm_limit(name)
            massive = above if massive is None else massive | above
        assert massive is not None
        num_massive = int(massive[:, 1:].sum())
        return {
            "split": split,
            "num_documents": sum(d.split == split for d, _ in self.read),
            "num_windows": len(massive),
            "num_rows": massive.size,
            "num_kept_rows": massive.size - len(massive) - num_massive,
            "num_first_position_rows": len(massive),
            "num_massive_rows": num_massive,
        }


def _median_norm(reader: ShardReader) -> float:
    norms = window_column(reader, "norms")[:, 1:].ravel()[:_MEDIAN_ROWS]
    return float(np.median(norms))
