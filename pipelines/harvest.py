"""Harvest: documents -> windows -> activations at all hook points in one pass -> shards, by hook point and split.

The corpus is divided into `harvest.parts`. A process takes a part, reads it in sets (`reading.py`) and publishes every
set with the place where reading goes on (`harvest_part.py`), so that a harvest which is killed at any moment goes on
from its last set and ends with the same files. Several processes share the parts by leases (`leases.py`). When all are
done one process puts them together (`harvest_merge.py`).

The forward pass stops at the deepest hook point. All rows are stored with their norm; which of them count is decided
when they are read: not the first position of a window, and no row whose norm exceeds `massive_norm_multiple` times the
median, which is measured once, on the first training rows, and frozen in `harvest.json`.
"""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saeql.sae.config import to_dict
from saeql.sae.hooks import capture, resolve
from saeql.store.background import Background
from saeql.store.evidence import Evidence
from saeql.store.records import SPLITS
from saeql.store.shards import Windows

from .atomic import remove_folder, remove_half_removed, write_whole
from .corpus import CorpusConfig
from .forward import ForwardPass, HookRows, stored_dtype
from .harvest_config import HarvestConfig
from .harvest_merge import Merger, shard_folder
from .harvest_part import MERGE, PARTS, HarvestPart
from .leases import Lease, SharedWork, in_own_order
from .models import LanguageModel, ModelIdentity
from .progress import Advance, progress
from .reading import WindowBatch, WindowReader, one_ahead, wanted_tokens
from .sources import ShardSource
from .text_sources import fingerprint
from .windows import WindowRules

__all__ = ["HARVEST_FILE", "HarvestConfig", "HarvestError", "HarvestInfo", "harvest", "open_source", "shard_folder"]

HARVEST_FILE = "harvest.json"
#: Beside the parts: under which conditions they were begun.
CONDITIONS = "conditions.json"


class HarvestError(ValueError):
    """A harvest cannot go on with what was begun."""


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
    #: what decides the rows, by name: another harvest of equal conditions gives the same
    conditions: dict[str, Any] = field(default_factory=dict)
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
        write_whole(folder / HARVEST_FILE, json.dumps(asdict(self), indent=2) + "\n", durable=True)


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


