"""Time: of one call, of many, and how much of it a benchmark has left."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 2**28  # more than any card's L2 cache


class Clock:
    """Events on a card. On a CPU process time for one thread, which a busy machine disturbs least, else wall time."""

    def __init__(self, device: str, threads: int):
        self.device = device
        self._now = time.process_time if threads == 1 else time.perf_counter
        self._flush: torch.Tensor | None = None

    def seconds(self, call: Callable[[], Any], *, flush: bool = False) -> float:
        """Of one call. `flush` empties the card's cache first, and gives the host time to queue the call."""
        if self.device == "cpu":
            begin = self._now()
            call()
            return self._now() - begin
        if flush:
            if self._flush is None:
                self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
            self._flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    def many(self, call: Callable[[], Any], rounds: int, limit: float = float("inf")) -> list[float]:
        """Seconds of up to `rounds` calls after one that does not count, at least 3 however small the `limit`."""
        call()
        deadline, found = Deadline(limit), []
        while len(found) < min(rounds, 3) or (len(found) < rounds and not deadline.passed):
            found.append(self.seconds(call, flush=True))
        return found

    def median(self, call: Callable[[], Any], rounds: int, limit: float = float("inf")) -> float:
        """The median of `many`."""
        return statistics.median(self.many(call, rounds, limit))


class Deadline:
    """So many seconds of wall time from now on."""

    def __init__(self, seconds: float = float("inf")):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative once it has passed."""
        return self._end - time.monotonic()

    @property
    def passed(self) -> bool:
        return self.left <= 0
