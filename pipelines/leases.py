"""Units of work that processes, on one machine or many, share out among themselves through a folder.

Every unit is a folder inside it, and the name says how it stands:

    NAME.free           nobody works on it
    NAME.held.OWNER     OWNER does
    NAME.done           it is finished

A unit is taken, taken over, given back and finished by renaming its folder. A rename is atomic: of several that want a
unit one succeeds, and an owner whose unit was taken over finds its folder gone, so nothing that it still writes counts.
Owners show that they live by touching `owners/OWNER.json`; the units of one that has not for `expire_seconds`, or whose
process is gone from this machine, are free to take with everything that is in them.

The folder must be one that all machines see and where renaming a folder is atomic (POSIX file systems, NFS, Lustre; not
object stores). Times are compared by the file system's clock, not by those of the machines.
"""

import json
import os
import re
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from saeql.sae.config import ConfigError
from saeql.sae.rank_place import rank_place

from .atomic import write_whole

OWNERS = "owners"
_UNIT = re.compile(r"([\w-]+)\.(free|done|held\.([\w-]+))")


def in_own_order(names: Sequence[str]) -> list[str]:
    """Units in the order in which this process tries them: those of one launch start at different ones."""
    place = rank_place()
    first = place.rank * len(names) // place.size
    return [*names[first:], *names[:first]]


class LeaseLost(ValueError):
    """Another process took over a unit that this one held."""


@dataclass(frozen=True)
class Lease:
    """A unit that this process holds; all its files lie in `path`."""

    name: str
    path: Path

    def finish(self) -> None:
        """Mark the unit as done. Raises LeaseLost."""
        self._become("done")

    def release(self) -> None:
        """Give the unit back, with all that is in it. Raises LeaseLost."""
        self._become("free")

    @property
    def is_lost(self) -> bool:
        """Whether another process holds it by now."""
        return not self.path.is_dir()

    def require(self) -> None:
        """Raise LeaseLost where another process holds it by now."""
        if self.is_lost:
            raise LeaseLost(f"{self.path} was taken over by another process")

    @contextmanager
    def held(self, stage: str) -> Iterator[None]:
        """Work on it: after an error another process may go on with it, and its loss is a note, no error."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, LeaseLost) or (isinstance(error, FileNotFoundError) and self.is_lost):
                print(f"{stage}: {self.path} was taken over by another process", file=sys.stderr)
                return
            with suppress(LeaseLost, OSError):
                self.release()
            raise

    def _become(self, state: str) -> None:
        try:
            self.path.rename(self.path.with_name(f"{self.name}.{state}"))
        except FileNotFoundError:
            raise LeaseLost(f"{self.path} was taken over by another process") from None


@dataclass(frozen=True)
class Unit:
    """How a unit stands."""

    state: str  # 'free' | 'held' | 'done'
    owner: str  # '' unless held
    path: Path


class SharedWork:
    """The units of a folder, for one process of those that share it.

    Inside the `with` block this process is one of the owners. `alone`: nobody else works here, so whatever is held is
    left over from a process that died.
    """

    def __init__(self, folder: Path, *, expire_seconds: float = 180.0, alone: bool = False):
        if not expire_seconds > 0:
            raise ConfigError(f"leases must expire after more than 0 seconds, got {expire_seconds}")
        self.folder, self.expire_seconds, self.alone = folder, expire_seconds, alone
        host = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())[:40]
        self.owner = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._stopped = threading.Event()

    @staticmethod
    def create(folder: Path, names: Iterable[str], files: Mapping[str, str]) -> None:
        """Make a folder of free units with some files beside them, all at once; one that is there already stays."""
        if folder.exists():
            return
        temporary = folder.with_name(f"{folder.name}.tmp.{os.getpid()}.{secrets.token_hex(4)}")
        (temporary / OWNERS).mkdir(parents=True)
        try:
            for name in names:
                (temporary / f"{name}.free").mkdir()
            for name, text in files.items():
                write_whole(temporary / name, text, durable=True)
            try:
                temporary.rename(folder)
            except OSError:  # another process made it in this moment
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def __enter__(self) -> "SharedWork":
        write_whole(self._file(self.owner), json.dumps(_this_process()) + "\n")
        self._thread = threading.Thread(target=self._stay_alive, name="lease-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._file(self.owner).unlink(missing_ok=True)

    def units(self) -> dict[str, Unit]:
        """Every unit by name, in name order. One that is renamed in this moment may be missing."""
        found = {}
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            if matched := _UNIT.fullmatch(entry.name):
                name, state, owner = matched.groups()
                found[name] = Unit(state.partition(".")[0], owner or "", Path(entry.path))
        return found

    def take(self, names: Iterable[str]) -> Lease | None:
        """Take the first of the named units that is free or whose owner is gone; None where there is none."""
        units = self.units()
        for name in names:
            unit = units.get(name)
            if unit is None or unit.state == "done" or (unit.state == "held" and not self._is_gone(unit.owner)):
                continue
            mine = self.folder / f"{name}.held.{self.owner}"
            try:
                unit.path.rename(mine)
            except FileNotFoundError:
                # another process was faster, unless a network file system asked twice and was answered the second time
                if not mine.is_dir():
                    continue
            return Lease(name, mine)
        return None

    def _file(self, owner: str) -> Path:
        return self.folder / OWNERS / f"{owner}.json"

    def _is_gone(self, owner: str) -> bool:
        if owner == self.owner:
            return False
        if self.alone:
            return True
        file = self._file(owner)
        try:
            process, last_seen = json.loads(file.read_text(encoding="utf-8")), file.stat().st_mtime
        except FileNotFoundError:
            return True
        mine = self._file(self.owner)
        os.utime(mine)
        if mine.stat().st_mtime - last_seen > self.expire_seconds:
            return True
        here = _this_process()
        is_here = all(process[key] == here[key] for key in ("host", "boot", "processes"))
        return is_here and _started(process["pid"]) != process["started"]

    def _stay_alive(self) -> None:
        while not self._stopped.wait(self.expire_seconds / 8):
            try:
                os.utime(self._file(self.owner))
            except OSError:  # the folder is gone, or out of reach: then the leases are lost, and their use will say so
                continue


def _this_process() -> dict[str, str | int]:
    """What tells this process from every other, on every machine."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "processes": _pid_space(),  # in containers of one machine a pid does not mean the same process
        "pid": pid,
        "started": _started(pid),
    }


def _started(pid: int) -> str:
    """When a process of this machine was started, in ticks since the machine was; '' where there is none such."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields:
        return "" if fields[0] == "Z" else fields[19]  # a zombie is no process any more
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "running"  # a system without /proc


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _pid_space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
