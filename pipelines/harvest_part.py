"""One part of a harvest on disk: sets of shards, each with the record that commits it and says where to go on.

    commit-00012.json        the set's shards with their hashes, and the reader's state after it; written last
    documents-00012.parquet  documents of the set
    seen-00012.npy           digests of the documents read, by which repeats are found
    HOOK/SPLIT/shard-00012.h5

A set without its commit does not exist: what a killed process left of it is removed, and read again.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeql.store.manifest import ShardError, ShardRecord
from saeql.store.records import DOCUMENTS, SPLITS
from saeql.store.shards import Windows, write_shard

from .atomic import write_whole
from .reading import Mark

#: Folder of the parts while a harvest is not finished, and the unit of work beside them that puts them together.
PARTS, MERGE = "parts", "merge"
_VERSION = 1
_NUMBERED = re.compile(r"(?:commit|documents|seen|shard)-(\d+)\.(?:json|parquet|npy|h5)")


@dataclass(frozen=True)
class Commit:
    """One set of a part."""

    number: int
    is_last: bool
    num_rows: int  # of one hook point
    shards: list[tuple[str, str, ShardRecord]]  # hook point, split
    state: dict[str, Any]  # of the reader after the set

    @classmethod
    def load(cls, file: Path) -> "Commit":
        """Read a commit. Raises ShardError where it is damaged."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.pop("version") != _VERSION:
                raise ValueError(f"its version is not {_VERSION}")
            shards = [(hook, split, ShardRecord(**record)) for hook, split, record in data.pop("shards")]
            return cls(shards=shards, **data)
        except (ValueError, TypeError, LookupError) as error:
            raise ShardError(f"{file} is damaged ({error}): harvest again") from None

    def save(self, file: Path) -> None:
        """Write it, durable when this returns."""
        shards = [(hook, split, asdict(record)) for hook, split, record in self.shards]
        write_whole(file, json.dumps({"version": _VERSION, **vars(self), "shards": shards}), durable=True)


class HarvestPart:
    """The folder of one part: what is committed, and the writing of the next set. `folder` may be another's lease."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._num_commits = sum(1 for _ in folder.glob("commit-*.json"))

    def __len__(self) -> int:
        """Number of committed sets."""
        return self._num_commits

    def commits(self) -> Iterator[Commit]:
        """Committed sets in order, one in memory at a time."""
        for number in range(len(self)):
            yield self.commit(number)

    def commit(self, number: int) -> Commit:
        """One committed set."""
        return Commit.load(self.folder / f"commit-{number:05d}.json")

    def last(self) -> Commit | None:
        """The last committed set; None before the first."""
        count = len(self)
        return self.commit(count - 1) if count else None

    def seen(self) -> Iterator[np.ndarray]:
        """Digests [n] of every committed set."""
        for number in range(len(self)):
            yield np.load(self.folder / f"seen-{number:05d}.npy", allow_pickle=False)

    def documents(self) -> Iterator[pa.Table]:
        """Documents of every committed set."""
        for number in range(len(self)):
            yield pq.read_table(self.folder / f"documents-{number:05d}.parquet", schema=DOCUMENTS)

    def shard_path(self, hook_point: str, split: str, file: str) -> Path:
        """Where a committed shard is until the parts are put together."""
        return self.folder / hook_point / split / file

    def shards(self) -> Iterator[tuple[Path, ShardRecord]]:
        """Folder and record of every committed shard; those that a merge moved away are left out."""
        is_moving = not (self.folder.parent / f"{MERGE}.free").is_dir()
        for commit in self.commits():
            for hook_point, split, record in commit.shards:
                path = self.shard_path(hook_point, split, record.file)
                if path.exists() or not is_moving:
                    yield path.parent, record

    def prepare(self, hook_points: list[str]) -> None:
        """Make the part ready for its next set: remove what is of no commit. Raises FileNotFoundError after a loss."""
        count = len(self)
        for folder, _, files in os.walk(self.folder):
            for name in files:
                numbered = _NUMBERED.fullmatch(name)
                if numbered is None or int(numbered.group(1)) >= count:
                    Path(folder, name).unlink(missing_ok=True)
        # one by one, never with parents: a part that was taken over must not come back under its old name
        for hook_point in hook_points:
            for folder in (hook_point, *(f"{hook_point}/{split}" for split in SPLITS)):
                (self.folder / folder).mkdir(exist_ok=True)

    def publish(
        self, shards: dict[tuple[str, str], list[Windows]], mark: Mark, dtype: str, attributes: dict[str, Any]
    ) -> None:
        """Write a set and commit it. Raises OSError, with the path, for a full disk; the set then does not exist."""
        try:
            self._publish(shards, mark, dtype, attributes)
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(error.errno, f"{error.strerror}, the set was not published", str(self.folder)) from error

    def _publish(
        self, shards: dict[tuple[str, str], list[Windows]], mark: Mark, dtype: str, attributes: dict[str, Any]
    ) -> None:
        number, records, num_rows = len(self), [], {}
        for (hook_point, split), windows in shards.items():
            path = self.shard_path(hook_point, split, f"shard-{number:05d}.h5")
            labels = {**attributes, "hook_point": hook_point, "split": split}
            record = write_shard(path, windows, dtype=dtype, attributes=labels)
            records.append((hook_point, split, record))
            num_rows[hook_point] = num_rows.get(hook_point, 0) + record.rows
        _write_documents(self.folder / f"documents-{number:05d}.parquet", mark.documents)
        with (self.folder / f"seen-{number:05d}.npy").open("wb") as file:
            np.save(file, mark.seen, allow_pickle=False)
            _sync(file)
        rows = max(num_rows.values(), default=0)
        Commit(number, mark.is_last, rows, records, mark.state).save(self.folder / f"commit-{number:05d}.json")
        self._num_commits += 1


def _write_documents(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=DOCUMENTS), file, compression="zstd")
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
