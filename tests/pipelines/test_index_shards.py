"""An index shared by processes, of which some die, ends with the evidence of one that had it for itself."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saeql.pipelines import Run, load_config
from saeql.pipelines.cli import main
from saeql.pipelines.index_shards import INDEX_WORK, SharedIndex, index_conditions
from saeql.pipelines.verify import recorded, verify_run
from saeql.store.evidence import Evidence
from saeql.store.shards import ShardReader

#: Of about 13000 rows; so there are some fifty units.
SMALL = {"index.batch_tokens": "64", "index.rows_per_part": "300"}


@pytest.fixture(scope="module")
def made(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run. Tests must not change it."""
    run = Run.create(tmp_path_factory.mktemp("made") / "run", load_config(tiny_config, SMALL))
    assert len(list(run.execute(("harvest", "train")))) == 2
    return run.path


@pytest.fixture(scope="module")
def alone(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, indexed by one process."""
    run = Path(shutil.copytree(made, tmp_path_factory.mktemp("alone") / "run"))
    main(["index", str(run)])
    return run


@pytest.fixture
def trained(made: Path, tmp_path: Path) -> Path:
    """The same run, to be indexed."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def files(run: Path) -> dict[str, bytes]:
    """What an index leaves; when it was is in the table runs."""
    kept = [p for folder in ("evidence", "dictionaries") for p in (run / folder).rglob("*") if p.is_file()]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in kept if p.name != "runs.parquet"}


def assert_same(run: Path, alone: Path) -> None:
    found, expected = files(run), files(alone)
    assert sorted(found) == sorted(expected) and len(found) > 40
    assert [name for name, content in found.items() if content != expected[name]] == []
    assert list(Run.open(run).finished()) == ["harvest", "train", "index"]
    assert not (run / INDEX_WORK).exists() and not list(run.rglob("*.tmp.*"))
    checked = verify_run(run)
    assert checked.damage == [] and checked.unrecorded == []
    old, new = (Evidence(r / "evidence").read("runs").drop_columns(["indexed"]).to_pylist() for r in (alone, run))
    assert new == old


def units(run: Path, state: str) -> list[str]:
    folder = run / INDEX_WORK
    names = os.listdir(folder) if folder.exists() else []  # noqa: PTH208
    return [name for name in names if re.fullmatch(rf"(train|calibration|test)-\d+\.{state}.*", name)]


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_rows_of_units_are_in_stored_order(alone: Path):
    """Every kept row once, its window where the shards have it."""
    for split in ("train", "calibration", "test"):
        assert len(list((alone / "evidence" / "activations").glob(f"*-{split}-*.parquet"))) > 1
        rows = Evidence(alone / "evidence").read("activations", ["window_id", "position"], split)
        reader = ShardReader(alone / "activations" / "resid_post.1" / split)
        stored = {int(w): n for n, w in enumerate(np.concatenate([reader.window_ids(i) for i in range(len(reader))]))}
        places = np.array([stored[w] for w in rows["window_id"].to_pylist()]) * 32 + rows["position"].to_numpy()
        assert (np.diff(places) >= 0).all() and len(np.unique(places)) > 29 * len(stored)


def test_two_processes_share_an_index_and_one_is_killed(trained: Path, alone: Path, start: Any):
    workers = [start("index", trained, "--join") for _ in range(2)]
    wait_for(lambda: len(units(trained, "done")) >= 5)
    doomed = workers[0].pid

    def is_stopped_at_work() -> bool:
        os.kill(doomed, signal.SIGSTOP)
        if any(f"-{doomed}-" in name for name in units(trained, "held")):
            return True
        os.kill(doomed, signal.SIGCONT)
        return False

    wait_for(is_stopped_at_work)
    os.kill(doomed, signal.SIGKILL)
    for worker in workers:
        worker.join(600)
    assert workers[0].exitcode == -signal.SIGKILL and workers[1].exitcode == 0
    assert_same(trained, alone)
    before = files(trained)
    main(["index", str(trained), "--join"])  # finished: nothing to do
    assert files(trained) == before


def shared(run: Run, on_finish: Callable[[], None]) -> SharedIndex:
    """The run's index with the end of putting together in the test's hands."""
    indexer = run._indexer()

    def finish(result: Any) -> None:
        run._finish_index(indexer, result)
        on_finish()

    return SharedIndex(
        indexer,
        run.evidence,
        run.path / INDEX_WORK,
        index_conditions(indexer, run.dictionary_path, run.activations),
        is_finished=lambda: False,
        merging=lambda: recorded(run.path, "index"),
        finish=finish,
    )


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("is_again", [False, True], ids=["first", "again"])
def test_putting_together_is_done_again_after_an_interruption(
    is_again: bool, trained: Path, alone: Path, tmp_path: Path
):
    """Also where an index of the same rows was there, whose files have hashes."""
    if is_again:
        trained = Path(shutil.copytree(alone, tmp_path / "indexed" / "run"))
        Run.open(trained)._mark_stale("index")
        part = next(trained.glob("evidence/activations/*.parquet"))
        with recorded(trained, "index"):  # an index that found something else
            part.write_bytes(part.read_bytes()[:-1])

    def stop() -> None:
        raise Interrupted

    part = next(alone.glob("evidence/activations/*.parquet"))
    (trained / "evidence" / "activations").mkdir(exist_ok=True)
    shutil.copy(part, trained / "evidence" / "activations" / f"{part.stem.rpartition('-')[0]}-99999.parquet")
    for _ in range(2):
        with pytest.raises(Interrupted):
            shared(Run.open(trained), stop).join(180)
        assert len(units(trained, "done")) > 40 and (trained / INDEX_WORK / "merge.free").is_dir()
    main(["index", str(trained), "--join"])
    assert_same(trained, alone)


def test_what_was_begun_otherwise_is_refused_or_started_anew(
    trained: Path, alone: Path, start: Any, capsys: pytest.CaptureFixture[str]
):
    worker = start("index", trained, "--join")
    wait_for(lambda: len(units(trained, "done")) >= 3)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(600)
    assert verify_run(trained).unrecorded == []
    config = (trained / "config.toml").read_text()
    (trained / "config.toml").write_text(config.replace("rows_per_part = 300", "rows_per_part = 500"))
    with pytest.raises(SystemExit) as stopped:
        main(["index", str(trained), "--join"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "index.rows_per_part = 300, now it is 500" in lines[-1]
    (trained / "config.toml").write_text(config)
    begun = json.loads((trained / INDEX_WORK / "conditions.json").read_text())
    assert begun["index.rows_per_part"] == 300
    main(["index", str(trained)])  # alone: anew
    assert_same(trained, alone)
