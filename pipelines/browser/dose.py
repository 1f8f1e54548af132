"""Dose and response: how far the next word moves as edits are made stronger, before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..steering.edits import Edit
    from ..steering.steerer import Steerer

#: Multiples of the strengths that are set.
FACTORS = (-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Dose:
    """What one multiple of the strengths does to the prediction after the prompt."""

    factor: float
    kl: float  # nats, of the changed prediction from the model's own
    promoted: float | None  # log probability of the promoted tokens as a whole, less the model's own; None without any
    likeliest: str


def doses(steerer: "Steerer", prompt: str, edits: "Sequence[Edit]", promoted: Sequence[str]) -> list[Dose]:
    """One forward pass over the prompt for every factor at which all edits may be made.

    Raises SteerError where edits cannot be made as they are.
    """
    import torch

    from ..steering.edits import SteerError

    lm = steerer.lm
    ids = torch.tensor(
        [[lm.bos_id, *lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]]], device=lm.input_device
    )
    wanted = [lm.tokenizer(token, add_special_tokens=False)["input_ids"] for token in promoted]
    whole = [tokens[0] for tokens in wanted if len(tokens) == 1]

    @torch.no_grad()
    def predict(changes: "Sequence[Edit]") -> "torch.Tensor":
        with steerer.applied(changes):
            return torch.log_softmax(lm.model(ids).logits[0, -1].float(), -1).cpu()

    base = predict([])
    for edit in edits:
        edit.check()
    found = []
    for factor in FACTORS:
        scaled = [replace(edit, strength=edit.amount * factor) for edit in edits]
        try:
            for edit in scaled:
                edit.check()
        except SteerError:  # beyond what may be asked for
            continue
        new = predict(scaled)
        shift = float(new[whole].logsumexp(0) - base[whole].logsumexp(0)) if whole else None
        kl = float((base.exp() * (base - new)).sum())
        found.append(Dose(factor, max(kl, 0.0), shift, lm.token_texts([int(new.argmax())])[0]))
    return found
