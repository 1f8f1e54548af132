"""One prompt in a model: gradients and values of a target with other activations in place."""

from collections.abc import Iterable
from itertools import islice

import torch

from ..splice import Splicer
from .parts import Parts
from .target import Target

#: Tokens of forward passes held in memory at once: without and with what a gradient needs.
BATCH_TOKENS, GRADIENT_TOKENS = 2048, 512


class Scene:
    """One prompt in a splicer, first as it is, then with other activations in as large batches as are allowed."""

    def __init__(self, splicer: Splicer, ids: torch.Tensor):
        self.splicer, self.ids = splicer, ids  # [1, T]
        with torch.no_grad():
            logits, acts = splicer.run(ids)
        self.logits = logits[0, -1].float()  # [V]
        self.acts = {name: rows[0].float() for name, rows in acts.items()}  # [T, d]

    def _batch(self, tokens: int, wanted: int) -> int:
        return max(1, min(wanted, tokens // self.ids.shape[1]))

    def gradient(self, name: str, target: Target, parts: Parts, steps: int) -> torch.Tensor:
        """[T, d]: the target's gradient at hook point `name`, mean over the path that `parts` take."""
        if steps == 1:
            places = [1.0]
        else:
            places = [(n + 0.5) / steps for n in range(steps)]
        size = self._batch(GRADIENT_TOKENS, steps)
        total = torch.zeros_like(parts.acts)
        self.splicer.widen(size)
        for start in range(0, steps, size):
            some = places[start : start + size]
            rows = [parts.acts + (place - 1) * parts.whole for place in some]
            leaf = torch.stack(rows + rows[-1:] * (size - len(rows))).requires_grad_()
            with torch.enable_grad():
                values = target.of(self.splicer.again({name: leaf})[:, -1].to(leaf.device))
                total += torch.autograd.grad(values[: len(rows)].sum(), leaf)[0].sum(0)
        return total / steps

    @torch.no_grad()
    def values(self, name: str, target: Target, new: Iterable[torch.Tensor], count: int) -> torch.Tensor:
        """[count] target values with each of the `count` tensors of `new` [T, d] in place."""
        size, found, following = self._batch(BATCH_TOKENS, count), [], iter(new)
        self.splicer.widen(size)
        while some := list(islice(following, size)):
            logits = self.splicer.again({name: torch.stack([*some, *some[-1:] * (size - len(some))])})
            found.append(target.of(logits[: len(some), -1]).cpu())
        return torch.cat(found)
