"""A model's predictions with activations replaced: run once as it is, then again and again with something in place.

Layers that no replacement reaches give the same output every time, so that only the first run computes them: half of
the model for a hook point in its middle. Whether that holds for a model is checked on its first batch.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from saeql.sae.hook_points import HookPointError, layer_stack, resolve
from saeql.sae.hooks import capture, edit


class Splicer:
    """Inside the block: `run` gives logits and activations of a batch, `again` its logits with some replaced.

    Activations are gathered on `device` (None: where the model has them). `last_only`: logits of the last position
    alone, [B, 1, V]. Gradients are taken where the caller lets them, and reach `new`.
    Raises HookPointError for a hook point that the model does not have.
    """

    def __init__(
        self,
        model: Any,
        reads: Sequence[str],
        writes: Sequence[str],
        device: torch.device | None = None,
        *,
        last_only: bool = False,
    ):
        self.model, self.reads, self.writes, self.device = model, list(reads), list(writes), device
        self.last_only = last_only
        can_keep = last_only and "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} | ({"logits_to_keep": 1} if can_keep else {})
        self._new: Mapping[str, torch.Tensor] = {}
        self._ids: torch.Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Splicer":
        with ExitStack() as stack:
            self._prefix = stack.enter_context(_prefix(self.model, self.writes))
            self._reader = stack.enter_context(capture(self.model, self.reads, self.device))
            for name in self.writes:
                stack.enter_context(
                    edit(self.model, name, lambda acts, name=name: self._new.get(name, acts), self.device)
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits [B, T, V] of ids [B, T] as the model is, and its activations [B, T, d] at every hook point read."""
        self._ids = ids
        with self._prefix.recorded():
            logits = self._forward()
        acts = dict(self._reader.acts)
        self._prefix.check(self._forward, logits)
        return logits, acts

    def widen(self, size: int) -> None:
        """From now on `again` takes `size` rows of the one row of ids of the last `run`, which is not computed anew."""
        assert self._ids is not None
        self._ids = self._ids[:1].expand(size, -1)
        self._prefix.widen(size)

    def again(self, new: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits of the same ids with `new` [B, T, d] in place at hook points that are written."""
        self._new = new
        try:
            with self._prefix.replayed():
                return self._forward()
        finally:
            self._new = {}

    def _forward(self) -> torch.Tensor:
        logits = self.model(input_ids=self._ids, **self._options).logits
        return logits[:, -1:] if self.last_only else logits


class _Prefix:
    """The first layers of a model, whose output is recorded in one forward pass and given back in others."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        self.output: Any = None
        self._given: Any = None  # what replayed layers give
        self.is_checked = not self.layers
        self._recording = False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A forward pass in the block records."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def record(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        """Hook of the last layer."""
        if self._recording:
            self.output = self._given = output

    def widen(self, size: int) -> None:
        """Give back the recorded output of one row as that of `size` equal ones."""

        def wide(part: Any) -> Any:
            return (
                part.expand(size, *part.shape[1:]).contiguous()
                if isinstance(part, torch.Tensor) and len(part) == 1
                else part
            )

        whole = self.output
        self._given = type(whole)(map(wide, whole)) if type(whole) in (tuple, list) else wide(whole)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The layers give back what was recorded instead of computing; their hooks still run."""
        before = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for layer in self.layers:
                layer.forward = lambda *_args, **_kwargs: self._given
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward

    def check(self, forward: Any, expected: torch.Tensor) -> None:
        """Give up on replaying unless it leads to the very same logits: some models hand more than the residual stream
        from layer to layer.
        """
        if self.is_checked:
            return
        self.is_checked = True
        try:
            with self.replayed():
                same = torch.equal(forward(), expected)
        except Exception:  # whatever a layer that gets less than it expects may raise
            same = False
        if not same:
            self.layers = []


@contextmanager
def _prefix(model: nn.Module, writes: Sequence[str]) -> Iterator[_Prefix]:
    """The layers that end before any of the hook points is written."""
    try:
        path, layers = layer_stack(model)
    except HookPointError:
        path, layers = "", nn.ModuleList()
    num_layers = min((_num_layers_before(model, name, path) for name in writes), default=0)
    prefix = _Prefix(list(layers)[:num_layers])
    handle = prefix.layers[-1].register_forward_hook(prefix.record) if prefix.layers else None
    try:
        yield prefix
    finally:
        if handle:
            handle.remove()


def _num_layers_before(model: nn.Module, name: str, path: str) -> int:
    point = resolve(model, name)
    if point.layer is None or not f"{point.module_path}.".startswith(f"{path}.{point.layer}."):
        return 0
    is_layer_output = point.side == "out" and point.module_path == f"{path}.{point.layer}"
    return point.layer + is_layer_output
