"""Which of the processes of a job this one is, as its launcher says: torchrun, srun, or none.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A step of several tasks that srun started
directly has only SLURM's own variables; the same five are made from them.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

#: First port that ranks of a SLURM step meet at; the job's number is added, so that jobs on one node do not collide.
_FIRST_PORT, _NUM_PORTS = 20_000, 20_000


@dataclass(frozen=True)
class RankPlace:
    """Place of this process among those of its job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this host: which GPU is its own
    rendezvous: tuple[tuple[str, str], ...] = ()  # what torch.distributed has to find in the environment besides


def rank_place(environment: Mapping[str, str] | None = None) -> RankPlace:
    """The place that the environment names; alone where nothing was launched together."""
    found = os.environ if environment is None else environment
    if "WORLD_SIZE" in found:
        rank = int(found.get("RANK", "0"))
        return RankPlace(rank, int(found["WORLD_SIZE"]), int(found.get("LOCAL_RANK", "0")))
    # a batch script has SLURM_NTASKS too, and is not a task: only srun sets the number of tasks of a step
    size = int(found.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or "SLURM_PROCID" not in found:
        return RankPlace()
    rank = int(found["SLURM_PROCID"])
    port = _FIRST_PORT + int(found.get("SLURM_JOB_ID", "0")) % _NUM_PORTS
    variables = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": found.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(found.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": port,
    }
    rendezvous = tuple((name, found.get(name, str(value))) for name, value in variables.items())
    return RankPlace(rank, size, int(found.get("SLURM_LOCALID", "0")), rendezvous)


def first_host(node_list: str) -> str:
    """The first host of a list as SLURM writes it: `gpu[007-012,020],cpu1` -> `gpu007`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list)
    return "".join(part or "" for part in found.groups()) if found else "localhost"
