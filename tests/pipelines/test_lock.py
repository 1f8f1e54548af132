"""The lock of a run: one writer, on this host and on others."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saeql.pipelines.lock import TAKEN_FOR_DEAD_SECONDS, LockedError, hold

HOLDER = """
import sys, time
from pathlib import Path
from saeql.pipelines.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_it_until_that_one_ends(tmp_path: Path):
    other = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=rf"pid {other.pid} on {socket.gethostname()}"), hold(tmp_path / "lock"):
        pass
    other.kill()
    other.communicate()
    with hold(tmp_path / "lock"):
        holder = json.loads((tmp_path / "lock").read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    assert json.loads((tmp_path / "lock").read_text()) == {}


def held_elsewhere(path: Path, seconds_ago: float, job: str | None = None) -> None:
    """What a holder leaves that another host's file system does not lock."""
    path.write_text(json.dumps({"host": "elsewhere", "pid": 17, "job": job}))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


def test_a_holder_on_another_host_counts_while_it_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "lock"
    held_elsewhere(path, 20)
    with pytest.raises(LockedError, match=r"pid 17 on elsewhere\); its last sign of life was 2\d s ago"), hold(path):
        pass
    assert json.loads(path.read_text())["pid"] == 17
    held_elsewhere(path, TAKEN_FOR_DEAD_SECONDS + 1)
    with hold(path):
        pass
    held_elsewhere(path, 1, job="42")
    monkeypatch.setenv("SLURM_JOB_ID", "42")  # requeued: its own earlier start has ended
    with hold(path):
        pass
    held_elsewhere(path, 1, job="41")
    with pytest.raises(LockedError), hold(path):
        pass


def test_a_file_system_without_locks_goes_by_signs_of_life_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: object) -> None:  # as Lustre answers where it is mounted without locks
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with hold(tmp_path / "lock"), pytest.raises(LockedError, match=rf"pid {os.getpid()} on"), hold(tmp_path / "lock"):
        pass
    with hold(tmp_path / "lock"):
        pass


def test_those_who_share_it_hold_it_together_against_one_who_wants_it_alone(tmp_path: Path):
    path = tmp_path / "lock"
    with hold(path, shared=True), hold(path, shared=True), pytest.raises(LockedError), hold(path):
        pass
    with hold(path), pytest.raises(LockedError), hold(path, shared=True):
        pass
    path.write_text(json.dumps({"host": "elsewhere", "pid": 17, "job": None, "shared": True}))
    with pytest.raises(LockedError, match="pid 17 on elsewhere"), hold(path):
        pass
    with hold(path, shared=True):
        pass


def test_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("saeql.pipelines.lock.SIGN_OF_LIFE_SECONDS", 0.05)
    with hold(tmp_path / "lock"):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 300
        while (tmp_path / "lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.02)
