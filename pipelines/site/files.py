"""The folder of a site while it is written, and the form of its data: scripts that hand over packed bytes.

A data file is `saeqlData("NAME", "BASE64")`. The bytes are a zlib stream of one line of JSON and, after it, the columns
that the line names with their types. Scripts rather than JSON, because a page that was opened as a file may load them
too, and a page that loads nothing else can be forbidden to ask anything of anybody; packed, because few hosts compress
and no disk does.
"""

import base64
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

#: What lies in a site's folder; a folder that holds nothing else may be replaced.
OWN = frozenset({"data", "static", ".nojekyll", "saeql-site.json"})
MARK = "saeql-site.json"


class SiteError(ValueError):
    """The site cannot be written."""


#: Files by name: their bytes and SHA-256.
Written = dict[str, tuple[int, str]]


class SiteFiles:
    """Writes files of a site into `folder`; `written` has those of this writer, and what it took of others."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: Written = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.written.values())

    @property
    def version(self) -> str:
        """Twelve characters of the hash of all files, in whatever order they were written. They go into addresses, so
        that a browser takes nothing from an older site's cache.
        """
        return hashlib.sha256(json.dumps(sorted(self.written.items())).encode()).hexdigest()[:12]

    def data(self, name: str, header: Mapping[str, Any], **columns: np.ndarray) -> None:
        """Write `data/NAME.js`; the script finds the columns under their names beside what is in `header`."""
        self.write(f"data/{name}.js", f'saeqlData("{name}","{packed(header, columns)}")\n'.encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file at a path with slashes."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.written[name] = len(content), hashlib.sha256(content).hexdigest()


def packed(header: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    """Base64 of the header and the columns, see the module."""
    kinds = [[name, f"{values.dtype.kind}{values.dtype.itemsize}", len(values)] for name, values in columns.items()]
    line = json.dumps({**header, "columns": kinds}, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    body = b"".join(np.ascontiguousarray(v, v.dtype.newbyteorder("<")).tobytes() for v in columns.values())
    return base64.b64encode(zlib.compress(line + body, 6)).decode()


def steps(values: np.ndarray) -> np.ndarray:
    """Each value less the one before, as int32: ascending numbers take fewer bytes so."""
    return np.diff(values.astype(np.int64), prepend=0).astype(np.int32)


def shards(ends: np.ndarray, size: int) -> list[int]:
    """First number of every file, and how many numbers there are; `ends` are the ends of their entries, a file has
    `size` of those at least, but for the last.
    """
    starts, begin = [0], 0
    for number, end in enumerate(ends.tolist()):
        if end - begin >= size and number + 1 < len(ends):
            starts.append(number + 1)
            begin = end
    return [*starts, len(ends)] if len(ends) else [0]


def text_order(text: str) -> bytes:
    """Key that sorts as scripts compare strings."""
    return text.encode("utf-16-be", "surrogatepass")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` at the end of the block, and goes if that raises.

    Raises SiteError where `out` is in use by anything but an earlier site.
    """
    out = out.parent.resolve() / out.name if out.name not in ("", "..") else out.resolve()  # `.` has no name
    _check_free(out)
    temporary = out.with_name(f"{out.name}.tmp.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise SiteError(f"cannot write beside {out}: {error.strerror}") from None
    try:
        yield temporary
        _check_free(out)
        if out.exists():
            old = out.with_name(f"{out.name}.old.{os.getpid()}")
            out.rename(old)
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    except OSError as error:
        raise SiteError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(out: Path) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise SiteError(f"{out} is no folder: choose another")
    inside = sorted(path.name for path in out.iterdir())
    foreign = [name for name in inside if name not in OWN and not name.endswith(".html")]
    if inside and (foreign or MARK not in inside):
        raise SiteError(f"{out} holds {(foreign or inside)[0]}, which is of no site of saeql: choose another folder")
