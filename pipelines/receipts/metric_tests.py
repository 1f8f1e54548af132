"""C1: the metrics themselves, on data whose answer is known. A wrong metric ends the run.

What they guard against: an explained variance about E[x^2] in place of the variance, which a large mean makes look
perfect; a recovered loss whose reference is not said; credit for an answer that is always the same.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch

from saeql.kernels.sparse_matmul import SparseLatents
from saeql.sae.metrics import RowMetrics, fvu, recovered

from .control import Labelled, ReceiptError
from .receipt import PASSED, Receipt
from .statistics import auroc, auroc_interval

if TYPE_CHECKING:
    from ..run import Run

#: name of what is measured -> (measured, expected)
Check = tuple[str, Callable[[], float], float]


class MetricTests:
    """Closed forms of fvu, recovered loss and AUROC."""

    code: ClassVar[str] = "C1"
    name: ClassVar[str] = "metric self-tests"
    tier: ClassVar[str] = "fast"

    def __init__(self, checks: Sequence[Check] | None = None):
        self.checks = _checks() if checks is None else checks

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Needs nothing of the run."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Raises ReceiptError naming the first metric that is not what it must be."""
        for name, measure, expected in self.checks:
            value = measure()
            if not abs(value - expected) <= 1e-9:
                raise ReceiptError(
                    f"C1 metric self-tests: {name} is {value:.12g}, it must be {expected:.12g}; no number of this "
                    "installation can be trusted: install saeql anew, or report this"
                )
        detail = {"exact": [name for name, _, _ in self.checks]}
        named = f"{self.code} {self.name}"
        return [Receipt(control=named, value=0, threshold=0, n=len(self.checks), verdict=PASSED, detail=detail)]


def _checks() -> list[Check]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(64, 8, generator=generator, dtype=torch.float64) + 30
    part = y + 0.3 * torch.randn(64, 8, generator=generator, dtype=torch.float64)
    mean = y.mean(0).expand_as(y)
    plain = fvu(y, part)
    ones, zeros = np.ones(4), np.zeros(10)
    places = np.arange(10)
    losses = np.array([1.0, 2.0]), np.array([1.5, 2.5]), np.array([3.0, 4.0])
    return [
        ("fvu of the rows themselves", lambda: fvu(y, y), 0.0),
        ("fvu of their mean", lambda: fvu(y, mean), 1.0),
        ("fvu after a shift", lambda: fvu(y - 30, part - 30), plain),
        ("fvu after scaling", lambda: fvu(y * 30, part * 30), plain),
        ("streamed fvu of the rows themselves", lambda: _streamed(y, y), 0.0),
        ("streamed fvu of their mean", lambda: _streamed(y, mean), 1.0),
        ("streamed fvu", lambda: _streamed(y, part), plain),
        ("loss recovered by the identity", lambda: float(recovered(losses[0], losses[0], losses[2]).mean()), 1.0),
        ("loss recovered by the ablation", lambda: float(recovered(losses[0], losses[2], losses[2]).mean()), 0.0),
        ("loss recovered", lambda: float(recovered(*losses).mean()), 0.75),
        ("AUROC of ties", lambda: auroc(ones, ones), 0.5),
        ("AUROC of the same answer to 4 right and 10 wrong rows", lambda: auroc(ones * 0, zeros), 0.5),
        ("AUROC of answers that are missing", lambda: auroc(np.full(4, np.nan), zeros), 0.0),
        ("AUROC of right answers", lambda: auroc(ones, zeros), 1.0),
        (
            "credit for a constant answer",
            lambda: float(auroc_interval(np.ones(10), places, np.ones(10), places, draws=100, seed=0)[0] > 0.5),
            0.0,
        ),
    ]


def _streamed(y: torch.Tensor, y_hat: torch.Tensor) -> float:
    rows = RowMetrics(y.shape[1], 1)
    for half in (slice(0, 20), slice(20, None)):
        size = len(y[half])
        latents = SparseLatents(torch.ones(size, 1), torch.zeros(size, 1, dtype=torch.int32), 1)
        rows.update(y[half], y_hat[half], latents, torch.arange(size))
    return rows.estimates(num_draws=2)["fvu"].value
