"""The store as the server has it open: shared by all threads, and opened anew when a new file was published."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from saeql.store.console import Console
from saeql.store.feature_store import FeatureStore

from .settings import Settings

T = TypeVar("T")
_GONE = (0, 0)


class OpenStore:
    """Every statement takes a cursor of one read-only connection, so threads do not wait for each other."""

    def __init__(self, settings: Settings):
        """Opens nothing yet."""
        self.settings = settings
        self._state = threading.Condition()
        self._store: FeatureStore | None = None
        self._console: Console | None = None
        self._identity = _GONE
        self._readers = 0
        self._mine = threading.local()
        self._known: dict[Any, Any] = {}

    @contextmanager
    def reading(self) -> Iterator[FeatureStore]:
        """The store that is published now; it stays open inside the block, and blocks of one thread may be nested.

        Raises StoreError.
        """
        inner = getattr(self._mine, "store", None)
        if inner is not None:
            yield inner
            return
        with self._state:
            if self._store is None or _identity(self.settings.store) not in (self._identity, _GONE):
                while self._readers:  # those who read the old file
                    self._state.wait()
                self._open()
            store = self._store
            assert store is not None
            self._readers += 1
        self._mine.store = store
        try:
            yield store
        finally:
            self._mine.store = None
            with self._state:
                self._readers -= 1
                self._state.notify_all()

    @contextmanager
    def console(self) -> Iterator[Console]:
        """Where statements of readers run."""
        with self.reading():
            with self._state:
                if self._console is None:
                    self._console = Console(self.settings.store, memory_limit=self.settings.sql_memory, threads=1)
                console = self._console
            yield console

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returns, kept until another store is published. For use inside `reading`."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def close(self) -> None:
        """Let go of the file."""
        with self._state:
            if self._console is not None:
                self._console.close()
            if self._store is not None:
                self._store.close()
            self._store = self._console = None
            self._known = {}

    def _open(self) -> None:
        now = _identity(self.settings.store)
        if self._store is not None and now == self._identity:
            return  # another thread was first
        if self._console is not None:
            self._console.close()
        if self._store is not None:
            self._store.close()
        self._store = self._console = None
        self._known = {}
        path = self.settings.store
        self._store = FeatureStore.open(path, memory_limit=self.settings.memory_limit, threads=self.settings.threads)
        self._identity = _identity(path)  # an older store has been replaced by an upgraded one


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return _GONE
    return found.st_dev, found.st_ino
