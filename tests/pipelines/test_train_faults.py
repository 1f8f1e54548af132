"""Training that is killed, stopped or disturbed ends with the weights of one that was not."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saeql.pipelines import Run
from saeql.sae.checkpoint import checkpoints

sys.path.insert(0, str(Path(__file__).parent))
from train_processes import SAEQL, curve, ends, settle_copy, wait_for_step, weights

STEPS = {"num_steps": 500, "checkpoint_every_steps": 4, "d_sae": 2048}


def start(run: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, *SAEQL, "train", str(run), *flags]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def whole(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody disturbed."""
    run = settle_copy(tiny_run, tmp_path_factory.mktemp("whole") / "run", **STEPS)
    assert ends(start(run)) == (0, [])
    return run


def assert_equal(run: Path, whole: Path) -> None:
    found, expected = weights(run), weights(whole)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    measured = [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in curve(run)]
    assert measured == [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in curve(whole)]
    assert checkpoints(run / "checkpoints")[-1].name == checkpoints(whole / "checkpoints")[-1].name


def unfinished(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*.tmp.*"))


def kill_somewhere(process: subprocess.Popen[str], run: Path, chance: random.Random, inside_checkpoint: bool) -> bool:
    """kill -9 after the next checkpoint, at a random moment or while a checkpoint is written; False where it ended."""
    known = {path.name for path in checkpoints(run / "checkpoints")}
    while process.poll() is None and {path.name for path in checkpoints(run / "checkpoints")} <= known:
        time.sleep(0.005)
    if not inside_checkpoint:
        time.sleep(chance.uniform(0, 0.3))
    while inside_checkpoint and process.poll() is None:
        while process.poll() is None and not unfinished(run):
            pass
        time.sleep(chance.uniform(0, 0.01))
        process.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("T", "Z"):
            pass
        if unfinished(run):  # it stands still inside
            break
        process.send_signal(signal.SIGCONT)
    killed = process.poll() is None
    process.kill()
    process.communicate()
    return killed


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.full)])
def test_a_training_killed_at_any_moment_goes_on_to_the_same_weights(
    kills: int, whole: Path, tiny_run: Path, tmp_path: Path
):
    run = settle_copy(tiny_run, tmp_path / "run", **STEPS)
    chance, process, inside, finished = random.Random(kills), start(run), 0, 0
    for number in range(kills):
        if not kill_somewhere(process, run, chance, inside_checkpoint=number % 2 == 1):
            finished += 1
            assert_equal(run, whole)
            shutil.rmtree(run / "checkpoints")
        inside += unfinished(run)
        process = start(run, "--resume")
    assert ends(process) == (0, [])
    assert_equal(run, whole)
    assert inside >= kills // 2 - finished, f"{inside} of {kills} kills met a checkpoint"
    assert not list(run.rglob("*.tmp.*")) and not Run.open(run).verify().damage
    print(f"{kills} kills, {inside} of them inside of a checkpoint, {finished} came after the end")


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.full)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(name: str, whole: Path, tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", **STEPS)
    process = start(run)
    wait_for_step(run, 8)
    process.send_signal(getattr(signal, name))
    code, lines = ends(process)
    assert code == 75 and lines[0] == f"saeql: {name}: stopping after this step"
    stopped = json.loads((run / "stopped.json").read_text())
    assert lines[1] == (
        f"saeql: stopped by {name} at step {stopped['step']} of 500; it goes on from here when it is started again"
    )
    assert checkpoints(run / "checkpoints")[-1].name == f"step-{stopped['step']:08d}"
    assert "train" not in Run.open(run).finished()
    assert ends(start(run, "--resume")) == (0, [])
    assert_equal(run, whole)
    assert not (run / "stopped.json").exists()


def test_a_whole_run_stops_in_any_stage_and_the_same_command_goes_on(tiny_config: Path, tmp_path: Path):
    run = tmp_path / "run"
    command = [sys.executable, *SAEQL, "run", str(tiny_config), "--out", str(run)]
    command += ["--train.num_steps", "600", "--harvest.context_tokens", "16"]
    reached = []
    for sign in (run / "activations", run / "checkpoints"):
        process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while not sign.exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        code, lines = ends(process)
        assert code == 75 and "it goes on from here when it is started again" in lines[-1], lines
        reached.append(list(Run.open(run).finished()))
    assert reached == [[], ["harvest"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "harvest    reused" in done.stderr and len(curve(run)) == 60
    assert not Run.open(run).verify().damage


def test_the_second_writer_is_refused_at_once(tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", **{**STEPS, "num_steps": 1_000_000}, log_every_steps=20)
    process = start(run)
    wait_for_step(run, 4)
    code, (line,) = ends(start(run))
    assert code == 2 and f"in use by another saeql process (pid {process.pid} on " in line
    assert process.poll() is None
    process.kill()
    process.communicate()
