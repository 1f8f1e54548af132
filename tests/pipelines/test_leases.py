"""Leases: one owner a unit, whatever dies or sleeps, and nothing of one that lost its unit counts."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from saeql.pipelines.atomic import remove_folder
from saeql.pipelines.leases import OWNERS, LeaseLost, SharedWork
from saeql.sae.config import ConfigError


def made(folder: Path, count: int = 3) -> Path:
    SharedWork.create(folder / "work", [f"{n:04d}" for n in range(count)], {"note": "text"})
    return folder / "work"


def test_a_unit_has_one_owner_until_it_is_given_back_or_done(tmp_path: Path):
    folder = made(tmp_path, 2)
    with SharedWork(folder) as one, SharedWork(folder) as two:
        first = one.take(["0000", "0001"])
        second = two.take(["0000", "0001"])
        assert first is not None and second is not None and (first.name, second.name) == ("0000", "0001")
        assert one.take(["0001"]) is None and two.take(["0000"]) is None
        (first.path / "half").write_text("kept")
        first.release()
        again = two.take(["0000"])
        assert again is not None and (again.path / "half").read_text() == "kept"
        again.finish()
        second.finish()
        assert {u.state for u in one.units().values()} == {"done"} and one.take(["0000", "0001"]) is None
    assert list((folder / OWNERS).iterdir()) == []


def test_making_twice_changes_nothing(tmp_path: Path):
    folder = made(tmp_path)
    with SharedWork(folder) as work:
        lease = work.take(["0001"])
        assert lease is not None
        made(tmp_path)
        assert not lease.is_lost and (folder / "note").read_text() == "text"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["work"]


def test_an_owner_that_sleeps_loses_its_unit_and_is_told(tmp_path: Path):
    folder = made(tmp_path, 1)
    with SharedWork(folder, expire_seconds=30) as other, SharedWork(folder, expire_seconds=0.4) as sleeper:
        lease = sleeper.take(["0000"])
        assert lease is not None and other.take(["0000"]) is None
        life = sleeper._file(sleeper.owner)
        os.utime(life, (0, 0))
        deadline = time.monotonic() + 300
        while life.stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no sign of life"
            time.sleep(0.02)
        assert other.take(["0000"]) is None  # it does not work, but it lives
        sleeper._stopped.set()
        sleeper._thread.join()
        os.utime(life, (time.time() - 31, time.time() - 31))
        taken = other.take(["0000"])
        assert taken is not None and lease.is_lost
        for step in (lease.finish, lease.release):
            with pytest.raises(LeaseLost, match="was taken over by another process"):
                step()
        with pytest.raises(FileNotFoundError):
            (lease.path / "late").write_text("x")
        assert not taken.is_lost


HOLDER = """
import sys, time
from pathlib import Path
from saeql.pipelines.atomic import remove_folder
from saeql.pipelines.leases import SharedWork
with SharedWork(Path(sys.argv[1]), expire_seconds=600) as work:
    print(work.take(["0000"]).path, flush=True)
    time.sleep(600)
"""


def test_a_process_that_was_killed_on_this_machine_is_not_waited_for(tmp_path: Path):
    folder = made(tmp_path, 1)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        with SharedWork(folder, expire_seconds=600) as work:
            assert held.is_dir() and work.take(["0000"]) is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            lease = work.take(["0000"])
            assert lease is not None and not held.exists()


def test_a_process_of_another_machine_is_waited_for(tmp_path: Path):
    folder = made(tmp_path, 1)
    (folder / "0000.free").rename(folder / "0000.held.elsewhere-1-ab")
    file = folder / OWNERS / "elsewhere-1-ab.json"
    file.write_text(json.dumps({"host": "elsewhere", "boot": "b", "processes": "p", "pid": 1, "started": "0"}))
    with SharedWork(folder, expire_seconds=100) as work:
        assert work.take(["0000"]) is None
        os.utime(file, (time.time() - 101, time.time() - 101))
        assert work.take(["0000"]) is not None
    with SharedWork(folder, expire_seconds=100, alone=True) as work:
        assert work.take(["0000"]) is not None  # nobody else can be there


def test_a_lease_that_never_lasts_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="more than 0 seconds"):
        SharedWork(tmp_path, expire_seconds=0)


def _take_all(folder: Path, start: int, count: int, out: "multiprocessing.Queue[list[str]]") -> None:
    names, mine = [f"{n:04d}" for n in range(count)], []
    with SharedWork(folder) as work:
        while (lease := work.take(names[start:] + names[:start])) is not None:
            with (lease.path / "log").open("a") as log:
                log.write(f"{os.getpid()}\n")
            lease.finish()
            mine.append(lease.name)
    out.put(mine)


def test_processes_that_race_do_every_unit_once(tmp_path: Path):
    folder, count = made(tmp_path, 60), 60
    context = multiprocessing.get_context("fork")
    out: multiprocessing.Queue[list[str]] = context.Queue()
    workers = [context.Process(target=_take_all, args=(folder, 0, count, out)) for _ in range(4)]
    for worker in workers:
        worker.start()
    done = [name for _ in workers for name in out.get(timeout=600)]
    for worker in workers:
        worker.join()
    assert sorted(done) == [f"{n:04d}" for n in range(count)]
    assert all(len((folder / f"{name}.done" / "log").read_text().split()) == 1 for name in done)


def test_a_folder_is_removed_by_several_at_once(tmp_path: Path):
    """As the processes of a harvest do that all find it finished."""
    folder, failures = tmp_path / "parts", []

    def remove(at: threading.Barrier) -> None:
        at.wait()
        try:
            remove_folder(folder)
        except OSError as error:
            failures.append(error)

    for _ in range(60):
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "file").write_text("x")
        start = threading.Barrier(4)
        threads = [threading.Thread(target=remove, args=(start,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and not list(tmp_path.iterdir())
