"""SQL of strangers on a store: every statement runs in a process of its own that can do nothing but read that store.

The process is started by the first statement and kept warm for the next ones; one that runs too long is killed, and so
is one that broke. `console_child` holds what the process may do, `console_gate` what a statement may name.
"""

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from .console_frames import ERROR, HEADER, READY, REQUEST, ROWS, START, TABLE, write_frame
from .errors import OldStoreError, SQLError, StoreError

DEFAULT_SECONDS = 30.0
DEFAULT_BYTES = 256 << 20
_START_SECONDS = 60.0
_MAX_REQUEST_BYTES = 8 << 20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

#: Modules come from where this program has them; `-I` leaves the environment and the working directory out. An editable
#: installation names our package by a path that only looks like one, which must not be looked up in that directory.
_BOOT = (
    "import sys, json, types\n"
    "path, package = json.loads(sys.stdin.buffer.readline())\n"
    "sys.path[:] = path\n"
    "sys.modules['saeql'] = types.ModuleType('saeql')\n"
    "sys.modules['saeql'].__path__ = package\n"
    "from saeql.store.console_child import main\n"
    "main()\n"
)


def memory_bytes(text: str) -> int:
    """Bytes of a size like "2GB" or "512 MiB". Raises SQLError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise SQLError(f"{text!r} is no amount of memory: write it like 2GB or 512MB")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


class Console:
    """Runs statements of strangers on the store at `path`, a file or a folder of Parquet.

    Safe to share between threads, which then take turns. It reads what was at `path` when it was made: after a rebuild
    by rename, make a new one. Raises StoreError where there is nothing. No process is started before it is needed.
    """

    def __init__(self, path: str | Path, *, memory_limit: str = "2GB", threads: int | None = None):
        self.path = Path(path)
        self.memory_bytes = memory_bytes(memory_limit)
        self._memory_limit, self._threads = memory_limit, threads
        if not self.path.exists():
            raise StoreError(f"{path} does not exist: build it with `saeql index --rebuild`")
        found = self.path.stat()
        self._identity = (found.st_dev, found.st_ino)
        self._turn = threading.Lock()
        self._process: _Process | None = None
        self._closed = False

    def start(self) -> None:
        """Start the process now, so that the first statement need not. Raises StoreError, OldStoreError."""
        with self._turn:
            self._ready()

    def sql(
        self,
        query: str,
        params: Sequence[Any] | dict[str, Any] | None = None,
        *,
        max_rows: int | None = None,
        timeout_seconds: float = DEFAULT_SECONDS,
        max_bytes: int = DEFAULT_BYTES,
        conditions: Sequence[str] = (),
    ) -> pa.Table:
        """Rows of one reading statement.

        A result cut at `max_rows` has `{b"truncated": b"true"}` in its schema metadata; one larger than `max_bytes` is
        an error. `conditions` are parts of `query` that must be a single SQL expression each. Raises SQLError with one
        line, and StoreError for a store that cannot be opened or is damaged.
        """
        if not 0 < timeout_seconds <= 86_400:
            raise SQLError(f"a time limit of {timeout_seconds:g} s is not between 0 and 86400 s")
        if max_rows is not None and max_rows < 0:
            raise SQLError(f"max_rows is {max_rows}: give 0 or more")
        request = {
            "query": query,
            "params": params if params is None or isinstance(params, dict) else list(params),
            "max_rows": max_rows,
            "max_bytes": max_bytes,
            "seconds": timeout_seconds,
            "conditions": list(conditions),
        }
        with self._turn:
            process = self._ready()
            try:
                return process.ask(_encoded(request), timeout_seconds, max_bytes)
            except _Broken as end:
                self._end()
                raise (self._gone() if self._closed else end.error) from None
            except BaseException as error:
                if not isinstance(error, SQLError):
                    self._end()  # its answer may still be on the way
                raise

    def close(self) -> None:
        """End the process; a statement that another thread is waiting for ends with an error."""
        self._closed = True
        process = self._process
        if process is not None:
            process.stop()
        with self._turn:
            self._end()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ready(self) -> "_Process":
        if self._closed:
            raise self._gone()
        if self._process is not None and not self._process.is_alive():
            self._end()
        if self._process is None:
            start = {
                "name": self.path.name,
                "identity": self._identity,
                "memory_limit": self._memory_limit.strip(),
                "memory_bytes": self.memory_bytes,
                "threads": self._threads,
            }
            self._process = _Process(self.path.resolve().parent, json.dumps(start).encode())
            try:
                self._process.wait_until_ready()
            except BaseException as error:
                self._end()
                if isinstance(error, _Broken):
                    raise error.error from None
                raise
        return self._process

    def _gone(self) -> StoreError:
        return StoreError(f"{self.path} has been closed: open it again")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


class _Broken(Exception):
    """The process is of no further use; `error` is what its user is told."""

    def __init__(self, error: StoreError):
        super().__init__(str(error))
        self.error = error


class _Process:
    def __init__(self, folder: Path, start: bytes):
        where = (sys.path, sys.modules["saeql"].__path__)
        path = [[entry for entry in entries if Path(entry).is_absolute()] for entries in where]
        kept = {k: os.environ[k] for k in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if k in os.environ}
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            env={**kept, "ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # no terminal to speak to, no Ctrl-C of ours
        )
        self._stdin, self._stdout = cast(BinaryIO, self._popen.stdin), cast(BinaryIO, self._popen.stdout)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        with contextlib.suppress(BrokenPipeError):  # what went wrong is told by wait_until_ready
            self._stdin.write(json.dumps(path).encode() + b"\n")
            write_frame(self._stdin, START, start)

    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def stop(self) -> None:
        """End the process now, whoever is waiting for it."""
        self._popen.kill()

    def kill(self) -> None:
        """End the process now and let go of it; its memory is given back in its own time."""
        self._popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout=0.2)
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._selector.close()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        try:
            kind, content = self._frame(deadline, DEFAULT_BYTES)
        except TimeoutError:
            raise _Broken(StoreError(f"the SQL process did not open the store within {_START_SECONDS:g} s")) from None
        if kind != READY:
            told = json.loads(content)
            raise _Broken((OldStoreError if told["kind"] == "old" else StoreError)(told["message"]))

    def ask(self, request: bytes, seconds: float, max_bytes: int) -> pa.Table:
        deadline = time.monotonic() + seconds
        limit = max_bytes + (1 << 20)  # the stream's own headers beside the rows
        rows = bytearray()
        try:
            write_frame(self._stdin, REQUEST, request)
            while True:
                kind, content = self._frame(deadline, limit - len(rows))
                if kind == ROWS:
                    rows += content
                elif kind == TABLE:
                    return _table(rows, truncated=json.loads(content)["truncated"])
                else:
                    assert kind == ERROR, kind
                    self._raise(json.loads(content))
        except TimeoutError:
            raise _Broken(SQLError(f"the query ran longer than {seconds:g} s and was stopped")) from None
        except BrokenPipeError:
            raise self._lost() from None

    def _raise(self, told: dict[str, str]) -> None:
        if told["kind"] == "sql":
            raise SQLError(told["message"])
        if told["kind"] == "memory":
            raise _Broken(SQLError("the query needs more memory than it may have: ask for less, or raise the limit"))
        raise _Broken((SQLError if told["kind"] == "broken" else StoreError)(told["message"]))

    def _frame(self, deadline: float, limit: int) -> tuple[bytes, bytes]:
        kind, length = HEADER.unpack(self._read(HEADER.size, deadline))
        if length > limit:
            raise _Broken(SQLError("the result is larger than it may be: ask for fewer rows or columns"))
        return kind, bytes(self._read(length, deadline))

    def _read(self, length: int, deadline: float) -> bytearray:
        data = bytearray()
        while len(data) < length:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            piece = self._stdout.read(min(length - len(data), 1 << 20))
            if not piece:
                raise self._lost()
            data += piece
        return data

    def _lost(self) -> _Broken:
        """The process is gone although nobody ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout=1)
        said = (
            cast(BinaryIO, self._popen.stderr).read().decode(errors="replace").splitlines()
            if not self.is_alive()
            else []
        )
        code = self._popen.returncode
        if code is not None and code < 0:
            return _Broken(SQLError(f"the query ended its process (signal {-code}): it needed too much memory or time"))
        return _Broken(StoreError(f"the SQL process ended: {said[-1] if said else f'exit code {code}'}"))


def _encoded(request: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(request, default=_plain).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise SQLError(f"a parameter cannot be handed to the query: {error}") from None
    if len(text) > _MAX_REQUEST_BYTES:
        raise SQLError(f"the query and its parameters are longer than {_MAX_REQUEST_BYTES >> 20} MiB")
    return text


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is neither a number, text, a list nor None")


def _table(rows: bytearray, *, truncated: bool) -> pa.Table:
    table = pa.ipc.open_stream(pa.py_buffer(rows)).read_all()
    table.validate()
    return table.replace_schema_metadata({"truncated": "true"}) if truncated else table
