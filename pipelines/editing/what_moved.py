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
    largest_in_float64: float | None
    """The same in float64, over the window with the largest; None where float32 is within the tolerance."""

    @property
    def is_equal(self) -> bool:
        """Whether the edited model is the hooked one."""
        return self.largest_difference <= self.tolerance

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "is_equal": self.is_equal}


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
    largest, scale, worst = 0.0, 0.0, 0
    with progress("edit", windows.size, "tok") as advance:
        for start in range(0, len(windows), batch_windows):
            at = slice(start, start + batch_windows)
            ids = torch.from_numpy(windows[at]).long().to(lm.input_device)
            base = lm.model(input_ids=ids, use_cache=False).logits
            new = edited(input_ids=ids, use_cache=False).logits
            with hooked():
                wanted = lm.model(input_ids=ids, use_cache=False).logits
            apart = (new - wanted).abs().amax((1, 2))
            if float(apart.max()) > largest:
                largest, worst = float(apart.max()), start + int(apart.argmax())
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
    exact = None if largest <= tolerance else _in_float64(lm, edited, hooked, windows[worst : worst + 1])
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
        exact,
    )


def _in_float64(
    lm: LanguageModel, edited: Any, hooked: Callable[[], AbstractContextManager[None]], windows: np.ndarray
) -> float:
    """Largest difference of a logit of the two in float64: what of it is not rounding of float32."""
    ids = torch.from_numpy(windows).long().to(lm.input_device)
    lm.model.double()
    try:
        with hooked():
            wanted = lm.model(input_ids=ids, use_cache=False).logits
        return float((edited.double()(input_ids=ids, use_cache=False).logits - wanted).abs().max())
    finally:
        for model in (lm.model, edited):  # weights were float32: not a bit is lost
            model.float()
