"""The process in which statements of strangers run: one store, open read-only, and nothing else within reach.

Its parent is `console.Console`; they speak in frames (`console_frames`) over stdin and stdout. Once the store is open,
no further file or socket can be opened, no byte can be written to a file, and memory is capped by the kernel. The
parent's end of the pipe is its leash: when it closes, the process ends.
"""

import json
import math
import os
import queue
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa

from .console_frames import ERROR, READY, ROWS, TABLE, read_frame, write_frame
from .console_gate import Catalogue, check_condition, check_statement
from .errors import OldStoreError, SQLError, StoreError, one_line
from .query import arrow_reader, connect_read_only, damage, is_damage, refusal

#: Address space beyond memory_limit: strings and hash tables that DuckDB does not count, results on their way out.
_SPARE_BYTES = 512 << 20
#: What a value counts at least: a null or a truth value is nothing on the way, but not where it arrives.
_CELL_BYTES = 8
_OUT_OF_MEMORY = (
    "Out of Memory",
    "bad allocation",
    "bad_alloc",
    "Allocation failure",
    "realloc of size",
    "malloc of size",
)


def main() -> None:
    """Open the store that the first frame names and answer requests until the parent goes."""
    try:
        _serve()
    except BaseException as error:  # a blocked reading thread would keep the interpreter from ending by itself
        os.write(2, f"{type(error).__name__}: {one_line(error)}\n".encode())
    os._exit(1)


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever prints must not reach the frames
    _, start = read_frame(requests)
    try:
        worker = _Worker(json.loads(start), answers)
    except StoreError as error:
        write_frame(answers, ERROR, _told("old" if isinstance(error, OldStoreError) else "store", str(error)))
        return
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, inbox), daemon=True).start()
    worker.lock_down()
    write_frame(answers, READY, b"")
    while True:
        worker.answer(json.loads(inbox.get()))


def _receive(requests: BinaryIO, inbox: "queue.SimpleQueue[bytes]") -> None:
    while True:
        try:
            inbox.put(read_frame(requests)[1])
        except EOFError:
            os._exit(0)  # also in the middle of a statement


class _Worker:
    def __init__(self, start: dict[str, Any], answers: BinaryIO):
        self.answers = answers
        self.memory_bytes: int = start["memory_bytes"]
        self.name: str = start["name"]
        self.folder = f"{Path.cwd()}/"
        limits = {"memory_limit": start["memory_limit"], "threads": start["threads"]}
        if Path(self.name).is_dir():
            from .console_parquet import ParquetRelations

            relations = ParquetRelations(Path(self.name), **limits)
            self.connection, self._cursor = relations.connection, relations.cursor
        else:
            self.connection = connect_read_only(Path(self.name), **limits)
            self._cursor = self.connection.cursor
        found = Path(self.name).stat()
        if [found.st_dev, found.st_ino] != start["identity"]:
            raise StoreError(f"{self.name} was rebuilt while it was open: open the store again")
        self.catalogue = Catalogue.of(self.connection)
        self.threads = int(self.connection.execute("SELECT current_setting('threads')").fetchall()[0][0])

    def lock_down(self) -> None:
        """From here on nothing can be opened, written or taken; what is used for the first time is used before."""
        with Path(os.devnull).open("wb", buffering=0) as nowhere:
            answers, self.answers = self.answers, nowhere
            self.answer({"query": "SELECT 1 AS a, 'b' AS b, [1.5] AS c", "max_bytes": 1 << 20, "seconds": 1})
            self.answer({"query": "SELECT", "max_bytes": 1 << 20, "seconds": 1})
            self.answers = answers
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        statm = Path("/proc/self/statm")
        if statm.exists():  # macOS has no such file, and does not keep to RLIMIT_AS either
            now = int(statm.read_text().split()[0]) * resource.getpagesize()
            limit = now + self.memory_bytes + self.memory_bytes // 4 + _SPARE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))

    def answer(self, request: dict[str, Any]) -> None:
        """Send the rows of one statement, or one error."""
        self._allow_seconds(request["seconds"])
        cursor = self._cursor()
        try:
            for condition in request.get("conditions", ()):
                check_condition(cursor, condition)
            statement = check_statement(cursor, self.catalogue, request["query"])
            relation = cursor.sql(statement, params=request.get("params"))  # pyright: ignore[reportArgumentType]
            self._send(relation, request.get("max_rows"), request["max_bytes"])
        except SQLError as error:
            self._refuse("sql", str(error))
        except (MemoryError, duckdb.OutOfMemoryException):
            self._refuse("memory", "")
        except (duckdb.Error, pa.ArrowException, OSError, RuntimeError) as error:
            message = one_line(error)
            if any(sign in message for sign in _OUT_OF_MEMORY):
                self._refuse("memory", "")
            elif isinstance(error, duckdb.InternalException):  # the rest of it is the engine's stack
                self._refuse("broken", one_line(str(error).splitlines()[0]))
            elif isinstance(error, RecursionError):
                self._refuse("sql", "the statement is nested too deeply")
            elif "Too many open files" in message:
                self._refuse("sql", f"a statement cannot open files: {message}")
            elif is_damage(error):
                self._refuse("store", damage(self.name, error))
            else:
                self._refuse("sql", refusal(message))
        finally:
            cursor.close()

    def _send(self, relation: duckdb.DuckDBPyRelation, max_rows: int | None, max_bytes: int) -> None:
        reader = arrow_reader(relation if max_rows is None else relation.limit(max_rows + 1))
        left, sent, cut = max_rows, 0, False
        schema = pa.schema([field.with_type(_spelled_out(field.type)) for field in reader.schema])
        with pa.ipc.new_stream(_Sink(self.answers), schema) as stream:
            for batch in reader:
                if left is not None and batch.num_rows > left:
                    batch, cut = batch.slice(0, left), True
                left = None if left is None else left - batch.num_rows
                batch = batch.cast(schema)
                sent += max(batch.nbytes, _CELL_BYTES * batch.num_rows * batch.num_columns)
                if sent > max_bytes:
                    raise SQLError(
                        f"the result is larger than {max_bytes / 2**20:g} MiB: ask for fewer rows or columns"
                    )
                stream.write_batch(batch)
        write_frame(self.answers, TABLE, json.dumps({"truncated": cut}).encode())

    def _refuse(self, kind: str, message: str) -> None:
        write_frame(self.answers, ERROR, _told(kind, message.replace(self.folder, "")))

    def _allow_seconds(self, seconds: float) -> None:
        """Let the kernel end this process if its parent cannot."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu = math.ceil(used.ru_utime + used.ru_stime + (seconds + 5) * (self.threads + 1))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _spelled_out(kind: pa.DataType) -> pa.DataType:
    """`kind` without dictionaries: a result is counted by what it means, an ENUM of long words too."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_spelled_out(field.type)) for field in kind.fields])
    if pa.types.is_map(kind):
        return pa.map_(_spelled_out(kind.key_type), _spelled_out(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_spelled_out(kind.value_type)), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_spelled_out(kind.value_type)))
    return kind


class _Sink:
    """File of pyarrow's writer: every piece is a frame."""

    closed = False

    def __init__(self, answers: BinaryIO):
        self._answers = answers

    def write(self, piece: Any) -> int:
        data = bytes(piece)
        write_frame(self._answers, ROWS, data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True


def _told(kind: str, message: str) -> bytes:
    return json.dumps({"kind": kind, "message": message}).encode()
