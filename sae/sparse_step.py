"""One training step's loss and gradients where what is active is chosen, not penalised: no autograd graph is built.

Everything stays sparse: the gradients of both weights are entries (`SparseGrads`) that the optimizer sums as it uses
them. `objective.py` states the same loss for autograd; a test holds the two together.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saeql.kernels.autograd import value_grads
from saeql.kernels.sparse_grads import RowGrads, SparseGrad, SparseGrads
from saeql.kernels.sparse_matmul import SparseLatents, gather_sum, latent_sum, scatter_sum
from saeql.kernels.topk import PreActs, keep_largest, row_topk

from .comm import Comm
from .model import SparseAutoencoder
from .objective import LossTerms, num_auxiliary
from .rank_selection import smallest_kept


class SparseStep(NamedTuple):
    """What one batch gave; nothing carries a gradient."""

    terms: LossTerms
    fired: Tensor  # [m] indices of latents that were active, repeats allowed
    num_active: Tensor  # scalar: active latents, summed over rows
    weights: SparseGrads  # of W_enc and W_dec
    others: dict[str, Tensor]  # gradients of the other parameters by name


@torch.no_grad()
def sparse_step(
    dictionary: SparseAutoencoder,
    x: Tensor,
    y: Tensor,
    dead: Tensor | None,
    *,
    auxk_coefficient: float,
    matmul_dtype: torch.dtype | None = None,
    W_enc_cast: Tensor | None = None,
) -> SparseStep:
    """Loss and gradients of rows x [N, d_in] with targets y [N, d_out], for a dictionary that `selects`.

    Rows and latents may be shared out over the ranks of `dictionary.comm`; weight gradients are then this rank's rows'
    alone, the others those of all. `dead` holds the rising indices [m] of dead latents, or None. `W_enc_cast` is W_enc
    in `matmul_dtype`, if at hand.
    """
    comm, b_dec = dictionary.comm, dictionary.encoder_b_dec
    centred = x if b_dec is None else x - b_dec
    num_dead = comm.count_features(0 if dead is None or not auxk_coefficient else len(dead), x.device)
    wanted = PreActs(dead) if num_dead and dead is not None else None
    latents = dictionary.select(centred, matmul_dtype=matmul_dtype, W_cast=W_enc_cast, wanted=wanted)
    y_hat = gather_sum(latents.values, latents.indices, dictionary.W_dec)
    comm.sum_features(y_hat)
    residual = y - dictionary.with_skip(y_hat.add_(dictionary.b_dec), x)
    reconstruction = residual.square().mean()
    grad_out = residual * (-2 / (residual.numel() * comm.data_size))
    main = SparseGrad(latents, value_grads(latents, dictionary.W_dec, grad_out), centred, grad_out)
    auxiliary, rows = torch.zeros((), device=x.device), None
    if wanted is not None:
        auxiliary, rows = _auxiliary(dictionary, wanted, num_dead, centred, residual, auxk_coefficient)
    weights = SparseGrads(main, rows)

    others = {"b_enc": weights.b_enc(), "b_dec": grad_out.sum(0)}
    if dictionary.W_skip is not None:
        others["W_skip"] = grad_out.t() @ x
    comm.sum_data(*others.values())
    if b_dec is not None:
        through_encoder = others["b_enc"] @ dictionary.W_enc
        comm.sum_features(through_encoder)
        others["b_dec"] -= through_encoder
    active = latents.values > 0
    total = reconstruction + auxk_coefficient * auxiliary
    terms = LossTerms(total, reconstruction, torch.zeros((), device=x.device), auxiliary)
    return SparseStep(terms, latents.indices[active], active.sum(), weights, others)


def _auxiliary(
    dictionary: SparseAutoencoder, wanted: PreActs, num_dead: int, centred: Tensor, residual: Tensor, coefficient: float
) -> tuple[Tensor, RowGrads]:
    """The auxiliary loss of `objective.auxk_loss`, and its gradients times `coefficient` for the rows of the dead.

    Everything is in the precision of the encoder's matmul, which gave the pre-activations of the dead. `num_dead`
    counts the dead latents of all ranks.
    """
    comm, dead, pre = dictionary.comm, wanted.latents, wanted.taken
    k = num_auxiliary(num_dead, dictionary.d_in)
    own = min(k, len(dead))
    if comm.feature_size > 1 and k < num_dead:
        candidates = row_topk(pre, own)[0] if own < len(dead) else pre
        pre = pre.masked_fill(pre < smallest_kept(comm, candidates, k), 0)
    scale = residual.square().sum()
    comm.sum_data(scale)
    scale.clamp_min_(1e-12)
    x, W_dec = centred.to(pre.dtype), dictionary.W_dec.index_select(0, dead).to(pre.dtype)
    if len(dead) <= own * _dense_worth(pre):
        z = keep_largest(pre, own).relu_() if own < len(dead) else pre.relu()
        error, loss = _unexplained(comm, residual, z @ W_dec, scale)
        grad_out = (error * (-2 * coefficient / scale)).to(pre.dtype)
        grad_dec = z.t() @ grad_out
        grad_z = (grad_out @ W_dec.t()).mul_(z.gt_(0))  # in place: a mask of bools would cost several times as much
        return loss, RowGrads(dead, grad_z.t() @ x, grad_dec, grad_z.sum(0))
    values, chosen = row_topk(pre, own)
    latents = SparseLatents(values.relu_(), chosen, len(dead))
    error, loss = _unexplained(comm, residual, gather_sum(values, chosen, W_dec), scale)
    grad_out = (error * (-2 * coefficient / scale)).to(pre.dtype)
    if len(dead) <= own * _product_worth(pre):
        grad_values = (grad_out @ W_dec.t()).gather(1, chosen).mul_(values > 0)
    else:
        grad_values = value_grads(latents, W_dec, grad_out)
    entries = latents.with_values(grad_values)
    return loss, RowGrads(dead, scatter_sum(entries, x), scatter_sum(latents, grad_out), latent_sum(entries))


def _unexplained(comm: Comm, residual: Tensor, explained: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the dead latents of all ranks leave of the residual, and its share."""
    explained = explained.to(residual.dtype)
    comm.sum_features(explained)
    error = residual - explained
    loss = error.square().sum()
    comm.sum_data(loss)
    return error, loss / scale


def _dense_worth(pre: Tensor) -> float:
    """How many times more latents than are active matmuls may take and still cost no more than gathers, measured."""
    return 32.0 if pre.is_cuda else 3.5


def _product_worth(pre: Tensor) -> float:
    """The same of the gradient of the values alone: a matmul of which some elements are kept, or so many products."""
    if pre.is_cuda:
        return 32.0
    return 16.0 if pre.dtype == torch.bfloat16 else 6.0
