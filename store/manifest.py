"""The manifest of a shard folder: `manifest.jsonl`, one line a published shard. A shard not in it does not exist.

Lines are appended whole under a file lock and fsynced, so several writers may share a folder; a last line without its
line end is a writer that died, and is not a line.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .integrity import FileHash, find_damage

MANIFEST = "manifest.jsonl"


class ShardError(ValueError):
    """A shard or its manifest is damaged, or does not fit what it is asked for; the message names the file."""


@dataclass(frozen=True)
class ShardRecord:
    """One line of the manifest."""

    file: str
    rows: int
    windows: int
    bytes: int
    sha256: str  # of the whole file
    block_bytes: int
    block_crc32: list[int]  # one a block of block_bytes, the last may be shorter
    dtype: str  # logical type of acts: 'bfloat16' | 'float32'
    d_in: int
    context_tokens: int
    attributes: dict[str, Any]  # what the writer was told: model, hook point, split, ...


def read_manifest(folder: Path) -> list[ShardRecord]:
    """Every published shard in the order of publishing. Raises ShardError for a line that is no record."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    names = {f.name for f in fields(ShardRecord)}
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            record = ShardRecord(**{k: v for k, v in values.items() if k in names})
            if Path(record.file).name != record.file:
                raise ValueError(f"{record.file!r} is not a file of this folder")
            records.append(record)
        except (ValueError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: line {number} is not a shard record: {error}") from error
    return records


def append_record(folder: Path, record: ShardRecord) -> None:
    """Publish `record`. A line that an earlier writer left unfinished is cut off first."""
    line = _line(record)
    path = folder / MANIFEST
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        os.ftruncate(descriptor, end)
        try:
            written = os.pwrite(descriptor, line, end)
            if written != len(line):
                os.pwrite(descriptor, line[written:], end + written)
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, end)
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    sync_folder(folder)


class NewManifest:
    """A manifest that is written line by line and takes the place of the folder's at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._temporary = folder / f"{MANIFEST}.tmp.{os.getpid()}"
        self._temporary.unlink(missing_ok=True)
        self._temporary.touch()

    def add(self, record: ShardRecord) -> None:
        """Append a record. The file is not held open: manifests may be many."""
        with self._temporary.open("ab") as file:
            file.write(_line(record))

    def publish(self) -> None:
        """Make what was added the folder's shards, in that order."""
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary.replace(self.folder / MANIFEST)
        sync_folder(self.folder)


def _line(record: ShardRecord) -> bytes:
    return json.dumps(asdict(record), sort_keys=True).encode() + b"\n"


def sync_folder(folder: Path) -> None:
    """Make the folder's names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_size(folder: Path, record: ShardRecord) -> None:
    """Raise ShardError where the shard's file is missing or has another size than its record."""
    path = folder / record.file
    if not path.is_file():
        raise ShardError(f"{path} is missing, the manifest lists it: harvest again")
    actual = path.stat().st_size
    if actual != record.bytes:
        what = "truncated" if actual < record.bytes else "too long"
        raise ShardError(
            f"{path} is {what}: {actual} bytes, the manifest says {record.bytes}: harvest this shard again"
        )


def verify_file(folder: Path, record: ShardRecord) -> None:
    """Raise ShardError where the shard's content is not what was published, with the bytes that differ."""
    check_size(folder, record)
    expected = FileHash(record.bytes, record.sha256, record.block_bytes, record.block_crc32)
    if damage := find_damage(folder / record.file, expected):
        raise ShardError(f"{damage}: harvest this shard again")
