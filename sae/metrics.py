"""The one definition of every metric, each with closed-form tests.

- `fvu`: fraction of variance UNexplained, sum |x - x_hat|^2 / sum |x - mean(x)|^2. 0 for x itself, 1 for the mean, and
  unchanged by shifting or scaling x and x_hat together.
- `l0`: mean number of latents above zero on a row.
- `dead_share`: share of latents that are above zero on no row.
- `ce_increase`: mean next-token cross-entropy (nats) with the hook point replaced by its reconstruction, minus without.
- `ce_recovered`: 1 - ce_increase / (ce_ablated - ce), 1 for a perfect reconstruction and 0 for the ablation itself;
  mean ablation is the reference that is reported first, zero ablation flatters.
- `kl`: mean KL divergence (nats) of the spliced model's predictions from the model's own; `kl_recovered` is
  1 - kl / kl under ablation.
"""

import numpy as np
import torch


class VarianceUnexplained:
    """Streaming fvu: independent of how rows are cut into batches, accumulated in float64 about a fixed shift.

    The shift (the first batch's mean) keeps the sums small, so that a large common offset does not cancel digits.
    """

    def __init__(self, d: int):
        self.count = 0
        self._shift: torch.Tensor | None = None
        self._sum = torch.zeros(d, dtype=torch.float64)
        self._sum_squares = 0.0
        self._residual = 0.0

    def update(self, x: torch.Tensor, x_hat: torch.Tensor) -> None:
        """Add rows x and their reconstruction x_hat, both [N, d]."""
        if x.shape[0] == 0:
            return
        x, x_hat = x.double(), x_hat.double()
        if self._shift is None:
            self._shift = x.mean(0)
            self._sum = self._sum.to(x.device)
        centred = x - self._shift
        self.count += x.shape[0]
        self._sum += centred.sum(0)
        self._sum_squares += float(centred.square().sum())
        self._residual += float((x - x_hat).square().sum())

    @property
    def residual(self) -> float:
        """Sum of squared residuals so far."""
        return self._residual

    @property
    def total(self) -> float:
        """Sum of squared distances to the mean so far."""
        return self._sum_squares - float(self._sum.square().sum()) / max(self.count, 1)

    def value(self) -> float:
        """The fvu; nan where no row or no variance was seen."""
        return self._residual / self.total if self.count and self.total > 0 else float("nan")


def fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Fraction of variance unexplained of one batch, [N, d] each."""
    meter = VarianceUnexplained(x.shape[1])
    meter.update(x, x_hat)
    return meter.value()


def l0(values: torch.Tensor) -> float:
    """Mean number of values above zero per row of [N, k] or [N, d_sae]."""
    return float((values > 0).sum(1).double().mean())


def dead_share(fire_counts: torch.Tensor) -> float:
    """Share of latents whose count [d_sae] is zero."""
    return float((fire_counts == 0).double().mean())


def ce_recovered(ce: float, ce_spliced: float, ce_ablated: float) -> float:
    """Share of the cross-entropy lost to ablation that the reconstruction keeps; nan where ablation costs nothing."""
    lost = ce_ablated - ce
    return 1 - (ce_spliced - ce) / lost if lost != 0 else float("nan")


def bootstrap_ratio(numerator: np.ndarray, denominator: np.ndarray, *, num_draws: int = 2000, seed: int = 0) -> tuple:
    """95 % interval (low, high) of sum(numerator) / sum(denominator), drawing documents [D] with replacement."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(numerator), np.full(len(numerator), 1 / len(numerator)), size=num_draws)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (weights @ numerator) / (weights @ denominator)
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return float(low), float(high)
