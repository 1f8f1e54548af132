"""Statements of `saeql sql`: from the command line, a file, a pipe or a person, one after another."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from saeql.store.console import Console
from saeql.store.console_text import Statement, split, split_all
from saeql.store.errors import SQLError, StoreError, one_line

from ..results import BINARY, write_result

_GREETING = (
    "read-only SQL, each statement ended by ; - SHOW TABLES lists the views, DESCRIBE features columns, quit leaves"
)


class Asker:
    """Asks a console and prints what it says in one format."""

    def __init__(self, console: Console, format: str, out: Path | None, *, max_rows: int | None, seconds: float):
        self.console, self.format, self.out, self.max_rows, self.seconds = console, format, out, max_rows, seconds
        self._printed = 0

    def ask(self, query: str) -> pa.Table:
        """Run one statement and print its rows; a result that was cut says so on stderr. Raises SQLError."""
        found = self.console.sql(
            query,
            max_rows=self.max_rows,
            timeout_seconds=self.seconds,
            max_bytes=max(self.console.memory_bytes // 2, 1 << 20),
        )
        if self._printed and self.format in ("table", "csv"):
            print()
        write_result(found.replace_schema_metadata(None), self.format, self.out)
        self._printed += 1
        if (found.schema.metadata or {}).get(b"truncated"):
            sys.stdout.flush()
            print(f"saeql: only the first {self.max_rows} rows; --max-rows gives more", file=sys.stderr)
        return found

    def ask_all(self, text: str) -> None:
        """Run every statement of a text and stop at the first that fails. Raises SQLError with its line."""
        statements = split_all(text)
        if not statements:
            raise SQLError("no SQL statement on stdin or in the file")
        if len(statements) > 1 and (self.format in BINARY or self.out is not None):
            raise StoreError(f"{len(statements)} statements have {len(statements)} results: one file holds one")
        for n, statement in enumerate(statements, start=1):
            try:
                self.ask(statement.text)
            except SQLError as error:
                if len(statements) == 1:
                    raise
                raise SQLError(f"statement {n}, line {statement.line}: {one_line(error)}") from error

    def converse(self, read: Callable[[str], str]) -> None:
        """Answer statements that `read(prompt)` brings line by line, until EOFError; an error is said, not raised.

        KeyboardInterrupt gives up what was typed so far.
        """
        print(_GREETING, file=sys.stderr)
        text = ""
        while True:
            try:
                line = read("  ...> " if text.strip() else "saeql> ")
            except EOFError:
                print(file=sys.stderr)
                break
            except KeyboardInterrupt:
                print(file=sys.stderr)
                text = ""
                continue
            if not text.strip() and line.strip().lower().rstrip(";") in ("quit", "exit", r"\q"):
                break
            found, text = split(f"{text}{line}\n")
            for statement in found:
                self._answer(statement)
        for statement in split_all(text):
            self._answer(statement)

    def _answer(self, statement: Statement) -> None:
        started = time.perf_counter()
        try:
            found = self.ask(statement.text)
        except StoreError as error:
            print(f"saeql: {one_line(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            print("saeql: stopped", file=sys.stderr)
        else:
            milliseconds = 1000 * (time.perf_counter() - started)
            sys.stdout.flush()
            print(f"({found.num_rows} rows, {milliseconds:.0f} ms)", file=sys.stderr)


def prompt_of_terminal() -> Callable[[str], str]:
    """`input` with editing and a history of lines that lives as long as the process and is never written to disk."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_auto_history(True)
    return input
