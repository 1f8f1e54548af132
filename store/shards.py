"""Activation shards: HDF5 files of contiguous datasets, published one by one through a manifest.

A shard holds whole windows. A row is one position of one window, so window w of a shard is its rows
`w * context_tokens .. (w + 1) * context_tokens - 1`. HDF5 has no bfloat16: those bits are stored as uint16 and the
dataset's attribute `logical_dtype` says so. HDF5 does not survive a kill while it writes, so every shard is written
under a temporary name, closed, synced and renamed before its manifest line appears.
"""

import errno
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .background import Background
from .integrity import hash_file
from .manifest import (
    ShardError,
    ShardRecord,
    append_record,
    check_size,
    read_manifest,
    sync_folder,
    verify_file,
)

__all__ = ["ShardError", "ShardReader", "ShardRecord", "ShardWriter", "Windows", "write_shard"]

#: Logical type -> stored type.
DTYPES = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}


@dataclass(frozen=True)
class Windows:
    """W windows of T positions."""

    acts: NDArray[np.uint16] | NDArray[np.float32]  # [W, T, d_in]; uint16 holds bfloat16 bits
    token_ids: NDArray[np.int32]  # [W, T]
    document_ids: NDArray[np.int32]  # [W, T]
    window_ids: NDArray[np.int32]  # [W]
    norms: NDArray[np.float32]  # [W, T], Euclidean norm of each row of acts

    def slice(self, start: int, stop: int) -> "Windows":
        """Windows `start` to `stop - 1`, without a copy."""
        return Windows(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.window_ids)


class ShardWriter:
    """Appends windows to a folder of shards; a background thread writes and publishes.

    At most two shards wait in memory beside the one being filled. Writers of several processes may share a folder when
    each has a `prefix` of its own. Leaving the `with` block by an exception publishes nothing more.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        d_in: int,
        context_tokens: int,
        attributes: dict[str, Any],
        windows_per_shard: int = 512,
        dtype: str = "bfloat16",
        prefix: str = "shard",
    ):
        if dtype not in DTYPES:
            raise ShardError(f"shards hold {' or '.join(DTYPES)}, not {dtype!r}")
        if re.fullmatch(r"[A-Za-z0-9_.-]+", prefix) is None or prefix.startswith("."):
            raise ShardError(f"a shard prefix is letters, digits and _ . -, not {prefix!r}")
        assert windows_per_shard > 0 and d_in > 0 and context_tokens > 0
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.d_in, self.context_tokens, self.dtype = d_in, context_tokens, dtype
        self.attributes = json.loads(json.dumps(attributes))
        self.windows_per_shard, self.prefix = windows_per_shard, prefix
        mine = re.compile(rf"{re.escape(prefix)}-(\d+)\.h5(\.tmp\.\d+)?")
        numbers = [int(m.group(1)) for r in read_manifest(self.folder) if (m := mine.fullmatch(r.file))]
        self._next = max(numbers, default=-1) + 1
        for leftover in self.folder.glob("*.tmp.*"):
            if mine.fullmatch(leftover.name):
                leftover.unlink()
        self._filling: list[Windows] = []
        self._closed = False
        self._disk = Background("shard-writer")

    def append(
        self,
        acts: NDArray[Any],  # [W, T, d_in] uint16 (bfloat16 bits) or float32
        token_ids: NDArray[Any],  # [W, T]
        document_ids: NDArray[Any],  # [W, T]
        window_ids: NDArray[Any],  # [W]
        norms: NDArray[Any],  # [W, T]
    ) -> None:
        """Take W windows; arrays must not be changed afterwards. Waits while the disk is behind.

        Raises ShardError for a wrong shape or type, and what stopped the background thread (OSError for a full disk).
        """
        self._disk.check()
        if self._closed:
            raise ShardError(f"{self.folder}: the writer is closed")
        batch = self._checked(acts, token_ids, document_ids, window_ids, norms)
        start = 0
        while start < len(batch):
            room = self.windows_per_shard - sum(map(len, self._filling))
            self._filling.append(batch.slice(start, start + room))
            start += room
            if start <= len(batch):
                self._hand_over()

    def close(self) -> None:
        """Publish what is left and wait for the disk. Raises what the background thread met."""
        if not self._closed:
            self._closed = True
            try:
                if self._filling:
                    self._hand_over()
            finally:
                self._disk.end()
        self._disk.check()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is not None:
            self._filling = []
            self._closed = True
            self._disk.end()
        else:
            self.close()

    def _checked(self, acts: Any, token_ids: Any, document_ids: Any, window_ids: Any, norms: Any) -> Windows:
        num_windows = len(window_ids)
        rows = (num_windows, self.context_tokens)
        expected = {
            "acts": (acts, (*rows, self.d_in), DTYPES[self.dtype]),
            "token_ids": (token_ids, rows, np.dtype(np.int32)),
            "document_ids": (document_ids, rows, np.dtype(np.int32)),
            "window_ids": (window_ids, (num_windows,), np.dtype(np.int32)),
            "norms": (norms, rows, np.dtype(np.float32)),
        }
        for name, (array, shape, dtype) in expected.items():
            if array.shape != shape or array.dtype != dtype:
                raise ShardError(
                    f"{name} is {array.dtype} {list(array.shape)}, this writer takes {dtype} {list(shape)}"
                )
        return Windows(acts, token_ids, document_ids, window_ids, norms)

    def _hand_over(self) -> None:
        shard, self._filling = self._filling, []
        self._disk.add(lambda: self._publish(shard))

    def _publish(self, shard: list[Windows]) -> None:
        path = self.folder / f"{self.prefix}-{self._next:05d}.h5"
        append_record(self.folder, write_shard(path, shard, dtype=self.dtype, attributes=self.attributes))
        self._next += 1


def write_shard(path: Path, windows: Sequence[Windows], *, dtype: str, attributes: dict[str, Any]) -> ShardRecord:
    """Write windows, in several pieces of one shape, as the shard `path`: whole and on the disk, or not there.

    Returns the record with which a manifest publishes it. `dtype` is the logical one of the acts. Raises OSError for a
    full disk or a folder that is gone.
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        _write(temporary, windows, dtype, attributes)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        content = hash_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise _named(error, path) from error
    num_windows = sum(map(len, windows))
    _, context_tokens, d_in = windows[0].acts.shape
    return ShardRecord(
        path.name,
        num_windows * context_tokens,
        num_windows,
        content.bytes,
        content.sha256,
        content.block_bytes,
        content.block_crc32,
        dtype,
        d_in,
        context_tokens,
        attributes,
    )


