"""`saeql submit`: a training as a job of submitit, on SLURM or on this machine.

The job starts one process a GPU. Before its time is over, or when it is preempted, submitit signals it; the ranks stop
with a checkpoint, and submitit queues the job again.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from saeql.sae.config import ConfigError

from .stopping import EXIT_STOPPED

CLUSTERS = ("slurm", "local")
#: Between submitit's signal and the end of the job: time for one step and a checkpoint.
_WARNING_SECONDS = 180


class JobError(RuntimeError):
    """A job's training failed."""


@dataclass
class TrainJob:
    """What every task of the job calls: `saeql train RUN --resume` as one of its ranks."""

    run: str
    flags: tuple[str, ...] = ()
    pid: int | None = None

    def __call__(self) -> int:
        """Train to the end or to a stop. Raises JobError where `saeql train` fails."""
        place = import_module("submitit").helpers.TorchDistributedEnvironment()
        place.export(set_cuda_visible_devices=False, overwrite=True)
        command = [sys.executable, "-m", "saeql.pipelines", "train", self.run, "--resume", *self.flags]
        process = subprocess.Popen(command)
        self.pid = process.pid
        while process.poll() is None:
            time.sleep(0.1)
        if process.returncode not in (0, EXIT_STOPPED):
            raise JobError(f"saeql train {self.run} ended with {process.returncode}; its last line is in the job's log")
        return process.returncode

    def checkpoint(self) -> Any:
        """Called by submitit on the first task: stop the ranks with a checkpoint, and say what to queue again."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGUSR1)
            # not Popen.wait: it would wait for a lock that the code that this interrupts may hold
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return import_module("submitit").helpers.DelayedSubmission(TrainJob(self.run, self.flags))


def submit_training(
    run: Path,
    *,
    cluster: str = "slurm",
    nodes: int = 1,
    ranks_per_node: int = 1,
    gpus_per_node: int | None = None,
    minutes: int = 240,
    partition: str | None = None,
    flags: tuple[str, ...] = (),
) -> Any:
    """Queue the training of a harvested run; returns submitit's job. Its logs are in the folder `<run>.jobs`.

    Raises ConfigError without submitit, or for an unknown cluster.
    """
    if cluster not in CLUSTERS:
        raise ConfigError(f"--cluster must be one of {', '.join(CLUSTERS)}, got {cluster!r}")
    try:
        submitit = import_module("submitit")
    except ImportError:
        raise ConfigError("saeql submit needs the package submitit: pip install 'saeql[cluster]'") from None
    executor = submitit.AutoExecutor(folder=run.with_name(f"{run.name}.jobs"), cluster=cluster)
    parameters: dict[str, Any] = {"nodes": nodes, "tasks_per_node": ranks_per_node, "timeout_min": minutes}
    if gpus_per_node is not None:
        parameters["gpus_per_node"] = gpus_per_node
    if cluster == "slurm":
        parameters |= {"slurm_signal_delay_s": _WARNING_SECONDS}
        parameters |= {"slurm_partition": partition} if partition else {}
    executor.update_parameters(name="saeql-train", **parameters)
    return executor.submit(TrainJob(str(run.resolve()), flags))
