"""Hook points of a configuration: globs become names that this model has; and the list that `saeql hooks` prints."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from saeql.sae.config import ConfigError
from saeql.sae.hook_points import (
    KINDS,
    HookPoint,
    HookPointError,
    hook_points,
    is_glob,
    matching,
    resolve,
    resolve_all,
)  # fmt: skip
from saeql.sae.hooks import as_rows

from .config import RunConfig
from .model_config import ModelConfig
from .models import load_skeleton

_LEAD = torch.Size((2, 3))


def settle(config: RunConfig) -> RunConfig:
    """The configuration with every glob of hook points replaced by what it stands for in this model.

    Globs of the dictionary and of the sweep choose among the harvested hook points. Raises HookPointError where a glob
    stands for nothing.
    """
    names = config.model.hook_points
    if any(map(is_glob, names)):
        whole = load_skeleton(config.model)
        found = [point.name for name in names for point in resolve_all(whole, name)]
        first, *more = dict.fromkeys(found)
        config = replace(config, model=replace(config.model, hook_point=first, more_hook_points=tuple(more)))
    dictionary, sweep, harvested = config.dictionary, config.sweep, config.model.hook_points
    return replace(
        config,
        dictionary=replace(
            dictionary,
            reads=_chosen("dictionary.reads", dictionary.reads, harvested),
            writes=_chosen("dictionary.writes", dictionary.writes, harvested),
        ),
        sweep=replace(sweep, hook_points=_chosen("sweep.hook_points", sweep.hook_points, harvested)),
    )


def _chosen(key: str, patterns: Sequence[str], harvested: Sequence[str]) -> tuple[str, ...]:
    """Names as they are, globs replaced by the harvested hook points that they match."""
    found = []
    for pattern in patterns:
        hits = matching(pattern, harvested) if is_glob(pattern) else [pattern]
        if not hits:
            raise ConfigError(f'{key}: "{pattern}" matches none of the harvested hook points, {", ".join(harvested)}')
        found += hits
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Listed:
    """One line about a hook point, or about the same place of several layers (`*` in its name)."""

    hook_point: str
    module: str
    reads: str  # "input" | "output"
    layers: str  # "0 to 29"; "" outside the layers
    shape: str  # [B, T, d]; "?" where only a real forward pass would tell, "not by token" where it cannot be harvested


def list_hook_points(config: ModelConfig, pattern: str = "") -> list[Listed]:
    """What can be read of a model: friendly names, then the modules that a forward pass calls, by layer in one line.

    With `pattern`: every hook point that this name or glob stands for. Only the model's configuration is read; shapes
    come from a forward pass without weights.
    Raises ModelError where there is no such model, HookPointError where the pattern stands for nothing.
    """
    whole = load_skeleton(config)
    called = _shapes(whole)
    if pattern:
        points = resolve_all(whole, pattern)
        return [_listed(p, called, "" if p.layer is None else str(p.layer)) for p in points]
    points = [resolve(whole, name) for name in hook_points(whole)]
    modules = [path for path, module in whole.named_modules() if path and (path, "output") in called]
    groups: dict[str, list[HookPoint]] = {}
    for point in [*points, *(resolve(whole, path) for path in modules)]:
        groups.setdefault(_any_layer(point.name, point), []).append(point)
    lines = []
    for name, members in groups.items():
        first, last = members[0], members[-1]
        if len(members) == 1:
            lines.append(_listed(first, called, "" if first.layer is None else str(first.layer)))
            continue
        line = _listed(first, called, f"{first.layer} to {last.layer}")
        lines.append(replace(line, hook_point=name, module=_any_layer(line.module, first)))
    kinds = [line for line in lines if line.hook_point.split(".")[0] in KINDS]
    return sorted(kinds, key=lambda line: KINDS.index(line.hook_point.split(".")[0])) + lines[len(kinds) :]


def _any_layer(path: str, point: HookPoint) -> str:
    """A name or path with `*` for the number of its layer."""
    return path if point.layer is None else re.sub(rf"\.{point.layer}(?=\.|$)", ".*", path, count=1)


def _listed(point: HookPoint, called: dict[tuple[str, str], torch.Size], layers: str) -> Listed:
    reads = "input" if point.side == "in" else "output"
    shape = called.get((point.module_path, reads))
    text = "?"
    if shape is not None:
        try:
            text = f"[B, T, {as_rows(torch.empty(shape, device='meta'), _LEAD, point.name).shape[-1]}]"
        except HookPointError:
            text = "not by token"
    return Listed(point.name, point.module_path, reads, layers, text)


@torch.no_grad()
def _shapes(whole: Any) -> dict[tuple[str, str], torch.Size]:
    """Shapes of what every module reads ("input") and gives ("output"), by its path, for 2 windows of 3 tokens."""
    found: dict[tuple[str, str], torch.Size] = {}
    handles = []
    for path, module in whole.named_modules():

        def note(_module: Any, args: tuple, kwargs: dict, output: Any, path: str = path) -> None:
            entries = output if isinstance(output, tuple) else (output,)
            for reads, values in (("input", (*args, *kwargs.values())), ("output", entries)):
                first = next((v for v in values if isinstance(v, torch.Tensor)), None)
                if first is not None:
                    found[path, reads] = first.shape

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    # a model may ask for values, which tensors without weights have none of: shapes up to there are known
    with suppress(Exception):
        whole(input_ids=torch.ones(*_LEAD, dtype=torch.long, device="meta"))
    for handle in handles:
        handle.remove()
    return found