def _write(path: Path, windows: Sequence[Windows], dtype: str, attributes: dict[str, Any]) -> None:
    num_windows = sum(map(len, windows))
    _, context_tokens, d_in = windows[0].acts.shape
    rows = num_windows * context_tokens
    with _CheckedFile(path) as disk, h5py.File(disk, "w", libver=("v110", "v110")) as file:
        file.attrs["saeql"] = json.dumps({"context_tokens": context_tokens, "attributes": attributes})
        columns = {
            "acts": file.create_dataset("acts", (rows, d_in), DTYPES[dtype]),
            "token_ids": file.create_dataset("token_ids", (rows,), "<i4"),
            "document_ids": file.create_dataset("document_ids", (rows,), "<i4"),
            "norms": file.create_dataset("norms", (rows,), "<f4"),
            "window_ids": file.create_dataset("window_ids", (num_windows,), "<i4"),
        }
        columns["acts"].attrs["logical_dtype"] = dtype
        start = 0
        for part in windows:
            stop = start + len(part)
            lines = slice(start * context_tokens, stop * context_tokens)
            columns["acts"][lines] = part.acts.reshape(-1, d_in)
            for name in ("token_ids", "document_ids", "norms"):
                columns[name][lines] = getattr(part, name).reshape(-1)
            columns["window_ids"][start:stop] = part.window_ids
            start = stop


class _CheckedFile:
    """What h5py writes through. After the first failed write it drops everything, and raises that failure when left.

    HDF5 left with a file that it cannot close crashes at the end of the process.
    """

    def __init__(self, path: Path):
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        try:
            while self._error is None and len(view):
                view = view[self._file.write(view) :]
        except OSError as error:
            self._error = error
        return len(data)

    def truncate(self, size: int | None = None) -> None:
        if self._error is None:
            self._file.truncate(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer)

    def flush(self) -> None:
        """Unbuffered: nothing to do."""

    def __enter__(self) -> "_CheckedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._error is not None:
            raise self._error


def _named(error: Exception, path: Path) -> Exception:
    """The error with the shard's path; HDF5 tells a full disk only in its text."""
    found = re.search(r"errno = (\d+)", str(error))
    number = int(found.group(1)) if found else getattr(error, "errno", None)
    if number == errno.ENOSPC or "No space left" in str(error):
        return OSError(errno.ENOSPC, "no space left, the shard was not published", str(path))
    if number is not None:
        return OSError(number, os.strerror(number), str(path))
    return ShardError(f"{path}: {error}")


