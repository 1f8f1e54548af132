"""What a dictionary is trained to do: reconstruct sparsely, and keep its latents alive."""

from typing import NamedTuple

import torch

from saeql.kernels.autograd import sparse_decode

from .model import Outcome, SparseAutoencoder


class LossTerms(NamedTuple):
    """Scalars of one batch, with gradient where one is needed."""

    total: torch.Tensor
    reconstruction: torch.Tensor  # mean squared error per coordinate, of targets scaled to unit variance
    sparsity: torch.Tensor  # the architecture's weighted penalty
    auxiliary: torch.Tensor  # share of the residual that the dead latents leave unexplained; 0 where none is dead


def loss_terms(
    dictionary: SparseAutoencoder,
    x: torch.Tensor,
    y: torch.Tensor,
    dead: torch.Tensor | None,
    *,
    auxk_coefficient: float,
    sparsity_share: float = 1.0,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[LossTerms, Outcome]:
    """Loss of rows x [N, d_in] with targets y [N, d_out], both scaled to unit variance per coordinate.

    `dead` holds the indices [m] of dead latents, or None; `sparsity_share` scales the penalty while it warms up.
    """
    outcome = dictionary.outcome(x, y, matmul_dtype=matmul_dtype)
    sparsity = sparsity_share * outcome.sparsity
    auxiliary = torch.zeros((), device=x.device)
    if dead is not None and len(dead) and auxk_coefficient and dictionary.has_auxk:
        auxiliary = auxk_loss(dictionary, x, (y - outcome.y_hat).detach(), dead)
    total = outcome.reconstruction + sparsity + auxk_coefficient * auxiliary
    return LossTerms(total, outcome.reconstruction, sparsity, auxiliary), outcome


def num_auxiliary(num_dead: int, d_in: int) -> int:
    """k_aux: how many dead latents try to explain the residual of a row."""
    return min(num_dead, max(1, d_in // 2))


def auxk_loss(
    dictionary: SparseAutoencoder, x: torch.Tensor, residual: torch.Tensor, dead: torch.Tensor
) -> torch.Tensor:
    """Normalised error of dead latents at predicting the residual (Gao et al. 2024, arXiv 2406.04093, appendix A.2).

    The top-k runs over the compacted subset `dead` [m] with k_aux = min(m, d_in / 2); both encoder and decoder rows of
    the dead latents receive its gradient.
    """
    latents = dictionary.encode_subset(x, dead, num_auxiliary(len(dead), dictionary.d_in))
    error = residual - sparse_decode(latents, dictionary.W_dec[dead], None)
    scale = residual.square().sum()
    dictionary.comm.mean_data(scale)  # of the whole batch: the mean over ranks is then its loss
    return error.square().sum() / scale.clamp_min(1e-12)
