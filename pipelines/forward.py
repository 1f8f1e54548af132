"""The forward pass over windows at several hook points, shared by harvest and by training straight from the model.

Hooks are attached once. Where memory runs out, the batch is halved, the smaller size is kept, and the pass goes on. On
a GPU, activations come down through pinned memory; with a stream of its own, the pass runs beside what training does.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from saeql.sae.hooks import capture

from .models import LanguageModel, ModelError

BatchT = TypeVar("BatchT")

#: What an allocator without memory says: torch's on the CPU (a plain RuntimeError), cuBLAS's for its workspace.
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class HookRows:
    """Activations of windows at one hook point, and their norms."""

    values: NDArray  # [B, T, d]: uint16 bits of bfloat16, or float32
    norms: NDArray[np.float32]  # [B, T]


def stored_dtype(language_model: LanguageModel) -> str:
    """bfloat16 models are stored as such, others as float32: nothing that the model computed is rounded away."""
    return "bfloat16" if language_model.model.dtype == torch.bfloat16 else "float32"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


class ForwardPass:
    """Inside the block, reads hook points of a model; layers after the deepest are not run.

    `max_windows` is the most windows that are put through at once: None until memory ran out for the first time. A
    `stream_of_its_own` lets the pass run beside other work on the same GPU; elsewhere it changes nothing.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        hook_points: Sequence[str],
        *,
        max_windows: int | None = None,
        stream_of_its_own: bool = False,
    ):
        self.lm, self.hook_points, self.max_windows = language_model, list(hook_points), max_windows
        self.num_halvings = 0
        device = language_model.device
        self._is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_gpu and stream_of_its_own else None
        self._as_bits = stored_dtype(language_model) == "bfloat16"

    def __enter__(self) -> "ForwardPass":
        self._stack = ExitStack()
        self._reader = self._stack.enter_context(capture(self.lm.model, self.hook_points))
        if self._stream is not None:  # weights were written on the stream that is current now
            self._stream.wait_stream(torch.cuda.current_stream(self.lm.device))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._reader.acts = {}

    def run(self, token_ids: NDArray[np.int32]) -> dict[str, HookRows]:
        """Activations by hook point of windows [B, T].

        Raises ModelError where memory does not suffice for one window.
        """
        return self._finish(self._start(token_ids))

    def over(
        self, batches: Iterable[BatchT], ids_of: Callable[[BatchT], NDArray[np.int32]]
    ) -> Iterator[tuple[BatchT, dict[str, HookRows]]]:
        """Every batch with its activations. On a GPU a batch is started before the one ahead of it is waited for."""
        waiting: tuple[BatchT, list[_Started]] | None = None
        for batch in batches:
            started = (batch, self._start(ids_of(batch)))
            if waiting is not None:
                yield waiting[0], self._finish(waiting[1])
            waiting = started
            if not self._is_gpu:
                yield batch, self._finish(started[1])
                waiting = None
        if waiting is not None:
            yield waiting[0], self._finish(waiting[1])

    def _start(self, token_ids: NDArray[np.int32]) -> "list[_Started]":
        """The pass over [B, T] in as many parts as memory asks for."""
        parts, start = [], 0
        while start < len(token_ids):
            stop = min(len(token_ids), start + (self.max_windows or len(token_ids)))
            part = self._try(token_ids[start:stop])
            if part is None:
                self._halve(stop - start, token_ids.shape[1])
            else:
                parts.append(part)
                start = stop
        return parts

    def _try(self, token_ids: NDArray[np.int32]) -> "_Started | None":
        """The pass over a part [b, T]; None where memory ran out."""
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):  # None changes nothing
                return self._pass(token_ids)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None  # only here is the exception gone, and with it the frames that hold tensors

    def _pass(self, token_ids: NDArray[np.int32]) -> "_Started":
        ids = torch.from_numpy(token_ids).long()
        if self._is_gpu:
            ids = ids.pin_memory()
        captured = self._reader.run(ids.to(self.lm.input_device, non_blocking=self._is_gpu))
        self._reader.acts = {}
        found, streams = {}, {}
        for name in self.hook_points:
            acts = captured.pop(name)
            norms = acts.float().norm(dim=-1)
            values = acts.view(torch.uint16) if self._as_bits else acts.float()
            found[name] = (_to_host(values), _to_host(norms))
            if acts.is_cuda:  # a spread model has its activations on several GPUs
                streams[acts.device] = torch.cuda.current_stream(acts.device)
        events = []
        for stream in streams.values():
            events.append(torch.cuda.Event(blocking=True))  # to wait without turning a core
            events[-1].record(stream)
        return _Started(found, events)

    def _halve(self, num_windows: int, context_tokens: int) -> None:
        self._reader.acts = {}  # what was read before memory ran out
        if num_windows == 1:
            raise ModelError(
                f"memory ran out in the forward pass over one window of {context_tokens} tokens "
                "(harvest.batch_windows was halved down to 1): lower harvest.context_tokens, or take a smaller model"
            )
        self.max_windows, self.num_halvings = num_windows // 2, self.num_halvings + 1
        if self._is_gpu:
            torch.cuda.empty_cache()
        print(
            f"saeql: memory ran out on {num_windows} windows of {context_tokens} tokens; going on with "
            f"{self.max_windows} at once (harvest.batch_windows)",
            file=sys.stderr,
        )

    def _finish(self, parts: "list[_Started]") -> dict[str, HookRows]:
        """Wait for a pass; parts are put together. Nothing where there were no windows."""
        if not parts:
            return {}
        for event in (event for part in parts for event in part.events):
            event.synchronize()
        arrays = {name: [part.found[name] for part in parts] for name in self.hook_points}
        return {name: HookRows(_joined([v for v, _ in all_]), _joined([n for _, n in all_]))
                for name, all_ in arrays.items()}  # fmt: skip


@dataclass(frozen=True)
class _Started:
    """A pass whose results are on their way: ready once the events have happened."""

    found: dict[str, tuple[torch.Tensor, torch.Tensor]]  # values [b, T, d] and norms [b, T], on the CPU
    events: list[torch.cuda.Event]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory that the current stream of a GPU will have written; a CPU's tensor as it is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _joined(parts: list[torch.Tensor]) -> NDArray:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