class ShardReader:
    """Reads the published shards of a folder; a shard's number is its place in `records`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.records = read_manifest(self.folder)
        if not self.records:
            raise ShardError(f"{self.folder} has no published shards: harvest first")
        shapes = {(r.dtype, r.d_in, r.context_tokens) for r in self.records}
        if len(shapes) > 1:
            raise ShardError(f"{self.folder} mixes shards of {' and '.join(map(str, sorted(shapes)))}")
        self.dtype, self.d_in, self.context_tokens = shapes.pop()
        self._mapped: dict[int, dict[str, NDArray[Any]]] = {}

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(r.rows for r in self.records)

    @property
    def num_windows(self) -> int:
        """Windows of all shards."""
        return sum(r.windows for r in self.records)

    def __len__(self) -> int:
        return len(self.records)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / self.records[shard].file

    def acts(self, shard: int) -> NDArray[Any]:
        """All acts of a shard, [rows, d_in], memory-mapped read-only: uint16 holding bfloat16 bits, or float32.

        Raises ShardError for a file that is missing, truncated, or not what the manifest says.
        """
        return self._columns(shard)["acts"]

    def rows(self, shard: int, start: int, stop: int) -> NDArray[Any]:
        """Acts of rows `start` to `stop - 1`, [stop - start, d_in], a view of the mapped file."""
        if not 0 <= start <= stop <= self.records[shard].rows:
            raise ShardError(f"{self.path(shard)} has {self.records[shard].rows} rows, not {start} to {stop}")
        return self.acts(shard)[start:stop]

    def token_ids(self, shard: int) -> NDArray[np.int32]:
        """[rows], mapped."""
        return self._columns(shard)["token_ids"]

    def document_ids(self, shard: int) -> NDArray[np.int32]:
        """[rows], mapped."""
        return self._columns(shard)["document_ids"]

    def norms(self, shard: int) -> NDArray[np.float32]:
        """[rows], mapped: Euclidean norms as they were given."""
        return self._columns(shard)["norms"]

    def window_ids(self, shard: int) -> NDArray[np.int32]:
        """[windows], mapped; `numpy.repeat(_, context_tokens)` gives one a row."""
        return self._columns(shard)["window_ids"]

    def positions(self, shard: int) -> NDArray[np.int32]:
        """[rows], position in the window, from 0."""
        return np.tile(np.arange(self.context_tokens, dtype=np.int32), self.records[shard].windows)

    def will_need(self, shard: int, start: int, stop: int) -> None:
        """Ask the kernel to read the acts of rows `start` to `stop - 1` ahead; returns at once."""
        row_bytes = self.d_in * DTYPES[self.dtype].itemsize
        offset = self._offset(shard) + start * row_bytes
        descriptor = os.open(self.folder / self.records[shard].file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, offset, (stop - start) * row_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def verify(self) -> int:
        """Read every shard again and return how many bytes were checked.

        Raises ShardError naming the first bad file and the bytes of it that differ.
        """
        for record in self.records:
            verify_file(self.folder, record)
        return sum(record.bytes for record in self.records)

    def _offset(self, shard: int) -> int:
        """Where the acts begin in the shard's file."""
        acts = self._columns(shard)["acts"]
        whole = self._columns(shard)["file"]
        return acts.__array_interface__["data"][0] - whole.__array_interface__["data"][0]

    def _columns(self, shard: int) -> dict[str, NDArray[Any]]:
        """Views of the mapped file by name. The mapping holds no file descriptor: shards may be many."""
        if shard not in self._mapped:
            record, path = self.records[shard], self.path(shard)
            check_size(self.folder, record)
            rows, int32 = record.rows, np.dtype("<i4")
            expected = {
                "acts": ((rows, self.d_in), DTYPES[self.dtype]),
                "token_ids": ((rows,), int32),
                "document_ids": ((rows,), int32),
                "norms": ((rows,), np.dtype("<f4")),
                "window_ids": ((record.windows,), int32),
            }
            with pa.memory_map(str(path)) as mapped:
                whole = np.frombuffer(mapped.read_buffer(), np.uint8)
            columns: dict[str, NDArray[Any]] = {"file": whole}
            with self._open(shard) as file:
                for name, (shape, dtype) in expected.items():
                    offset, count = self._place(file, shard, name, shape, dtype), math.prod(shape)
                    columns[name] = np.frombuffer(whole, dtype, count, offset).reshape(shape)
            self._mapped[shard] = columns
        return self._mapped[shard]

    def _open(self, shard: int) -> h5py.File:
        try:
            return h5py.File(self.path(shard), "r")
        except OSError as error:
            raise ShardError(f"{self.path(shard)}: HDF5 cannot read it, run verify: {error}") from error

    def _place(self, file: h5py.File, shard: int, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
        """Offset of a dataset's bytes in the file."""
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset) or dataset.shape != shape or dataset.dtype != dtype:
            raise ShardError(f"{self.path(shard)}: {name} is not the {dtype} {list(shape)} that the manifest promises")
        offset = dataset.id.get_offset()
        if offset is None:
            raise ShardError(f"{self.path(shard)}: {name} is not contiguous")
        return offset
