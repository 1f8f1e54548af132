"""Where an edit applies: which tokens of a forward pass, and how strongly each.

A token's index counts from the first real token of its row, padding left out. The prompt is what the first forward pass
reads; what follows with a cache is generated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Positions = Literal["all", "prompt", "generated"] | tuple[int, ...]
#: "constant", "fade:N", "first:N", "every:N".
Schedule = str
_NAMED = ("all", "prompt", "generated")
_SCHEDULES = ("fade", "first", "every")


def check_positions(positions: Any) -> None:
    """Raises ValueError where `positions` is neither a name nor indices."""
    if isinstance(positions, str):
        if positions not in _NAMED:
            raise ValueError(f"positions are {', '.join(_NAMED)} or indices of tokens, not {positions!r}")
    elif not (isinstance(positions, tuple) and positions and all(type(i) is int for i in positions)):
        raise ValueError(f"positions are {', '.join(_NAMED)} or indices of tokens, not {positions!r}")


def schedule_factor(schedule: Schedule | Callable[[int], float], count: int) -> float:
    """How much of an edit is made `count` tokens after the first one that it changes.

    Raises ValueError for a schedule that is none.
    """
    if callable(schedule):
        return float(schedule(count))
    if schedule == "constant":
        return 1.0
    name, _, length = schedule.partition(":")
    if name not in _SCHEDULES or not length.isdigit() or int(length) < 1:
        raise ValueError(f"a schedule is constant, {', '.join(f'{s}:N' for s in _SCHEDULES)}, not {schedule!r}")
    if name == "fade":
        return max(0.0, 1 - count / int(length))
    return float(count < int(length)) if name == "first" else float(count % int(length) == 0)


@dataclass
class Place:
    """Where the forward pass at hand stands in its texts."""

    past: int = 0
    """Tokens in the cache, padding included."""
    prompt: int = 0
    """Columns of the prompt, padding included."""
    padding: torch.Tensor | None = None
    """[B] padding tokens before each row's first; None: no padding."""
    only: torch.Tensor | None = None
    """[B] bool: texts of the batch that are changed; None: all."""

    def factors(
        self, positions: Positions, schedule: Schedule | Callable[[int], float], shape: torch.Size
    ) -> torch.Tensor | float:
        """How much of an edit is made at every token of a forward pass [B, T]: one number where all are alike."""
        if positions == "all" and schedule == "constant" and self.only is None:
            return 1.0
        num_rows, num_tokens = shape[0], shape[1]
        columns = torch.arange(self.past, self.past + num_tokens)
        padding = torch.zeros(num_rows, dtype=torch.long) if self.padding is None else self.padding
        index = columns[None] - padding[:, None]  # [B, T] from the first real token on
        length = self.prompt - padding[:, None]  # [B, 1] of the prompt
        changed, first = self._changed(positions, index, length)
        changed &= index >= 0
        if self.only is not None:
            changed &= self.only[:, None]
        if schedule == "constant":
            return changed.float()
        counts, which = (index - first).clamp_min(0).unique(return_inverse=True)
        factors = torch.tensor([schedule_factor(schedule, n) for n in counts.tolist()])
        return torch.where(changed, factors[which], 0.0)

    def _changed(
        self, positions: Positions, index: torch.Tensor, length: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if positions == "all":
            return torch.ones_like(index, dtype=torch.bool), torch.zeros_like(length)
        if positions == "prompt":
            return index < length, torch.zeros_like(length)
        if positions == "generated":
            return index >= length, length
        wanted = torch.cat([length + i if i < 0 else torch.full_like(length, i) for i in positions], dim=1)  # [B, P]
        return (index[:, :, None] == wanted[:, None]).any(2), wanted.amin(1, keepdim=True)


@contextmanager
def followed(model: nn.Module) -> Iterator[Place]:
    """Keep account of where forward passes of `model` stand, for the length of the block."""
    place = Place()
    trunk = getattr(model, "base_model", model)

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        place.past = 0 if cache is None else int(cache.get_seq_length())
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if place.past == 0 and given is not None:
            place.prompt = given.shape[1]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            place.padding = (mask.cumsum(1) == 0).sum(1).cpu()
        elif place.past == 0:
            place.padding = None

    handle = trunk.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield place
    finally:
        handle.remove()
