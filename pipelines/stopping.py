"""Being asked to stop: SIGTERM, and SIGUSR1 that a SLURM job sends itself before its time is over.

Most work is simply left, as with Ctrl-C. Training finishes its step and writes a checkpoint first. Either way the
process ends with EXIT_STOPPED, which says: start me again, and the work goes on.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from saeql.sae.rank_place import rank_place

#: EX_TEMPFAIL of sysexits.h: not done, not failed.
EXIT_STOPPED = 75


class Stopped(BaseException):
    """The process was asked to stop. Like KeyboardInterrupt no `except Exception` holds it up."""


@dataclass
class _State:
    asked: str | None = None  # the signal that came
    deferred: int = 0  # blocks that end by themselves once asked


_state = _State()


def listen() -> None:
    """Take the signals. For the main thread of a command; whoever uses saeql from Python keeps their own handlers."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    first, _state.asked = _state.asked is None, signal.Signals(number).name
    if not _state.deferred:
        raise Stopped(f"stopped by {_state.asked}")
    if first and rank_place().rank == 0:
        print(f"saeql: {_state.asked}: stopping after this step", file=sys.stderr, flush=True)


def asked() -> bool:
    """Whether a signal to stop has come."""
    return _state.asked is not None


def stopped(what: str = "") -> Stopped:
    """What a block that ended by itself raises."""
    return Stopped(f"stopped{f' by {_state.asked}' if _state.asked else ''}{what}")


@contextmanager
def deferred() -> Iterator[None]:
    """A block that asks `asked()` and ends by itself; the signal does not interrupt it."""
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1


def leave_if_asked() -> None:
    """Between two pieces of work: raise Stopped where the signal came while it was deferred."""
    if asked():
        raise stopped()
