"""ReLU with a sparsity penalty.

Bricken et al. 2023, "Towards Monosemanticity"; Cunningham et al. 2023, arXiv 2309.08600.

The tanh penalty is that of Anthropic's 2024 updates, p_norm with p < 1 that of p-annealing (arXiv 2408.00113).
"""

import torch

from saeql.kernels.autograd import SparseLatents, threshold_encode

from ..model import Outcome, SparseAutoencoder


class ReluAutoencoder(SparseAutoencoder):
    """`z = ReLU(W_enc (x - b_dec) + b_enc)`; decoder rows have unit norm, so that z cannot hide from the penalty."""

    architecture = "relu"
    default_sparsity_coefficient = 0.1
    has_auxk = False

    def start_sparse(self) -> None:
        """Negative biases in place of thresholds."""
        self.b_enc.fill_(-self.initial_threshold)

    def encode(self, x: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> SparseLatents:
        """All latents above zero, padded to the row with most of them."""
        zero = torch.zeros((), device=x.device)
        return threshold_encode(x, self.W_enc, self.b_enc, zero, b_dec=self.encoder_b_dec, matmul_dtype=matmul_dtype)

    def outcome(self, x: torch.Tensor, y: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> Outcome:
        """Reconstruction and penalty of all latents above zero."""
        found = self.above(x, 0.0, matmul_dtype=matmul_dtype)
        penalty = self.penalty(found.values) / len(x)
        return self.penalised_outcome(found, found.values, self.sparsity_coefficient * penalty, x, y)

    def penalty(self, z: torch.Tensor) -> torch.Tensor:
        """Summed penalty of latents z of any shape, over the root of the number of input coordinates."""
        kind = self.config.sparsity_penalty
        if kind == "tanh":
            z = z.tanh()
        elif kind == "p_norm":
            # the gradient of z^p is unbounded at 0; latents that are off must not get it
            z = torch.where(z > 0, z.clamp_min(1e-6) ** self.config.p, 0.0)
        return z.sum() / self.d_in**0.5
