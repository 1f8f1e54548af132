"""Which ranks train a dictionary together: a mesh of data x feature, and the reductions that a step needs.

Ranks in one *data* column hold the same latents and see other rows; ranks in one *feature* row see the same rows and
hold other latents. One process alone is `ALONE`, for which every reduction is the identity. Only this file and
`checkpoint.py` know torch.distributed.
"""

import gc
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .rank_place import RankPlace, rank_place

_HISTOGRAM_BITS = 8
T = TypeVar("T")


class CommError(ValueError):
    """The ranks that were started do not fit what is to be trained."""


class FirstRankError(CommError):
    """The first rank failed at something that it does for all of them, and says so itself."""


class RankLostError(CommError):
    """Another rank has ended or does not answer any more."""


@dataclass
class _Group:
    """What keeps the ranks' connections open; emptied when they part."""

    mesh: DeviceMesh | None = None


@dataclass(frozen=True)
class Comm:
    """Place of this process among `data_size` x `feature_size` ranks; without a mesh, alone.

    Reductions raise RankLostError where another rank has ended or does not answer in time.
    """

    data_rank: int = 0
    data_size: int = 1
    feature_rank: int = 0
    feature_size: int = 1
    group: _Group = field(default_factory=_Group, repr=False)
    timeout_seconds: float = 600

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh data x feature. Raises CommError where this process is alone, or the ranks have parted."""
        if self.group.mesh is None:
            raise CommError("there are no other ranks (any more)")
        return self.group.mesh

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.data_rank == 0 and self.feature_rank == 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data_size * self.feature_size

    def shard(self, d_sae: int) -> slice:
        """The latents that this rank holds. Raises CommError where they cannot be shared out evenly."""
        if d_sae % self.feature_size:
            raise CommError(f"d_sae {d_sae} is not a multiple of the {self.feature_size} feature shards")
        own = d_sae // self.feature_size
        return slice(self.feature_rank * own, (self.feature_rank + 1) * own)

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Where ranks wait for each other: what goes wrong there is told as a lost rank."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RankLostError(
                f"another rank of the {self.size} has ended, or did not answer within train.rank_timeout_seconds "
                f"({self.timeout_seconds:g}): {reason}"
            ) from None

    # --- reductions, in place where there is more than one rank --------------------------------------------------

    def sum_data(self, *tensors: Tensor) -> None:
        """Sum over ranks that see other rows."""
        self._reduce("data", self.data_size, tensors)

    def sum_features(self, *tensors: Tensor) -> None:
        """Sum over ranks that hold other latents."""
        self._reduce("feature", self.feature_size, tensors)

    def mean_data(self, *tensors: Tensor) -> None:
        """Mean over ranks that see other rows."""
        self.sum_data(*tensors)
        if self.data_size > 1:
            for tensor in tensors:
                tensor.div_(self.data_size)

    def max_data(self, tensor: Tensor) -> None:
        """Largest over ranks that see other rows."""
        if self.data_size > 1:
            with self.talking():
                dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group("data"))

    def any_of(self, *flags: bool) -> list[bool]:
        """Which of `flags` hold on at least one rank. Host memory only: a rank that is lost shows here at once."""
        if self.size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        with self.talking():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found]

    def count_features(self, number: int, device: torch.device) -> int:
        """A whole number summed over ranks that hold other latents."""
        if self.feature_size == 1:
            return number
        total = torch.tensor(number, device=device)
        self.sum_features(total)
        return int(total)

    def _reduce(self, axis: str, size: int, tensors: Sequence[Tensor]) -> None:
        if size > 1:
            with self.talking():
                for tensor in tensors:
                    dist.all_reduce(tensor, group=self._group(axis))

    def _group(self, axis: str) -> dist.ProcessGroup:
        return self.mesh.get_group(axis)

    # --- gathering -----------------------------------------------------------------------------------------------

    def gather_features(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of one shape on all ranks that hold other latents, in their order."""
        return self._gather("feature", self.feature_size, tensor)

    def gather_data(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of one shape on all ranks that see other rows, in their order."""
        return self._gather("data", self.data_size, tensor)

    def _gather(self, axis: str, size: int, tensor: Tensor) -> list[Tensor]:
        if size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(size)]
        with self.talking():
            dist.all_gather(found, tensor.contiguous(), group=self._group(axis))
        return found

    def gather_objects(self, thing: Any) -> list[Any]:
        """Something small on every data rank, in their order."""
        if self.data_size == 1:
            return [thing]
        found: list[Any] = [None] * self.data_size
        with self.talking():
            dist.all_gather_object(found, thing, group=self._group("data"))
        return found

    def from_first(self, thing: Any) -> Any:
        """What the first rank has, on all of them."""
        if self.size == 1:
            return thing
        box = [thing]
        with self.talking():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` gives on the first rank, on all of them; it runs on no other.

        What it raises there is raised there; the others raise FirstRankError.
        """
        if self.size == 1:
            return action()
        if not self.is_first:
            result, failure = self.from_first(None)
            if failure is not None:
                raise FirstRankError(f"the first rank failed: {failure}")
            return result
        try:
            result = action()
        except Exception as error:
            self.from_first((None, f"{type(error).__name__}: {error}"))
            raise
        self.from_first((result, None))
        return result

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            with self.talking():
                dist.barrier()

    # --- selection -----------------------------------------------------------------------------------------------

    def kth_largest(self, values: Tensor, k: int) -> Tensor:
        """The k-th largest of the non-negative values of all ranks together; 0 where they are fewer than k.

        By radix: a histogram of 256 bins goes over the wire for each byte of a float32, never the values.
        """
        wide = values.flatten().float()
        keys = wide.clamp_min(0).view(torch.int32)  # floats that are not negative sort as their bits
        prefix, left = 0, k
        for shift in range(24, -1, -_HISTOGRAM_BITS):
            inside = keys if shift == 24 else keys[(keys >> (shift + _HISTOGRAM_BITS)) == prefix]
            counts = torch.bincount((inside >> shift) & 255, minlength=256)
            if self.size > 1:
                with self.talking():
                    dist.all_reduce(counts)
            above = counts.flip(0).cumsum(0).flip(0)  # of this digit or a larger one
            enough = (above >= left).nonzero()
            if not len(enough):
                return wide.new_zeros(())
            digit = int(enough[-1])
            left -= int(above[digit] - counts[digit])
            prefix = (prefix << _HISTOGRAM_BITS) | digit
        return torch.tensor(prefix, dtype=torch.int32, device=values.device).view(torch.float32)

    def smallest(self, value: Tensor) -> Tensor:
        """The smallest of a positive scalar over all ranks; those with 0 have none."""
        if self.size == 1:
            return value
        found = torch.where(value > 0, value, torch.inf)
        with self.talking():
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return torch.where(found.isinf(), 0, found)

    def close(self) -> None:
        """Part, all ranks together; nothing more can be reduced. A second call does nothing.

        Gloo's threads end with the last reference to their group, not with `destroy_process_group`. One that still runs
        while Python takes itself apart aborts the process ("terminate called without an active exception") when it
        drops a tensor: it asks for Python's lock, and is ended inside of a function that must not be left.
        """
        if self.group.mesh is None:
            return
        self.barrier()
        self.group.mesh = None
        dist.destroy_process_group()
        gc.collect()


ALONE = Comm()


def join(
    device: torch.device, feature_shards: int = 1, *, timeout_seconds: float = 600, place: RankPlace | None = None
) -> Comm:
    """The mesh of the ranks that torchrun or srun started, `feature_shards` of them holding the latents together.

    A process that was not started together with others is alone. A rank that is lost ends the others after
    `timeout_seconds`. Raises CommError where the number of ranks is not a multiple of the shards, RankLostError where
    they do not all come.
    """
    place = place or rank_place()
    if place.size % feature_shards:
        raise CommError(
            f"train.feature_shards {feature_shards} does not divide the {place.size} ranks"
            + ("; start them with torchrun --nproc-per-node" if place.size == 1 else "")
        )
    if place.size == 1:
        return ALONE
    shape = (place.size // feature_shards, feature_shards)
    comm = Comm(0, shape[0], 0, feature_shards, timeout_seconds=timeout_seconds)
    with comm.talking():
        if not dist.is_initialized():
            # before there is a group: modules below it take the group of their import as a default, and keep it alive
            importlib.import_module("torch.distributed.checkpoint")
            os.environ.update(place.rendezvous)
            # what is in host memory, flags and small objects, goes by gloo on every machine
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "feature"))
    places = mesh.get_local_rank("data"), mesh.get_local_rank("feature")
    return Comm(places[0], shape[0], places[1], feature_shards, _Group(mesh), timeout_seconds)
