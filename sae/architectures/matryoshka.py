"""Matryoshka: nested prefixes of the latents each reconstruct alone (Bussmann et al. 2025, arXiv 2503.17547).

The first latents must be useful without the later ones, so that general features are not absorbed into special ones.
Over BatchTopK or TopK; what is selected is selected once, over all latents.
"""

import torch

from saeql.kernels.autograd import SparseLatents, sparse_decode, topk_encode

from ..model import Outcome
from .batchtopk import BatchTopKAutoencoder


class MatryoshkaAutoencoder(BatchTopKAutoencoder):
    """The mean, over nested prefixes of the latents, of each prefix's reconstruction error."""

    architecture = "matryoshka"
    selects = False  # the prefixes' losses are autograd's
    encoder_start = 1.0  # shorter rows left more latents dead

    @property
    def widths(self) -> list[int]:
        """Number of latents of every prefix, rising to d_sae."""
        return sorted({max(1, round(share * self.d_sae)) for share in self.config.matryoshka_shares})

    def encode(self, x: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> SparseLatents:
        """As TopK or BatchTopK does, by `matryoshka_selection`."""
        if self.config.matryoshka_selection == "topk":
            k, b_dec = self.config.k, self.encoder_b_dec
            return topk_encode(x, self.W_enc, self.b_enc, k, b_dec=b_dec, matmul_dtype=matmul_dtype)
        return super().encode(x, matmul_dtype=matmul_dtype)

    def outcome(self, x: torch.Tensor, y: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> Outcome:
        """Mean error of the prefixes; `y_hat` is the whole dictionary's."""
        by_row = self.config.matryoshka_selection == "topk"
        latents = self.encode(x, matmul_dtype=matmul_dtype) if by_row else self.batch_latents(x, matmul_dtype)
        base = self.with_skip(self.b_dec.expand_as(y), x)
        y_hat, losses, start = base, [], 0
        for stop in self.widths:
            inside = (latents.indices >= start) & (latents.indices < stop)
            y_hat = y_hat + sparse_decode(latents.with_values(latents.values * inside), self.W_dec)
            losses.append((y - y_hat).square().mean())
            start = stop
        active = latents.values.detach() > 0
        none = torch.zeros((), device=x.device)
        return Outcome(y_hat, torch.stack(losses).mean(), none, latents.indices[active], active.sum())
