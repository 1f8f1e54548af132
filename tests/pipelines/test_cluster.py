"""Jobs and hosts: the scripts for clusters, tried on one machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saeql.pipelines import Run
from saeql.sae.checkpoint import checkpoints

sys.path.insert(0, str(Path(__file__).parent))
from train_processes import free_port, settle_copy, wait_for_step, weights

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_two_hosts_over_a_network_get_the_weights_of_one_process(tiny_run: Path, tmp_path: Path):
    if os.geteuid() or subprocess.run(["ip", "netns", "list"], capture_output=True).returncode:
        pytest.skip("network namespaces need root and iproute2")
    command = [ROOT / "scripts" / "test_two_hosts.sh", tiny_run, tmp_path / "work"]
    environment = {**os.environ, "SAEQL_PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    gap, sent = done.stdout.splitlines()[-2:]
    assert float(gap.split()[-1]) <= 1e-5
    # both gradients, 96 x 32 float32 each, go over the cable once a step; flags, counters and checkpoints come on top
    assert 2 * 96 * 32 * 4 < int(sent.split()[-4].replace(",", "")) < 4 * 96 * 32 * 4


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


def test_the_slurm_script_queues_a_stopped_training_again(tiny_run: Path, tmp_path: Path):
    """Without SLURM: `srun` starts its command here, `scontrol` writes down what it is asked."""
    run = settle_copy(tiny_run, tmp_path / "run", num_steps=3000)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text(f'#!/bin/bash\n[[ $1 == show ]] && echo localhost || echo "$*" >> {tools}/asked\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job_id = free_port(range(20000, 32000)) - 20000
    job = {"SLURM_JOB_ID": str(job_id), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost",
           "SLURM_GPUS_ON_NODE": "2", "SAEQL_PYTHON": sys.executable}  # fmt: skip
    environment = {**os.environ, **job, "PATH": f"{tools}:{os.environ['PATH']}"}

    def sbatch() -> subprocess.Popen[bytes]:
        with (tmp_path / "job.log").open("a") as log:  # kept by pytest where the test fails
            return subprocess.Popen([ROOT / "scripts" / "slurm_train.sh", run], env=environment, stderr=log)

    script = sbatch()
    wait_for_step(run, 25, of=script)
    (launcher,) = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    os.kill(int(launcher), signal.SIGUSR1)  # SLURM signals what srun started
    assert script.wait(timeout=300) == 75
    assert (tools / "asked").read_text() == f"requeue {job_id}\n"
    stopped = json.loads((run / "stopped.json").read_text())["step"]
    assert checkpoints(run / "checkpoints")[-1].name == f"step-{stopped:08d}"
    (run / "stopped.json").unlink()
    (run / "config.toml").write_text("damaged")
    assert sbatch().wait(timeout=300) not in (0, 75)
    assert (tools / "asked").read_text().count("requeue") == 1


def tasks_of(process: int) -> list[int]:
    """Processes under `process` in which submitit runs a job's tasks."""
    found = []
    for child in map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()):
        is_task = b"submitit.core._submit" in Path(f"/proc/{child}/cmdline").read_bytes()
        found += [child] if is_task else tasks_of(child)
    return found


@pytest.mark.full
def test_submitit_queues_a_stopped_training_again(tiny_run: Path, tmp_path: Path):
    submitit = pytest.importorskip("submitit")
    from saeql.pipelines.submit import submit_training

    whole = settle_copy(tiny_run, tmp_path / "whole", num_steps=1000)
    assert submit_training(whole, cluster="local", ranks_per_node=2, minutes=5).results() == [0, 0]
    run = settle_copy(tiny_run, tmp_path / "run", num_steps=1000)
    job = submit_training(run, cluster="local", ranks_per_node=2, minutes=5)
    wait_for_step(run, 25)
    for task in tasks_of(int(job.job_id)):
        os.kill(task, signal.SIGUSR2)  # as SLURM does before the job's time is over
    deadline = time.monotonic() + 600
    while "train" not in Run.open(run).finished():
        assert time.monotonic() < deadline, job.stderr()
        time.sleep(0.2)
    assert isinstance(job, submitit.Job) and job.results() == [0, 0]
    log = "".join(path.read_text() for path in (tmp_path / "run.jobs").glob("*_0_log.err"))
    assert "stopped by SIGUSR1 at step" in log, log
    found, expected = weights(run), weights(whole)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_the_worked_example_is_what_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from transformers import LlamaConfig

    from saeql.pipelines.cli import main

    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    quoted = re.findall(r"```\n\$ saeql plan wide.toml (.*?)\n(.*?)```", text, re.DOTALL)
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    ).save_pretrained(tmp_path / "llama-8b")  # fmt: skip
    (tmp_path / "wide.toml").write_text(config.replace("llama-8b", str(tmp_path / "llama-8b")))
    assert len(quoted) == 2
    for flags, lines in quoted:
        main(["plan", str(tmp_path / "wide.toml"), *flags.split()])
        said = capsys.readouterr().out.splitlines()
        assert [line for line in lines.splitlines() if line not in said] == []
