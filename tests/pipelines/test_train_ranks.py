"""`saeql train` in several real processes: one run directory, what one process gets, and clean ends."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saeql.pipelines import Run
from saeql.sae.checkpoint import checkpoints

sys.path.insert(0, str(Path(__file__).parent))
from train_processes import SAEQL, curve, ends, settle_copy, start_ranks, torchrun, wait_for_step, weights


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert float((found[name] - tensor).abs().max()) <= 1e-5 * max(1.0, scale), name


@pytest.mark.parametrize(
    ("ranks", "shards"),
    [pytest.param(2, 1, id="2 data"), pytest.param(4, 2, id="2 data x 2 feature", marks=pytest.mark.full)],
)
def test_ranks_give_what_one_process_gives(ranks: int, shards: int, tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", feature_shards=shards)
    done = torchrun(run, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(weights(run), weights(tiny_run))
    assert re.findall(r"^train .* s$", done.stderr, re.MULTILINE) and done.stderr.count("train  ") == 1
    for line, expected in zip(curve(run), curve(tiny_run), strict=True):
        for key in ("step", "tokens", "lr"):
            assert line[key] == expected[key]
        for key in ("fvu", "l0", "dead_share"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), key
    assert list(Run.open(run).finished()) == ["harvest", "train"]
    assert not list(run.rglob("*.tmp.*")) and not Run.open(run).verify().damage
    if shards == 1:
        ((code, (line,)),) = [ends(rank) for rank in start_ranks(run, 1, "--resume")]
        assert code == 2 and "cannot go on bit for bit from 2 x 1 to 1 x 1 ranks" in line
        assert "--reshard goes on all the same" in line


@pytest.mark.full
def test_reshard_goes_on_with_other_ranks_and_says_so(tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run")
    assert torchrun(run, 2).returncode == 0
    shutil.rmtree(checkpoints(run / "checkpoints")[-1])  # as if killed after step 50
    shutil.rmtree(run / "dictionaries")
    done = subprocess.run(
        [sys.executable, *SAEQL, "train", run, "--resume", "--reshard"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    change = "step 50: from 2 x 1 to 1 x 1 ranks (data x feature)"
    assert f"no longer bit-exact since {change}" in done.stderr
    assert Run.open(run).dictionary().metadata["saeql"]["resharded"] == [change]
    assert [line.get("resharded") for line in curve(run)] == [None] * 5 + [1]
    assert_close(weights(run), weights(tiny_run))


@pytest.mark.full
def test_a_sweep_in_ranks(tiny_run: Path, tmp_path: Path):
    runs = [settle_copy(tiny_run, tmp_path / name, num_steps=20) for name in ("ranks", "alone")]
    for run in runs:
        text = (run / "config.toml").read_text()
        (run / "config.toml").write_text(re.sub(r"^ks = .*$", "ks = [3, 5]", text, flags=re.MULTILINE))
    done = torchrun(runs[0], 2, "--sweep")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report:") == 1
    subprocess.run([sys.executable, *SAEQL, "train", runs[1], "--sweep"], check=True, capture_output=True)
    for name in ("topk_96_k3", "topk_96_k5"):
        found, expected = (load_file(run / f"sweep/dictionaries/{name}/sae_weights.safetensors") for run in runs)
        assert_close(found, expected)


@pytest.mark.full
def test_srun_starts_ranks_without_torchrun(tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", num_steps=20)
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    command = [sys.executable, *SAEQL, "train", str(run)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **job, "SLURM_PROCID": n, "SLURM_LOCALID": n}, text=True,
                         stderr=subprocess.PIPE) for n in ("0", "1")
    ]  # fmt: skip
    assert [ends(rank) for rank in ranks] == [(0, [])] * 2
    assert list(Run.open(run).finished()) == ["harvest", "train"]


def test_what_does_not_fit_is_told(tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", batch_tokens=129)
    codes = [ends(rank) for rank in start_ranks(run, 2)]
    assert [code for code, _ in codes] == [2, 2]
    assert "rank 0 of 2: train.batch_tokens 129 is not a multiple of the 2 data ranks" in codes[0][1][0]


def test_a_second_job_is_refused_by_one_line(tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run")
    with Run.open(run).locked():
        outcomes = [ends(rank) for rank in start_ranks(run, 2)]
    assert [code for code, _ in outcomes] == [2, 2]
    (line,) = outcomes[0][1]
    assert f"in use by another saeql process (pid {os.getpid()} on {socket.gethostname()})" in line
    assert outcomes[1][1] == []


def test_other_commands_refuse_ranks(tiny_run: Path):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run([sys.executable, *SAEQL, "index", tiny_run], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "share their work out" in done.stderr


@pytest.fixture(scope="module")
def whole(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 steps of two ranks that nobody disturbed."""
    run = settle_copy(tiny_run, tmp_path_factory.mktemp("whole") / "run", num_steps=400)
    for rank in start_ranks(run, 2):
        assert ends(rank) == (0, [])
    return run


def test_a_rank_that_is_killed_ends_the_other_and_a_new_start_goes_on(whole: Path, tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", num_steps=400)
    first, second = start_ranks(run, 2)
    wait_for_step(run, 50)
    second.kill()
    code, lines = ends(first, within=250)  # less than train.rank_timeout_seconds: at once, however busy the machine
    assert code == 2, (code, lines)
    assert len(lines) == 1 and "another rank of the 2 has ended" in lines[0], lines
    second.communicate()
    assert "train" not in Run.open(run).finished()
    for rank in start_ranks(run, 2, "--resume"):
        assert ends(rank) == (0, [])
    found, expected = weights(run), weights(whole)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_rank_that_hangs_ends_the_other_within_the_stated_time(tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", num_steps=100_000, rank_timeout_seconds=10)
    first, second = start_ranks(run, 2)
    try:
        wait_for_step(run, 25)
        second.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        code, lines = ends(first)
        assert time.monotonic() - started > 5 and code == 2
        assert len(lines) == 1 and "did not answer within train.rank_timeout_seconds (10)" in lines[0], lines
    finally:
        second.kill()
        second.communicate()


def test_ranks_stop_together_and_go_on_bit_for_bit(whole: Path, tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", num_steps=400)
    ranks = start_ranks(run, 2)
    wait_for_step(run, 25)
    ranks[1].send_signal(signal.SIGTERM)  # one of them is enough
    outcomes = [ends(rank) for rank in ranks]
    assert [code for code, _ in outcomes] == [75, 75], outcomes
    stopped = json.loads((run / "stopped.json").read_text())
    assert 25 <= stopped["step"] < 400
    assert checkpoints(run / "checkpoints")[-1].name == f"step-{stopped['step']:08d}"
    for rank in start_ranks(run, 2, "--resume"):
        assert ends(rank) == (0, [])
    assert not (run / "stopped.json").exists()
    found, expected = weights(run), weights(whole)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_torchrun_passes_the_signal_on(tiny_run: Path, tmp_path: Path):
    run = settle_copy(tiny_run, tmp_path / "run", num_steps=100_000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", *SAEQL, "train", str(run)]  # fmt: skip
    agent = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
    wait_for_step(run, 25)
    agent.send_signal(signal.SIGUSR1)
    errors = agent.communicate(timeout=600)[1]
    assert agent.returncode != 0 and "saeql: stopped by SIGUSR1 at step" in errors
    stopped = json.loads((run / "stopped.json").read_text())
    assert checkpoints(run / "checkpoints")[-1].name == f"step-{stopped['step']:08d}"
