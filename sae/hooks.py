"""Reads and changes activations at hook points: `capture` and `edit`. Harvest and steering share both.

What a module reads or gives is brought to one row a token, [B, T, d]: rows of all windows in one list, as OPT's MLP and
the experts of mixture models have them, are parted by window, and heads that stand beside each other are joined.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .hook_points import HookPoint, HookPointError, layer_stack, resolve

Change = Callable[[torch.Tensor], torch.Tensor | None]


class _StopForward(Exception):
    """Ends a forward pass once the deepest hook point has been read."""


class _Hook:
    """Calls `fn` with the activations [B, T, d] at a hook point; a tensor that it returns takes their place.

    `fn` works on `device`; None leaves activations where the model has them.
    """

    def __init__(self, model: nn.Module, point: HookPoint, fn: Change, device: torch.device | None):
        self.point, self.fn, self.device = point, fn, device
        self.lead: torch.Size | None = None  # B and T of the layer's input
        self.handles = []
        module = model.get_submodule(point.module_path)
        if point.layer is not None:
            layer = layer_stack(model)[1][point.layer]
            if layer is not module:
                self.handles.append(layer.register_forward_pre_hook(self._note_lead, with_kwargs=True))
        if point.side == "in":
            self.handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
        else:
            self.handles.append(module.register_forward_hook(self._after))

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()

    def _note_lead(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.lead = _input(self.point, args, kwargs)[1].shape[:2]

    def _before(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        key, acts = _input(self.point, args, kwargs)
        new = self._changed(acts)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

    def _after(self, _module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return self._changed(self._entry((output,)))
        entries = tuple(output.values()) if isinstance(output, dict) else tuple(output)
        new = self._changed(self._entry(entries))
        if new is None:
            return None
        if not isinstance(output, tuple):
            raise HookPointError(f'hook point "{self.point.name}" gives a {type(output).__name__}, which is only read')
        return (*entries[: self.point.index], new, *entries[self.point.index + 1 :])

    def _entry(self, entries: tuple) -> torch.Tensor:
        index = self.point.index
        if index < len(entries) and isinstance(entries[index], torch.Tensor):
            return entries[index]
        raise HookPointError(
            f'hook point "{self.point.name}": entry {index} of the output is no tensor; tensors are '
            f"{', '.join(str(n) for n, entry in enumerate(entries) if isinstance(entry, torch.Tensor)) or 'none'}"
        )

    def _changed(self, acts: torch.Tensor) -> torch.Tensor | None:
        rows = as_rows(acts, self.lead, self.point.name)
        new = self.fn(rows if self.device is None else rows.to(self.device))
        # a copy, since some models (Falcon) go on to add to it in place
        return None if new is None else new.to(acts.device).reshape(acts.shape).clone()


def as_rows(acts: torch.Tensor, lead: torch.Size | None, name: str) -> torch.Tensor:
    """What a module reads or gives as rows [B, T, d]; `lead` is (B, T) where known.

    Raises HookPointError where it has not one row for every token.
    """
    if acts.dim() >= 3 and lead in (None, acts.shape[:2]):
        return acts.flatten(2)
    if acts.dim() == 2 and lead is not None and len(acts) == lead.numel():
        return acts.reshape(*lead, -1)
    tokens = f"{lead[0]} x {lead[1]} tokens" if lead else "a token"
    raise HookPointError(f'hook point "{name}" gives a tensor {list(acts.shape)}, not one row for each of {tokens}')


def _input(point: HookPoint, args: tuple, kwargs: dict) -> tuple[str | None, torch.Tensor]:
    """The activations that a module is called with, and their keyword (None: the first positional argument)."""
    if args and isinstance(args[0], torch.Tensor):
        return None, args[0]
    keys = ["hidden_states", *kwargs]
    key = next((k for k in keys if isinstance(kwargs.get(k), torch.Tensor)), None)
    if key is None:
        raise HookPointError(f'hook point "{point.name}": {point.module_path} is called without a tensor')
    return key, kwargs[key]


class Capture:
    """Reads hook points of a model. `run` does one forward pass that ends at the deepest of them."""

    def __init__(self, model: nn.Module, points: list[HookPoint]):
        self.model, self.points = model, points
        self.acts: dict[str, torch.Tensor] = {}
        self.stop = False

    def run(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Activations [B, T, d] by hook point name for token ids [B, T]; layers after the deepest are not run.

        Raises HookPointError where a hook point gives no row for every token, or is not reached by a forward pass.
        """
        self.acts, self.stop = {}, True
        modules = {self.model.get_submodule(point.module_path) for point in self.points}
        trunk = getattr(self.model, "base_model", self.model)
        run = trunk if modules.issubset(trunk.modules()) else self.model  # no LM head, unless a hook point is there
        options = {"use_cache": False} if "use_cache" in inspect.signature(trunk.forward).parameters else {}
        try:
            run(input_ids=input_ids, attention_mask=attention_mask, **options)
        except _StopForward:
            pass
        finally:
            self.stop = False
        missing = [point.name for point in self.points if point.name not in self.acts]
        if missing:
            raise HookPointError(f'hook point "{missing[0]}" is not reached by a forward pass of {type(run).__name__}')
        return self.acts

    def _read(self, name: str, acts: torch.Tensor) -> None:
        self.acts[name] = acts.clone()  # some models (Falcon) go on to add to it in place
        if self.stop and len(self.acts) == len(self.points):
            raise _StopForward


@contextmanager
def capture(model: nn.Module, names: list[str], device: torch.device | None = None) -> Iterator[Capture]:
    """Attach to hook points of `model` for the length of the block.

    `with capture(model, ["resid_post.15"]) as reader: acts = reader.run(input_ids)["resid_post.15"]`.
    A full forward pass of the model inside the block also fills `reader.acts`.
    `device` gathers the activations of a model that is spread over several; None leaves them where they are.
    Raises HookPointError for a hook point that the model does not have.
    """
    reader = Capture(model, [resolve(model, name) for name in dict.fromkeys(names)])
    hooks = []
    try:
        for point in reader.points:
            hooks.append(_Hook(model, point, lambda acts, name=point.name: reader._read(name, acts), device))
        yield reader
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def edit(model: nn.Module, name: str, fn: Change, device: torch.device | None = None) -> Iterator[None]:
    """Replace the activations [B, T, d] at a hook point by `fn(acts)` for the length of the block; None: left alone.

    `fn` is given them on `device` (None: where the model has them); the result goes back to where they came from.
    Raises HookPointError for a hook point that the model does not have.
    """
    hook = _Hook(model, resolve(model, name), fn, device)
    try:
        yield
    finally:
        hook.remove()
