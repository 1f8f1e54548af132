"""Whether the files of a run are what its stages wrote: hashes taken after every stage, and a check of all of them.

Shards have their hashes in their folder's manifest, checkpoints and feature stores in a file of their own; those of
everything else are in `hashes.json`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saeql.sae.checkpoint import HASHES_FILE as CHECKPOINT_HASHES
from saeql.store.errors import StoreError
from saeql.store.integrity import FileHash, find_damage, hash_file
from saeql.store.manifest import MANIFEST, ShardError, read_manifest, verify_file
from saeql.store.publish import HASHES_ENDING, find_store_damage

from .atomic import write_whole
from .harvest_part import PARTS, HarvestPart
from .index_shards import INDEX_WORK
from .label_parts import LABEL_WORK
from .progress import progress
from .steering.kept_passes import EFFECT_WORK

HASHES_FILE = "hashes.json"
#: Runs of their own inside a run, each with its own hashes.
CONTROLS_FOLDER = "controls"
#: Bookkeeping that changes without a stage.
_NOT_RECORDED = (".lock", "stages.json", "stopped.json", HASHES_FILE)


class IntegrityError(ValueError):
    """The record of a run's hashes is itself damaged."""


@dataclass
class HashRecord:
    """`hashes.json`: hashes by path inside the run, and the stage that was writing when it was last saved."""

    files: dict[str, FileHash] = field(default_factory=dict)
    running: str | None = None
    #: Files with a hash that were missing already when that stage began: it did not remove them.
    lost: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, run: Path) -> "HashRecord":
        """Read a run's record, an empty one where there is none. Raises IntegrityError where it is damaged."""
        path = run / HASHES_FILE
        if not path.exists():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("sha256") != _sha256(data):
                raise ValueError("it does not match its own hash")
            files = {name: FileHash(**value) for name, value in data["files"].items()}
            return cls(files, data["running"], data.get("lost", []))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise IntegrityError(f"{path} is damaged ({error}); remove it to have hashes taken anew") from None

    def save(self, run: Path) -> None:
        """Write it, whole or not at all, with a hash of its own."""
        files = {name: asdict(value) for name, value in sorted(self.files.items())}
        data = {"running": self.running, "lost": self.lost, "files": files}
        write_whole(run / HASHES_FILE, json.dumps({**data, "sha256": _sha256(data)}, indent=1) + "\n")


def _sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@contextmanager
def recorded(run: Path, stage: str) -> Iterator[None]:
    """Take the hashes of what the block writes into the run. A block that fails leaves its stage named as running."""
    record, before = HashRecord.load(run), _versions(run)
    if record.running is not None:
        _forget_interrupted(record, run, before)
    record.running, record.lost = stage, sorted(record.files.keys() - before.keys())
    record.save(run)
    yield
    after = _versions(run)
    for name in before.keys() - after.keys():
        record.files.pop(name, None)
    for name, version in after.items():
        if before.get(name) != version or name not in record.files:
            record.files[name] = hash_file(run / name)
    record.running, record.lost = None, []
    record.save(run)


def _forget_interrupted(record: HashRecord, run: Path, now: Mapping[str, tuple[int, int, int]]) -> None:
    """Drop the hashes of what a stage that did not end has removed or written since it began, which is when the record
    was saved: another one may find it done, and leave it as it is.
    """
    began = (run / HASHES_FILE).stat().st_mtime_ns
    removed = record.files.keys() - now.keys() - set(record.lost)
    written = {name for name, (_, _, when) in now.items() if when >= began}
    for name in removed | (written & record.files.keys()):
        del record.files[name]


def _versions(run: Path) -> dict[str, tuple[int, int, int]]:
    """What tells that a file was written again: (inode, size, time), for every file that `hashes.json` covers."""
    found = {}
    for folder, folders, names in os.walk(run):
        work = (PARTS,) if Path(folder).name == "activations" else (INDEX_WORK, LABEL_WORK, EFFECT_WORK)
        left_out = ("checkpoints", CONTROLS_FOLDER, *work)
        folders[:] = [name for name in folders if name not in left_out and ".tmp." not in name]
        is_shard_folder = MANIFEST in names
        stores = {name.removesuffix(HASHES_ENDING) for name in names if name.endswith(HASHES_ENDING)}
        for name in names:
            if name.removesuffix(HASHES_ENDING) in stores:
                continue
            path = Path(folder, name)
            if name in _NOT_RECORDED or ".tmp." in name or (is_shard_folder and path.suffix == ".h5"):
                continue
            if not path.exists():  # a link to what is gone
                continue
            stat = path.stat()
            found[path.relative_to(run).as_posix()] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


