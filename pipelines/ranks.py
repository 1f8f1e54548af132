"""The processes that train together: joining them, their devices, and how each of them ends."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from saeql.sae.comm import Comm, CommError, join
from saeql.sae.config import TrainConfig
from saeql.sae.rank_place import rank_place

from .models import pick_device
from .stopping import deferred


def rank_device(name: str) -> torch.device:
    """Device of this rank for a config value: with several CUDA ranks on a host each has its own GPU.

    Raises CommError where there are more ranks than GPUs on this host.
    """
    device, place = pick_device(name), rank_place()
    if place.size == 1 or device.type != "cuda":
        return device
    if place.local_rank >= torch.cuda.device_count():
        raise CommError(
            f"rank {place.rank} is number {place.local_rank} on this host, which has {torch.cuda.device_count()} GPUs: "
            "start at most one rank a GPU"
        )
    return torch.device("cuda", place.local_rank)


def take_own_gpu() -> None:
    """Make the GPU of this process's number on its host the current one; nothing where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank_place().local_rank)


@contextmanager
def joined(config: TrainConfig, device_name: str) -> Iterator[Comm]:
    """The ranks of this job for the length of the block; one process alone where no others were started.

    A signal to stop is not obeyed inside: ranks stop together. Raises CommError where the ranks do not fit
    `train.feature_shards`, RankLostError where they do not all come.
    """
    place, device = rank_place(), rank_device(device_name)
    if place.size == 1:
        yield join(device, config.feature_shards, place=place)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with deferred():
        comm = join(device, config.feature_shards, timeout_seconds=config.rank_timeout_seconds, place=place)
        yield comm
        comm.close()


def end_rank(code: int) -> NoReturn:
    """End one of several ranks that failed: at once, without waiting for what others no longer send."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
