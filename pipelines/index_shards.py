"""Index shared out among processes: each encodes units of stored rows, one of them puts the parts together.

A unit (`IndexUnit`) is a folder that is leased (`leases.py`): what is in it is

    activations.parquet   the part file, as one process alone writes it
    counts.npz            how often every latent fired; written last

A unit whose owner is gone is done anew by another, so a lost process costs the units it held. Putting together moves
the part files to the evidence and sums the counts; it can be done again after an interruption, with the same result.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeql.sae.config import to_dict
from saeql.sae.files import WEIGHTS_FILE, saelens_config
from saeql.store.evidence import Evidence
from saeql.store.integrity import hash_file

from .atomic import remove_folder, sync
from .harvest import HARVEST_FILE
from .index import Indexer, IndexResult, IndexUnit, UnitCounts
from .leases import Lease, SharedWork, in_own_order
from .progress import Advance, progress

#: Folder of a run in which the units are while its index is not finished, and the unit that puts them together.
INDEX_WORK, MERGE = "index-work", "merge"
_CONDITIONS, _PART, _COUNTS = "conditions.json", "activations.parquet", "counts.npz"


class SharedIndexError(ValueError):
    """An index that was begun cannot be gone on with."""


@dataclass(frozen=True)
class SharedIndex:
    """One index, as one of the processes sees it that work on it."""

    indexer: Indexer
    evidence: Evidence
    folder: Path  # of the units
    conditions: dict[str, Any]
    is_finished: Callable[[], bool]
    merging: Callable[[], AbstractContextManager[None]]  # around putting together; a block that ends well is finished
    finish: Callable[[IndexResult], None]  # writes what else an index leaves

    def join(self, expire_seconds: float) -> None:
        """Do units beside others until the index is finished, and put them together if nobody else does.

        Raises SharedIndexError where the units were begun under other conditions.
        """
        units = {unit.name: unit for unit in self.indexer.units()}
        while not self.is_finished():
            try:
                text = json.dumps(self.conditions, indent=1) + "\n"
                SharedWork.create(self.folder, [*units, MERGE], {_CONDITIONS: text})
                self._require_conditions()
                with SharedWork(self.folder, expire_seconds=expire_seconds) as work:
                    self._take_units(work, units)
            except FileNotFoundError:
                if self.folder.exists():
                    raise
                # another process put the units together in the meantime
        remove_folder(self.folder)

    def _require_conditions(self) -> None:
        begun = json.loads((self.folder / _CONDITIONS).read_text(encoding="utf-8"))
        for name in {**begun, **self.conditions}:
            if begun.get(name) != self.conditions.get(name):
                raise SharedIndexError(
                    f"{self.folder} was begun with {name} = {begun.get(name)!r}, now it is "
                    f"{self.conditions.get(name)!r}: set it back to go on, or start anew with "
                    f"`saeql index {self.folder.parent}`"
                )

    def _take_units(self, work: SharedWork, units: dict[str, IndexUnit]) -> None:
        names, is_waiting = in_own_order([*units]), False
        with progress("index", self.indexer.num_rows, "tok") as advance:
            while not self.is_finished():
                if (lease := work.take(names)) is not None:
                    with lease.held("index"):
                        self._do_unit(lease, units[lease.name], advance)
                        lease.finish()
                    continue
                found = work.units()
                done = {name: found[name].path for name in units if name in found and found[name].state == "done"}
                if len(done) == len(units) and (lease := work.take([MERGE])) is not None:
                    with lease.held("index"), self.merging():
                        self._merge(lease, [(units[name], done[name]) for name in units])
                    continue
                if not is_waiting:
                    missing = len(units) - len(done)
                    what = f"units that are not done: {missing}" if missing else "the units are put together"
                    print(f"index: waiting for other processes ({what})", file=sys.stderr)
                is_waiting = True
                time.sleep(min(2.0, work.expire_seconds / 10))

    def _do_unit(self, lease: Lease, unit: IndexUnit, advance: Advance) -> None:
        for leftover in lease.path.iterdir():  # of an owner that may still write into it
            leftover.unlink(missing_ok=True)
        counts = self.indexer.write_activations(unit, lease.path / _PART, advance)
        path = lease.path / _COUNTS
        fired, has_part = counts.fire_counts.numpy(), counts.has_part
        with path.open("wb") as file:
            np.savez_compressed(
                file, fire_counts=fired, num_rows=np.int64(counts.num_rows), has_part=np.bool_(has_part)
            )
        for file in (*([lease.path / _PART] if has_part else []), path, lease.path):
            sync(file)

    def _merge(self, lease: Lease, units: list[tuple[IndexUnit, Path]]) -> None:
        result = IndexResult.of(self._publish_parts(lease, units), self.indexer.dictionary.d_sae)
        lease.require()
        self.indexer.write_tables(self.evidence)
        lease.require()
        self.finish(result)
        lease.require()

    def _publish_parts(
        self, lease: Lease, units: list[tuple[IndexUnit, Path]]
    ) -> Iterator[tuple[IndexUnit, UnitCounts]]:
        parts = self.evidence.folder / "activations"
        parts.mkdir(parents=True, exist_ok=True)
        kept = set()
        for unit, folder in units:
            lease.require()
            counts = _read_counts(folder / _COUNTS)
            target = self.evidence.path("activations", self.indexer.part(unit))
            if counts.has_part:
                kept.add(target)
                if (folder / _PART).exists():
                    (folder / _PART).replace(target)
                else:  # moved when this was interrupted: its time says that this stage wrote it
                    os.utime(target)
            yield unit, counts
        for old in self.indexer.old_parts(self.evidence):
            if old not in kept:
                old.unlink()
        sync(parts)


def _read_counts(file: Path) -> UnitCounts:
    with np.load(file, allow_pickle=False) as data:
        return UnitCounts(torch.from_numpy(data["fire_counts"]), int(data["num_rows"]), bool(data["has_part"]))


def index_conditions(indexer: Indexer, dictionary: Path, activations: Path) -> dict[str, Any]:
    """Everything that decides an index, by name, as JSON has it; `dictionary` and `activations` are folders."""
    found = {f"index.{key}": value for key, value in to_dict(indexer.config).items()}
    found |= {
        "the dictionary's name": indexer.name,
        "the dictionary's configuration": saelens_config(indexer.dictionary),
        "the dictionary's weights (SHA-256)": hash_file(dictionary / WEIGHTS_FILE).sha256,
        "the harvest (SHA-256)": hash_file(activations / HARVEST_FILE).sha256,
        "the model's weights (SHA-256)": indexer.lm.identity.model_sha256,
    }
    return json.loads(json.dumps(found))
