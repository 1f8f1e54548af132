"""BatchTopK: keep the k N largest pre-activations of a whole batch (Bussmann et al. 2024, arXiv 2412.06410).

At inference rows must not depend on each other: every latent above a running estimate of the batch's smallest kept
value is active, as in a JumpReLU dictionary with one threshold.
"""

from typing import Any, Unpack

import torch

from saeql.kernels.autograd import SparseLatents, batch_topk_encode, threshold_encode
from saeql.kernels.batch_topk import encode_batch_topk

from ..model import EncodeOptions, Outcome, SparseAutoencoder

#: The threshold is a mean over this share of the batches so far, as weights move fast at first, and at most so many.
_MEAN_SHARE, _MEAN_BATCHES = 1 / 20, 100


class BatchTopKAutoencoder(SparseAutoencoder):
    """`z = ReLU(BatchTopK(W_enc (x - b_dec) + b_enc))` in training, `z = pre * (pre > threshold)` at inference."""

    architecture = "batchtopk"
    selects = True
    encoder_start = 0.3

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("threshold", torch.full((), -1.0))  # below 0: no batch seen yet
        self.threshold: torch.Tensor
        self.register_buffer("batches_seen", torch.zeros(()))
        self.batches_seen: torch.Tensor

    def encode(self, x: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> SparseLatents:
        """Latents of rows x [N, d_in] above the running threshold; rows differ in how many they have."""
        threshold = self.threshold.clamp_min(0)
        return threshold_encode(
            x, self.W_enc, self.b_enc, threshold, b_dec=self.encoder_b_dec, matmul_dtype=matmul_dtype
        )

    def select(self, centred: torch.Tensor, **options: Unpack[EncodeOptions]) -> SparseLatents:
        """Latents of a training batch, without gradient; moves the running threshold."""
        latents, threshold = encode_batch_topk(
            centred, self.W_enc, self.b_enc, self.config.k, **options, **self._whole_batch(centred)
        )
        self._move_threshold(threshold)
        return latents

    def batch_latents(self, x: torch.Tensor, matmul_dtype: torch.dtype | None) -> SparseLatents:
        """The same with gradient, of rows x [N, d_in]."""
        latents, threshold = batch_topk_encode(
            x, self.W_enc, self.b_enc, self.config.k,
            b_dec=self.encoder_b_dec, matmul_dtype=matmul_dtype, **self._whole_batch(x),
        )  # fmt: skip
        self._move_threshold(threshold)
        return latents

    def _whole_batch(self, x: torch.Tensor) -> dict[str, Any]:
        """How to choose among the rows and latents of all ranks."""
        alone = self.comm.size == 1
        return {} if alone else {"kth_largest": self.comm.kth_largest, "num_rows": len(x) * self.comm.data_size}

    @torch.no_grad()
    def _move_threshold(self, smallest: torch.Tensor) -> None:
        smallest = self.comm.smallest(smallest)
        self.batches_seen += 1
        weight = (self.batches_seen * _MEAN_SHARE).clamp(1, _MEAN_BATCHES).reciprocal()
        self.threshold.copy_(torch.lerp(self.threshold, smallest.to(self.threshold.dtype), weight))

    def outcome(self, x: torch.Tensor, y: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> Outcome:
        """Reconstruction only: sparsity is built in."""
        return self.sparse_outcome(self.batch_latents(x, matmul_dtype), x, y)

    def fold_extra(self, c: float, shift: torch.Tensor) -> None:
        """The threshold is compared with latents."""
        self.threshold.div_(c)

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """The threshold, one for every latent as the format wants it."""
        return {"threshold": self.threshold.clamp_min(0).expand(self.d_sae).clone()}

    def load_extra(self, tensors: dict[str, torch.Tensor]) -> None:
        """One threshold for all."""
        self.threshold.copy_(tensors["threshold"].flatten()[0])
