"""What an edit moved: an edited model beside the original and beside the hooked one, on held-out text."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saeql.sae.metrics import Bootstrap, DocumentGroups, Estimate, ratio

from ..evaluate import compare_logits
from ..models import LanguageModel
from ..progress import progress
from ..split_rows import sample_windows
from ..token_classes import pad_lists
from .affine import EditError

if TYPE_CHECKING:
    from ..run import Run

_TOKENS_NAMED = 10


@dataclass(frozen=True)
class WhatMoved:
    """An edited model on held-out windows; intervals are 95 %, over documents."""

    num_windows: int
    window_tokens: int
    num_tokens: int
    """Predictions compared."""
    ce_before: Estimate
    ce_after: Estimate
    ce_increase: Estimate
    """Nats a token."""
    kl: Estimate
    """Of the edited model's predictions from the original's, nats."""
    changed_share: Estimate
    """Share of predictions whose likeliest token is another."""
    risen: list[tuple[str, float]]
    """Tokens whose mean probability rises most, with by how much."""
    fallen: list[tuple[str, float]]
    largest_difference: float
    """Between the logits of the edited model and of the hooked one, over all windows and tokens."""
    largest_logit: float
    tolerance: float
    num_beyond: int
    """Tokens of all windows at which it is more than the tolerance."""
    rounding: "Rounding | None"
    """Why, where it is; None where no token is beyond."""

    @property
    def is_equal(self) -> bool:
        """Whether the edited model is the hooked one."""
        return self.largest_difference <= self.tolerance

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "is_equal": self.is_equal}


@dataclass(frozen=True)
class Rounding:
    """The token whose logits are furthest apart, and how far float32 itself is off there."""

    position: int
    text: str
    largest_in_float64: float
    """Between edited and hooked model in float64, over the token's window."""
    of_hooked: float
    """Between the hooked model in float32 and in float64, at the token."""
    of_edited: float


def heldout_windows(run: "Run", num: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `num` test windows [W, T] of token ids, evenly spread, and the document of every token.

    Raises EditError where the run has none.
    """
    table = run.evidence.read("windows", columns=["split", "token_ids", "document_ids"], split="test")
    ids, owners = (pad_lists(table[name]) for name in ("token_ids", "document_ids"))
    chosen = sample_windows(ids, num, ids.shape[1]) if ids.size else np.zeros(0, int)
    if len(chosen) == 0:
        raise EditError(f"{run.path} has no whole window of held-out text to measure on")
    return ids[chosen], owners[chosen]


@torch.no_grad()
def what_moved(
    lm: LanguageModel,
    edited: Any,
    hooked: Callable[[], AbstractContextManager[None]],
    windows: np.ndarray,
    owners: np.ndarray,
    *,
    tolerance: float,
    batch_windows: int = 4,
) -> WhatMoved:
    """Compare `lm`, `edited` (a model) and `lm` within `hooked()` on windows [W, T] of documents `owners` [W, T]."""
    groups = DocumentGroups()
    owners = groups.of(owners[:, 1:])
    sums = np.zeros((4, len(groups)))  # cross-entropy before and after, divergence, changed predictions
    moved: torch.Tensor | None = None
    largest, scale, beyond, worst = 0.0, 0.0, 0, (0, 0)
    with progress("edit", windows.size, "tok") as advance:
        for start in range(0, len(windows), batch_windows):
            at = slice(start, start + batch_windows)
            ids = torch.from_numpy(windows[at]).long().to(lm.input_device)
            base = lm.model(input_ids=ids, use_cache=False).logits
            new = edited(input_ids=ids, use_cache=False).logits
            with hooked():
                wanted = lm.model(input_ids=ids, use_cache=False).logits
            apart = (new - wanted).abs().amax(2)  # [B, T]
            beyond += int((apart > tolerance).sum())
            if float(apart.max()) > largest:
                window, position = divmod(int(apart.argmax()), apart.shape[1])
                largest, worst = float(apart.max()), (start + window, position)
            scale = max(scale, float(wanted.abs().max()))
            del wanted, apart
            before, _ = compare_logits(base, base, ids)
            after, divergence = compare_logits(new, base, ids)
            changed = (new[:, :-1].argmax(-1) != base[:, :-1].argmax(-1)).float().cpu().numpy()
            for row, values in zip(sums, (before, after, divergence, changed), strict=True):
                row += np.bincount(owners[at].ravel(), values.ravel(), len(groups))
            for b, n in zip(base, new, strict=True):
                shift = (n[:-1].float().softmax(-1) - b[:-1].float().softmax(-1)).sum(0)
                moved = shift if moved is None else moved + shift
            advance(ids.numel())
    assert moved is not None
    rounding = None if largest <= tolerance else _rounding(lm, edited, hooked, windows[worst[0]], worst[1])
    count = np.bincount(owners.ravel(), minlength=len(groups)).astype(np.float64)
    num_tokens, draws = int(count.sum()), Bootstrap(len(groups))

    def mean(values: np.ndarray) -> Estimate:
        return draws.estimate(ratio(values, count), num_tokens)

    before, after, divergence, changed = sums

    def named(sign: int) -> list[tuple[str, float]]:
        values, tokens = (sign * moved / num_tokens).topk(min(_TOKENS_NAMED, len(moved)))
        return list(zip(lm.token_texts(tokens.tolist()), (sign * values).tolist(), strict=True))

    return WhatMoved(
        len(windows),
        windows.shape[1],
        num_tokens,
        mean(before),
        mean(after),
        mean(after - before),
        mean(divergence),
        mean(changed),
        named(1),
        named(-1),
        largest,
        scale,
        tolerance,
        beyond,
        rounding,
    )


def _rounding(
    lm: LanguageModel, edited: Any, hooked: Callable[[], AbstractContextManager[None]], window: np.ndarray, at: int
) -> Rounding:
    """What of the difference at token `at` of a window [T] is rounding of float32."""
    ids = torch.from_numpy(window[None]).long().to(lm.input_device)

    def logits(model: Any) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits[0]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        with hooked():
            wanted = logits(lm.model)
        return wanted, logits(edited)

    rough = both()
    for model in (lm.model, edited):
        model.double()
    try:
        exact = both()
    finally:
        for model in (lm.model, edited):  # weights were float32: not a bit is lost
            model.float()
    off = [float((a[at] - b[at]).abs().max()) for a, b in zip(rough, exact, strict=True)]
    apart = float((exact[0] - exact[1]).abs().max())
    return Rounding(at, lm.token_texts([int(window[at])])[0], apart, *off)
