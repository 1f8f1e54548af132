"""Hook points of a transformers model: `capture` reads them, `edit` changes them. Harvest and steering share both.

Friendly names: `resid_pre.N` (what layer N reads), `resid_post.N` (what layer N hands on), `mlp_out.N` and `attn_out.N`
(the output of that layer's MLP or attention module). A module's dotted path names its output.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import suggestion

_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_ATTN_NAMES = ("self_attn", "attn", "attention", "self_attention")
_FRIENDLY = re.compile(r"(resid_pre|resid_post|mlp_out|attn_out)\.(\d+)")


class HookPointError(ValueError):
    """The model has no such hook point; the message lists those that it has."""


class _StopForward(Exception):
    """Ends a forward pass once the deepest hook point has been read."""


@dataclass(frozen=True)
class HookPoint:
    """A place in a model: the input or the output of a module."""

    name: str
    module_path: str
    side: str  # "in" | "out"
    layer: int | None  # None for a place outside the layer stack

    @property
    def transformer_lens_name(self) -> str:
        """TransformerLens's name of the same place, or the module path where it has none."""
        match = _FRIENDLY.fullmatch(self.name)
        return f"blocks.{match[2]}.hook_{match[1]}" if match else self.module_path


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's layers: the shallowest ModuleList with `num_hidden_layers` entries.

    Raises HookPointError where there is none.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_layers = getattr(config, "num_hidden_layers", None)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (num_layers is None or len(module) == num_layers)
    ]
    if not found:
        raise HookPointError(f"{type(model).__name__} has no stack of {num_layers} layers; name a module path instead")
    return min(found, key=lambda item: item[0].count("."))


def hook_points(model: nn.Module) -> list[str]:
    """Friendly names of all hook points of the model."""
    _, layers = layer_stack(model)
    names = []
    for n, layer in enumerate(layers):
        names += [f"resid_pre.{n}", f"resid_post.{n}"]
        names += [f"mlp_out.{n}"] if _child(layer, _MLP_NAMES) else []
        names += [f"attn_out.{n}"] if _child(layer, _ATTN_NAMES) else []
    return names


def _child(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    children = dict(layer.named_children())
    return next((name for name in names if name in children), None)


def resolve(model: nn.Module, name: str) -> HookPoint:
    """Hook point `name`. Raises HookPointError, listing those that exist, where the model has none of that name."""
    match = _FRIENDLY.fullmatch(name)
    if match:
        path, layers = layer_stack(model)
        kind, n = match[1], int(match[2])
        if n < len(layers):
            if kind in ("resid_pre", "resid_post"):
                return HookPoint(name, f"{path}.{n}", "in" if kind == "resid_pre" else "out", n)
            child = _child(layers[n], _MLP_NAMES if kind == "mlp_out" else _ATTN_NAMES)
            if child:
                return HookPoint(name, f"{path}.{n}.{child}", "out", n)
    elif name and name in dict(model.named_modules()):
        inner = re.search(r"\.(\d+)(\.|$)", name)
        return HookPoint(name, name, "out", int(inner[1]) if inner else None)
    known = hook_points(model)
    _, layers = layer_stack(model)
    kinds = sorted({k.split(".")[0] for k in known})
    listing = ", ".join(f"{kind}.0 to {kind}.{len(layers) - 1}" for kind in kinds)
    raise HookPointError(
        f'no hook point "{name}" in this {type(model).__name__}{suggestion(name, known)}'
        f"; it has {listing}, and every module path (such as {layer_stack(model)[0]}.0)"
    )


def _register(
    model: nn.Module, point: HookPoint, fn: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    """Call `fn` with the activations at `point`; a tensor that it returns takes their place."""
    module = model.get_submodule(point.module_path)
    if point.side == "in":

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            new = fn(args[0] if args else kwargs["hidden_states"])
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        new = fn(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(after)


class Capture:
    """Reads hook points of a model. `run` does one forward pass that ends at the deepest of them."""

    def __init__(self, model: nn.Module, points: list[HookPoint]):
        self.model, self.points = model, points
        self.acts: dict[str, torch.Tensor] = {}
        self.stop = False

    def run(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Activations [B, T, d] by hook point name for token ids [B, T]; layers after the deepest are not run."""
        self.acts, self.stop = {}, True
        trunk = getattr(self.model, "base_model", self.model)  # no LM head
        try:
            trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        except _StopForward:
            pass
        finally:
            self.stop = False
        return self.acts

    def _read(self, name: str, acts: torch.Tensor) -> None:
        self.acts[name] = acts
        if self.stop and len(self.acts) == len(self.points):
            raise _StopForward


@contextmanager
def capture(model: nn.Module, names: list[str]) -> Iterator[Capture]:
    """Attach to hook points of `model` for the length of the block.

    `with capture(model, ["resid_post.15"]) as reader: acts = reader.run(input_ids)["resid_post.15"]`.
    A full forward pass of the model inside the block also fills `reader.acts`.
    Raises HookPointError for a hook point that the model does not have.
    """
    reader = Capture(model, [resolve(model, name) for name in names])
    handles = []
    try:
        for point in reader.points:
            handles.append(_register(model, point, lambda acts, name=point.name: reader._read(name, acts)))
        yield reader
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edit(model: nn.Module, name: str, fn: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Replace the activations [B, T, d] at a hook point by `fn(acts)` for the length of the block.

    Raises HookPointError for a hook point that the model does not have.
    """
    handle = _register(model, resolve(model, name), fn)
    try:
        yield
    finally:
        handle.remove()
