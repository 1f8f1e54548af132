"""Work that is done in order on a thread of its own, while its owner goes on."""

import queue
import threading
from collections.abc import Callable


class Background:
    """Runs what it is given one after the other; `num_waiting` pieces of work may wait for the one that is running.

    After an error the rest is taken and dropped, so that no caller waits for ever.
    """

    def __init__(self, name: str, num_waiting: int = 1):
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=num_waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, work: Callable[[], None]) -> None:
        """Have `work` done; waits while too much is waiting. Raises what earlier work raised."""
        self.check()
        self._queue.put(work)

    def check(self) -> None:
        """Raise what earlier work raised."""
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait until everything that was added is done; the thread ends. Raises nothing: see `check`."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._error is None:
                try:
                    work()
                except BaseException as error:
                    self._error = error
