"""Gated: one path decides which latents are active, another how strongly.

Rajamanoharan et al. 2024, arXiv 2404.16014.
"""

import torch
from torch import nn

from saeql.kernels.autograd import SparseLatents, threshold_encode
from saeql.kernels.entries import DenseEntries

from ..model import Outcome, SparseAutoencoder


class GatedAutoencoder(SparseAutoencoder):
    """`z = (W_enc x' + b_gate > 0) * ReLU(exp(r_mag) * W_enc x' + b_mag)` with x' = x - b_dec.

    The gate learns through its own ReLU: it is penalised there, and must reconstruct through a frozen decoder.
    """

    architecture = "gated"
    default_sparsity_coefficient = 0.15
    has_auxk = False
    latent_biases = ("b_enc", "r_mag", "b_mag")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # b_enc serves as the gate's bias: the format calls it b_gate
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))

    def start_sparse(self) -> None:
        """Negative biases in place of thresholds."""
        self.b_enc.fill_(-self.initial_threshold)

    def encode(self, x: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> SparseLatents:
        """Latents whose gate is open, with the magnitude path's values."""
        zero = torch.zeros((), device=x.device)
        gate = threshold_encode(x, self.W_enc, self.b_enc, zero, b_dec=self.encoder_b_dec, matmul_dtype=matmul_dtype)
        indices, is_open = gate.indices, gate.values > 0
        projected = gate.values - self.b_enc[indices]
        values = (self.r_mag[indices].exp() * projected + self.b_mag[indices]).relu() * is_open
        return gate.with_values(values)

    def slope(self, latents: torch.Tensor) -> torch.Tensor:
        """That of the magnitude path."""
        return self.r_mag.detach()[latents].exp()

    def outcome(self, x: torch.Tensor, y: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> Outcome:
        """Reconstruction, the gate's L1 penalty, and the gate's own reconstruction through a frozen decoder."""
        gate = self.above(x, 0.0, matmul_dtype=matmul_dtype)
        opened, take = gate.values, gate.take
        magnitude = take(self.r_mag.exp()) * (opened - take(self.b_enc)) + take(self.b_mag)
        z = magnitude.relu()
        if isinstance(gate, DenseEntries):
            z = z * (opened.detach() > 0)
        frozen = self.with_skip(gate.decode(opened, self.W_dec.detach(), self.b_dec.detach()), x, frozen=True)
        penalty = self.sparsity_coefficient * opened.sum() / (len(x) * self.d_in**0.5)
        return self.penalised_outcome(gate, z, penalty + (y - frozen).square().mean(), x, y)

    def fold_extra(self, c: float, shift: torch.Tensor) -> None:
        """The magnitude's bias is in units of latents; b_gate is folded as b_enc."""
        self.b_mag.data.sub_(self.r_mag.data.exp() * shift).div_(c)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Gate and magnitude."""
        return {"b_gate": self.b_enc.detach(), "r_mag": self.r_mag.detach(), "b_mag": self.b_mag.detach()}

    def load_extra(self, tensors: dict[str, torch.Tensor]) -> None:
        """Gate and magnitude."""
        self.b_enc.data.copy_(tensors["b_gate"])
        self.r_mag.data.copy_(tensors["r_mag"])
        self.b_mag.data.copy_(tensors["b_mag"])
