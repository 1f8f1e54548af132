"""JumpReLU: a learnt threshold for every latent, by straight-through estimators.

Rajamanoharan et al. 2024, arXiv 2407.14435.

`target_l0` replaces the weighted l0 penalty by a squared distance to the wanted l0, as Gemma Scope 2 does.
"""

import math

import torch
from torch import nn

from saeql.kernels.autograd import SparseLatents, threshold_encode
from saeql.kernels.entries import DenseEntries
from saeql.kernels.jumprelu import jumprelu, jumprelu_entries, step_l0

from ..model import Outcome, SparseAutoencoder


class JumpReluAutoencoder(SparseAutoencoder):
    """`z = pre * (pre > threshold)`, `pre = W_enc (x - b_dec) + b_enc`; the threshold is learnt as its logarithm."""

    architecture = "jumprelu"
    default_sparsity_coefficient = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_threshold = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def threshold(self) -> torch.Tensor:
        """Threshold [d_sae], above zero."""
        return self.log_threshold.exp()

    def start_sparse(self) -> None:
        """One threshold for all latents."""
        self.log_threshold.fill_(math.log(self.initial_threshold))

    def encode(self, x: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> SparseLatents:
        """Latents above their threshold, padded to the row with most of them."""
        threshold = self.threshold
        return threshold_encode(
            x, self.W_enc, self.b_enc, threshold, b_dec=self.encoder_b_dec, matmul_dtype=matmul_dtype
        )

    def outcome(self, x: torch.Tensor, y: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> Outcome:
        """Reconstruction, and the l0 penalty through the threshold's estimator."""
        config, threshold = self.config, self.threshold
        lowest = threshold.detach() - config.bandwidth / 2  # below it neither value nor estimator is anything but 0
        found = self.above(x, lowest, matmul_dtype=matmul_dtype, whole=True)
        if isinstance(found, DenseEntries):
            z = jumprelu(found.values, threshold, config.bandwidth)
            l0 = step_l0(found.values, threshold, config.bandwidth).mean()
        else:
            z, step = jumprelu_entries(found.values, found.take(threshold), config.bandwidth)
            l0 = step.sum() / len(x)
        mean = l0.detach().clone()
        self.comm.mean_data(mean)  # the target is one for the rows of all ranks
        l0 = l0 + (mean - l0.detach())
        penalty = l0 / self.d_in if config.target_l0 is None else (l0 / config.target_l0 - 1).square()
        return self.penalised_outcome(found, z, self.sparsity_coefficient * penalty, x, y)

    def fold_extra(self, c: float, shift: torch.Tensor) -> None:
        """Thresholds are compared with latents."""
        self.log_threshold.data.sub_(torch.tensor(c).log())

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """The threshold of every latent."""
        return {"threshold": self.threshold.detach()}

    def load_extra(self, tensors: dict[str, torch.Tensor]) -> None:
        """The threshold of every latent."""
        self.log_threshold.data.copy_(tensors["threshold"].clamp_min(1e-30).log())
