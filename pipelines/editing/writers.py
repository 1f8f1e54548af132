"""Which weights write what stands at a hook point: found by a forward pass, not by names.

A module writes a hook point where its output is the very tensor that stands there; a bias reaches a hook point where
moving the module's output moves the hook point by the same vector and by nothing else.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saeql.sae.hook_points import layer_stack, resolve
from saeql.sae.hooks import capture

from .affine import AffineChange, EditError

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Writer:
    """Modules whose outputs add up to what stands at a hook point; a shift goes to the first of them."""

    paths: tuple[str, ...]


@torch.no_grad()
def writer_of(model: Any, hook_point: str, change: AffineChange) -> Writer:
    """The modules that hold `change` at `hook_point`: one projection, or the embeddings.

    Raises EditError, saying why, where no weights of the model do; HookPointError for an unknown hook point.
    """
    point = resolve(model, hook_point)
    kind, _, number = hook_point.partition(".")
    before = f"resid_post.{int(number) - 1}" if kind == "resid_pre" and number.isdigit() and int(number) > 0 else ""
    probe = _Probe(model, [hook_point])
    found = probe.writes(hook_point)
    if found:
        return Writer(found)
    if kind not in ("resid_post", "resid_pre"):
        raise EditError(_why_not(model, hook_point, point.module_path, point.side))
    if hook_point == "resid_pre.0":
        raise EditError("resid_pre.0 is not the sum of the embeddings in this model (they are scaled or normed)")
    if not change.is_shift:
        raise EditError(
            f"{hook_point} is a sum of what the embedding and all layers before it write: taking a direction out of it "
            "would need all of them projected, and then the layers between see a projected stream, which the hooked "
            "model does not do; --everywhere takes it out of every writer (weight orthogonalisation), and at "
            "mlp_out.N or attn_out.N it is exact"
        )
    layer = (before or hook_point).partition(".")[2]
    own = _Probe(model, [f"mlp_out.{layer}"]).writes(f"mlp_out.{layer}")
    if not own:
        point = resolve(model, f"mlp_out.{layer}")
        raise EditError(f"{hook_point}: " + _why_not(model, f"mlp_out.{layer}", point.module_path, point.side))
    if not _moves(model, own[0], hook_point, len(change.offset)):
        raise EditError(
            f"{hook_point} does not move by what is added to mlp_out.{layer}: this model norms or scales the sum, so "
            "no bias can hold a vector added there"
        )
    return Writer(own)


def everywhere(model: Any) -> list[str]:
    """Hook points at which together everything is written to the residual stream: the embedding, then every layer."""
    num_layers = len(layer_stack(model)[1])
    return ["resid_pre.0", *(f"{kind}.{n}" for n in range(num_layers) for kind in ("attn_out", "mlp_out"))]


def _why_not(model: Any, hook_point: str, path: str, side: str) -> str:
    module = model.get_submodule(path)
    inner = [name for name, _ in module.named_modules() if "expert" in name.lower()]
    if inner:
        return f"{hook_point} is a weighted sum over experts, each with weights of its own: no one of them can hold it"
    if side == "in":
        return f"{hook_point} is what a module reads, after a norm: no weights write it alone"
    if not list(module.children()) and "norm" in type(module).__name__.lower():
        return (
            f"{hook_point} is the output of a norm ({path}) that follows the output projection and has no bias: no "
            "weights can hold a change after it"
        )
    return f"no single projection of this model gives what stands at {hook_point}"


class _Probe:
    """One forward pass over a few tokens, with the outputs of all projections and embeddings."""

    def __init__(self, model: Any, names: Sequence[str]):
        self.model = model
        self.outputs: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for path, module in model.named_modules():
                if _is_projection(module) or isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(self._keep(path)).remove)
            reader = stack.enter_context(capture(model, list(names)))
            self.acts = {name: acts.float() for name, acts in reader.run(_ids(model)).items()}

    def _keep(self, path: str) -> Any:
        def keep(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            self.outputs[path] = output.detach().float()

        return keep

    def writes(self, name: str) -> tuple[str, ...]:
        """Paths of the modules whose outputs are, or add up to, the activations at a hook point; none: ()."""
        acts = self.acts[name]
        for path, output in self.outputs.items():
            if isinstance(self.model.get_submodule(path), nn.Embedding):
                continue
            if output.numel() == acts.numel() and torch.equal(output.reshape(acts.shape), acts):
                return (path,)
        return self._embeddings(acts)

    def _embeddings(self, acts: torch.Tensor) -> tuple[str, ...]:
        """Paths of all embeddings, that of tokens first, where the activations are the sum of their rows."""
        tokens = self.model.get_input_embeddings()
        found = {p: o for p, o in self.outputs.items() if isinstance(self.model.get_submodule(p), nn.Embedding)}
        first = sorted(found, key=lambda path: self.model.get_submodule(path) is not tokens)
        if not found or any(output.shape[-2:] != acts.shape[-2:] for output in found.values()):
            return ()
        if not torch.equal(found[first[0]], tokens.weight[_ids(self.model)].float()):  # Gemma scales them
            return ()
        total = torch.stack([output.expand_as(acts) for output in found.values()]).sum(0)
        return tuple(first) if bool((total - acts).norm() <= _TOLERANCE * acts.norm()) else ()


def _moves(model: Any, path: str, hook_point: str, width: int) -> bool:
    """Whether a vector added to a module's output moves the activations at a hook point by just that vector."""
    ids = _ids(model)
    with capture(model, [hook_point]) as reader:
        before = reader.run(ids)[hook_point].float()
    step = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(before) * before.std()
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _module, _args, output: output + step.to(output))
    try:
        with capture(model, [hook_point]) as reader:
            after = reader.run(ids)[hook_point].float()
    finally:
        handle.remove()
    return bool((after - before - step).norm() <= 1e-3 * (after - before).norm())


def _ids(model: Any) -> torch.Tensor:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))
    return ids.to(model.get_input_embeddings().weight.device)


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's kind of projection, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