def harvest(
    language_model: LanguageModel,
    hook_points: Sequence[str],
    corpus: CorpusConfig,
    config: HarvestConfig,
    folder: Path,
    evidence: Evidence,
    *,
    resume: bool = False,
    beside_others: bool = False,
    expire_seconds: float = 180.0,
    merging: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> HarvestInfo:
    """Fill `folder/<hook point>/<split>/` with shards, and the evidence on documents, windows, vocabulary and rows.

    `resume` goes on from what an interrupted harvest published, and returns at once where one is finished; without it
    everything starts anew. `beside_others`: other processes may work in the same folder, and a part of one that gives
    no sign of life for `expire_seconds` is taken over. Whoever puts the parts together does it inside `merging()`.
    Raises HarvestError where a resumed harvest was begun under other conditions, CorpusError where the text is missing
    or too short for one window of every split, OSError where the disk has no room.
    """
    if not resume:
        remove_folder(folder)
    elif not beside_others:
        remove_half_removed(folder)
    folder.mkdir(parents=True, exist_ok=True)
    job = _Job(language_model, corpus, config, folder, _conditions(language_model, hook_points, corpus, config))
    while (info := job.finished()) is None:
        try:
            SharedWork.create(job.parts, [*job.names, MERGE], {CONDITIONS: json.dumps(job.conditions, indent=1) + "\n"})
            job.require_conditions()
            job.require_room()
            with SharedWork(job.parts, expire_seconds=expire_seconds, alone=not beside_others) as work:
                job.take_part(work, evidence, merging)
        except FileNotFoundError:
            if job.parts.exists():
                raise
            # another process put the parts together in the meantime
    return info


@dataclass
class _Job:
    """One harvest, as one of the processes sees it that work on it."""

    lm: LanguageModel
    corpus: CorpusConfig
    config: HarvestConfig
    folder: Path
    conditions: dict[str, Any]

    def __post_init__(self) -> None:
        self.names = [f"{part:05d}" for part in range(self.config.parts)]
        self.parts = self.folder / PARTS
        self.widths = probe_widths(self.lm, self.conditions["model.hook_points"])
        self.dtype = stored_dtype(self.lm)

    def finished(self) -> HarvestInfo | None:
        """What there is to know of the harvest once it is finished. Raises HarvestError where it is another."""
        if not (self.folder / HARVEST_FILE).exists():
            return None
        info = HarvestInfo.load(self.folder)
        _require_same(self.folder, info.conditions, self.conditions)
        remove_folder(self.parts)
        return info

    def require_conditions(self) -> None:
        """Raise HarvestError where the parts were begun under other conditions."""
        begun = json.loads((self.parts / CONDITIONS).read_text(encoding="utf-8"))
        _require_same(self.folder, begun, self.conditions)

    def require_room(self) -> None:
        """Raise OSError where the disk has no room for what `corpus.max_tokens` allows and is not there yet."""
        row_bytes = sum(self.widths.values()) * (2 if self.dtype == "bfloat16" else 4) + 16
        there = _shard_bytes(self.parts) if self.corpus.max_tokens else 0
        wanted = sum(tokens for tokens in wanted_tokens(self.corpus, self.config).values() if tokens < math.inf)
        needed, free = wanted * row_bytes - there, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"no room for the activations: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
                "lower corpus.max_tokens or choose another folder", str(self.folder)
            )  # fmt: skip

    def take_part(
        self, work: SharedWork, evidence: Evidence, merging: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Harvest parts while there are any, wait for those of others, and put all together if nobody else does."""
        names, is_waiting = in_own_order(self.names), False
        with progress("harvest", self.corpus.max_tokens or None, "tok") as advance:
            while not (self.folder / HARVEST_FILE).exists():
                if (lease := work.take(names)) is not None:
                    with lease.held("harvest"):
                        self._harvest_part(lease, advance)
                        lease.finish()
                    continue
                done = [unit for name, unit in work.units().items() if unit.state == "done" and name != MERGE]
                if len(done) == len(self.names) and (lease := work.take([MERGE])) is not None:
                    with lease.held("harvest"), merging():
                        self._merge([HarvestPart(unit.path) for unit in done], evidence)
                    return
                if not is_waiting:
                    open_parts = len(self.names) - len(done)
                    what = f"parts that are not done: {open_parts}" if open_parts else "the parts are put together"
                    print(f"harvest: waiting for other processes ({what})", file=sys.stderr)
                is_waiting = True
                time.sleep(min(2.0, work.expire_seconds / 10))

    def _harvest_part(self, lease: Lease, advance: Advance) -> None:
        part = HarvestPart(lease.path)
        part.prepare(list(self.widths))
        advance(sum(commit.num_rows for commit in part.commits()))
        last = part.last()
        if last is not None and last.is_last:
            return
        reader = WindowReader(
            self.lm,
            self.corpus,
            self.config,
            part=int(lease.name),
            state=last and last.state,
            seen=part.seen(),
        )
        attributes, before = asdict(self.lm.identity), last.state.get("num_batch_halvings", 0) if last else 0
        disk = Background("harvest-writer")
        try:
            with ForwardPass(self.lm, list(self.widths)) as forward:
                filling: dict[tuple[str, str], list[Windows]] = {}
                for batch, found in forward.over(one_ahead(reader.batches()), lambda batch: batch.token_ids):
                    self._append(found, batch, filling)
                    if batch.mark is not None:
                        halvings = before + forward.num_halvings
                        mark = replace(batch.mark, state={**batch.mark.state, "num_batch_halvings": halvings})
                        published, filling = filling, {}
                        disk.add(partial(part.publish, published, mark, self.dtype, attributes))
                    advance(batch.token_ids.size)
        finally:
            disk.end()
        disk.check()

    def _append(
        self, rows: dict[str, HookRows], batch: WindowBatch, filling: dict[tuple[str, str], list[Windows]]
    ) -> None:
        """Append a batch's rows at every hook point to the shards of their splits."""
        for name, found in rows.items():
            for split in SPLITS:
                if len(chosen := batch.of_split(split)):
                    filling.setdefault((name, split), []).append(
                        Windows(
                            found.values[chosen],
                            batch.token_ids[chosen],
                            batch.document_ids[chosen],
                            batch.window_ids[chosen],
                            found.norms[chosen],
                        )
                    )

    def _merge(self, parts: list[HarvestPart], evidence: Evidence) -> None:
        merger = Merger(parts, self.folder, list(self.widths), self.config.context_tokens)
        merger.require_every_split(self.corpus)
        merger.move_shards()
        info = HarvestInfo(
            identity=self.lm.identity,
            widths=self.widths,
            dtype=str(self.lm.model.dtype).removeprefix("torch."),
            context_tokens=self.config.context_tokens,
            median_norms={name: merger.median_norm(name) for name in self.widths},
            massive_norm_multiple=self.config.massive_norm_multiple,
            num_dropped_tail_tokens=merger.num_dropped_tail_tokens(),
            module_names=module_names(self.lm.model, list(self.widths)),
            text={"rules": asdict(WindowRules.of(self.corpus, self.lm)), "sources": merger.sources()},
            conditions=self.conditions,
            num_batch_halvings=merger.num_batch_halvings(),
        )
        merger.write_evidence(evidence, self.lm, {name: info.norm_limit(name) for name in self.widths})
        info.save(self.folder)
        remove_folder(self.parts)


def _shard_bytes(folder: Path) -> int:
    """Bytes of the shards in a folder in which other processes rename and remove things meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # leaves out folders that are gone
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size if name.endswith(".h5") else 0
    return total


def _conditions(
    lm: LanguageModel, hook_points: Sequence[str], corpus: CorpusConfig, config: HarvestConfig
) -> dict[str, Any]:
    """Everything that decides the rows of a harvest, by name, as JSON has it."""
    sections = {"corpus": to_dict(corpus), "harvest": to_dict(config)}
    found = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    found |= {
        "model.hook_points": list(hook_points),
        "the model's weights (SHA-256)": lm.identity.model_sha256,
        "the tokenizer (SHA-256)": lm.identity.tokenizer_sha256,
        "the model's dtype": str(lm.model.dtype).removeprefix("torch."),
    }
    found |= {f"the text in {source.source}": fingerprint(source) for source in corpus.sources}
    return json.loads(json.dumps(found))


def _require_same(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    for name in [*begun, *(name for name in now if name not in begun)]:
        if begun.get(name) != now.get(name):
            raise HarvestError(
                f"{folder} was harvested with {name} = {begun.get(name)!r}, now it is {now.get(name)!r}: set it back "
                f"to go on, or start anew with `saeql harvest {folder.parent}`"
            )


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
