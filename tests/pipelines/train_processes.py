"""Runs that `saeql train` works on in processes of its own, which tests may kill."""

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from saeql.pipelines import Run
from saeql.sae.checkpoint import checkpoints

SAEQL = ("-m", "saeql.pipelines")


def settle_copy(run: Path, to: Path, **train: object) -> Path:
    """A copy of a run with other keys of [train], not trained."""
    copy = Path(
        shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "sae_weights.*", "metrics.jsonl"))
    )
    text = (copy / "config.toml").read_text()
    for key, value in train.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {json.dumps(value)}", text, flags=re.MULTILINE)
    (copy / "config.toml").write_text(text)
    (copy / "hashes.json").unlink()  # the next stage takes them anew
    return copy


def torchrun(run: Path, ranks: int, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*command, *SAEQL, "train", str(run), *flags], capture_output=True, text=True, timeout=900)


def start_ranks(run: Path, size: int, *flags: str, **environment: str) -> list[subprocess.Popen[str]]:
    """Ranks without a launcher that watches over them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    command = [sys.executable, *SAEQL, "train", str(run), *flags]
    return [
        subprocess.Popen(
            command, env={**os.environ, **place, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip


def ends(process: subprocess.Popen[str], within: float = 600) -> tuple[int, list[str]]:
    """Exit code of a process, and what saeql said on stderr."""
    errors = process.communicate(timeout=within)[1]
    return process.returncode, [line for line in errors.splitlines() if line.startswith("saeql: ")]


def free_port(of: range) -> int:
    """The first port that nothing listens on; another process's own job begins elsewhere."""
    for port in itertools.islice(itertools.cycle(of), os.getpid() % len(of), os.getpid() % len(of) + len(of)):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("", port))
            return port
    raise OSError(f"no free port from {of.start} to {of.stop}")


def wait_for_step(run: Path, step: int, within: float = 300, of: subprocess.Popen | None = None) -> None:
    """Until a checkpoint of that step is there; `of` is what should write it."""
    deadline = time.monotonic() + within
    while not any(int(p.name[5:]) >= step for p in checkpoints(run / "checkpoints")):
        assert of is None or of.poll() is None, f"ended with {of.returncode} before a checkpoint"
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(Run.open(run).dictionary_path / "sae_weights.safetensors")


def curve(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
