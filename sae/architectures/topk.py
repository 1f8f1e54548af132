"""TopK: keep the k largest pre-activations of every row (Gao et al. 2024, arXiv 2406.04093, section 2.3)."""

from typing import Unpack

import torch

from saeql.kernels.autograd import SparseLatents, topk_encode
from saeql.kernels.topk import encode_topk

from ..model import EncodeOptions, Outcome, SparseAutoencoder
from ..rank_selection import keep_among_ranks


class TopKAutoencoder(SparseAutoencoder):
    """`z = ReLU(TopK(W_enc (x - b_dec) + b_enc))`, `x_hat = z W_dec + b_dec`."""

    architecture = "topk"
    selects = True
    encoder_start = 0.3

    def encode(self, x: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> SparseLatents:
        """The k largest latents of rows x [N, d_in], clipped at zero."""
        return topk_encode(
            x, self.W_enc, self.b_enc, self.config.k, b_dec=self.encoder_b_dec, matmul_dtype=matmul_dtype
        )

    def select(self, centred: torch.Tensor, **options: Unpack[EncodeOptions]) -> SparseLatents:
        """The same without gradient."""
        k = self.config.k
        return keep_among_ranks(self.comm, encode_topk(centred, self.W_enc, self.b_enc, k, **options), k)

    def outcome(self, x: torch.Tensor, y: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> Outcome:
        """Reconstruction only: sparsity is built in."""
        return self.sparse_outcome(self.encode(x, matmul_dtype=matmul_dtype), x, y)
