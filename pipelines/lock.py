"""One writer for a run: a lock on the file `.lock`, which names the process that holds it.

The lock belongs to the system, and ends with the process however that ends. Not every network file system shows it to
other hosts, some have none: so the holder also touches the file, and a fresh file is then taken for a living process.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

#: Seconds between two signs of life, and after which a holder on another host is taken for dead.
SIGN_OF_LIFE_SECONDS = 10
TAKEN_FOR_DEAD_SECONDS = 90

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class LockedError(ValueError):
    """Another process holds the lock; the message names it."""


@contextmanager
def hold(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; `shared`, beside others that do so too.

    Raises LockedError at once where another process holds it, on this or another host.
    """
    with path.open("a+", encoding="utf-8") as file:
        _refuse_living(file, has_system_lock=_lock(file, shared=shared), shared=shared)
        own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "shared": shared,
        }
        _write(file, own)
        ended = threading.Event()
        life = threading.Thread(target=_show_life, args=(file.fileno(), ended), name="lock", daemon=True)
        life.start()
        try:
            yield
        finally:
            ended.set()
            life.join()
            if _holder(file) == own:
                _write(file, {})  # left in order: another host need not wait for signs of life


def _lock(file: IO[str], *, shared: bool) -> bool:
    """Take the system's lock; False where the file system has none. Raises LockedError where another process has it."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(f"in use by another saeql process ({_described(_holder(file))})") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _refuse_living(file: IO[str], *, has_system_lock: bool, shared: bool) -> None:
    """Refuse what the system's lock does not: a holder on another host, any holder where there is no such lock."""
    holder = _holder(file)
    host, job = holder.get("host"), holder.get("job")
    silent = time.time() - os.fstat(file.fileno()).st_mtime
    if host is None or silent > TAKEN_FOR_DEAD_SECONDS or (host == socket.gethostname() and has_system_lock):
        return
    if shared and holder.get("shared"):
        return
    if job is not None and job == os.environ.get("SLURM_JOB_ID"):  # an earlier start of this very job, on other nodes
        return
    raise LockedError(
        f"in use by another saeql process ({_described(holder)}); its last sign of life was {max(0, silent):.0f} s "
        f"ago, after {TAKEN_FOR_DEAD_SECONDS} s it is taken for dead"
    )


def _show_life(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(SIGN_OF_LIFE_SECONDS):
        os.utime(descriptor)


def _write(file: IO[str], holder: dict[str, Any]) -> None:
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()


def _holder(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except json.JSONDecodeError:  # it is being written, or the process was killed while it wrote
        return {}
    return found if isinstance(found, dict) else {"pid": found}


def _described(holder: dict[str, Any]) -> str:
    return f"pid {holder.get('pid', 'unknown')} on {holder.get('host', 'this host')}"