@dataclass
class Verification:
    """Outcome of a check."""

    damage: list[str] = field(default_factory=list)  # one line each, with file and bytes
    unrecorded: list[str] = field(default_factory=list)  # files without a hash to check against
    num_files: int = 0
    num_bytes: int = 0


def verify_run(run: Path) -> Verification:
    """Read every file of a run again and compare it with the hash that was taken when it was written."""
    result = Verification()
    checks = [
        *_shard_checks(run, result),
        *_store_checks(run),
        *_recorded_checks(run, result),
        *_checkpoint_checks(run, result),
    ]
    with progress("verify", sum(size for size, _ in checks), "B") as advance:
        for size, check in checks:
            found = check()
            result.damage += [found] if found else []
            result.num_files += 1
            result.num_bytes += size
            advance(size)
    return result


def _shard_checks(run: Path, result: Verification) -> Iterator[tuple[int, Any]]:
    for manifest in sorted((run / "activations").rglob(MANIFEST)):
        try:
            records = read_manifest(manifest.parent)
        except ShardError as error:
            result.damage.append(str(error))
            continue
        for record in records:
            yield record.bytes, lambda folder=manifest.parent, record=record: _shard_damage(folder, record)
    for folder in sorted((run / "activations" / PARTS).glob("[0-9]*")):  # of a harvest that is not finished
        try:
            for place, record in HarvestPart(folder).shards():
                yield record.bytes, lambda folder=place, record=record: _shard_damage(folder, record)
        except ShardError as error:
            result.damage.append(str(error))


def _shard_damage(folder: Path, record: Any) -> str | None:
    try:
        verify_file(folder, record)
    except ShardError as error:
        return str(error)
    return None


def _store_checks(run: Path) -> Iterator[tuple[int, Any]]:
    def check(path: Path) -> str | None:
        try:
            return find_store_damage(path)
        except StoreError as error:
            return str(error)

    for hashes in sorted(run.glob(f"*{HASHES_ENDING}")):
        path = hashes.with_name(hashes.name.removesuffix(HASHES_ENDING))
        yield path.stat().st_size if path.exists() else 0, lambda path=path: check(path)


def _recorded_checks(run: Path, result: Verification) -> Iterator[tuple[int, Any]]:
    try:
        record = HashRecord.load(run)
    except IntegrityError as error:
        result.damage.append(str(error))
        return
    result.unrecorded += sorted(_versions(run).keys() - record.files.keys())
    note = f" (the stage {record.running} was interrupted: run it again)" if record.running else ""

    def check(name: str, expected: FileHash) -> str | None:
        damage = find_damage(run / name, expected)
        return damage and damage + note

    for name, expected in record.files.items():
        if (run / f"{name}{HASHES_ENDING}").exists():
            continue  # a store of an older saeql that was upgraded since
        yield expected.bytes, lambda name=name, expected=expected: check(name, expected)


def _checkpoint_checks(run: Path, result: Verification) -> Iterator[tuple[int, Any]]:
    own = (p for p in run.rglob("checkpoints/step-*") if CONTROLS_FOLDER not in p.relative_to(run).parts)
    for folder in sorted(p for p in own if p.is_dir() and ".tmp." not in p.name):
        hashes = folder / CHECKPOINT_HASHES
        if not hashes.exists():
            result.unrecorded.append(folder.relative_to(run).as_posix())
            continue
        try:
            files = json.loads(hashes.read_text(encoding="utf-8"))["files"]
            records = {name: FileHash(**value) for name, value in files.items()}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            result.damage.append(f"{hashes} is damaged: {error}")
            continue
        for name, expected in records.items():
            yield expected.bytes, lambda path=folder / name, expected=expected: find_damage(path, expected)
