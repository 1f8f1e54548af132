"""One training step's loss and gradients where what is active is chosen, not penalised: no autograd graph is built.

Everything stays sparse: the gradients of both weights are entries (`SparseGrads`) that the optimizer sums as it uses
them. `objective.py` states the same loss for autograd; a test holds the two together.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saeql.kernels.autograd import value_grads
from saeql.kernels.sparse_grads import RowGrads, SparseGrad, SparseGrads
from saeql.kernels.sparse_matmul import SparseLatents, gather_sum
from saeql.kernels.topk import PreActs, row_topk

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


class _Auxiliary(NamedTuple):
    loss: Tensor
    term: SparseGrad | None = None
    rows: RowGrads | None = None


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
    auxiliary = _Auxiliary(torch.zeros((), device=x.device))
    if wanted is not None:
        auxiliary = _auxiliary(dictionary, wanted, num_dead, centred, residual, auxk_coefficient)
    weights = SparseGrads([main] if auxiliary.term is None else [main, auxiliary.term], auxiliary.rows)

    others = {"b_enc": weights.b_enc(), "b_dec": grad_out.sum(0)}
    if dictionary.W_skip is not None:
        others["W_skip"] = grad_out.t() @ x
    comm.sum_data(*others.values())
    if b_dec is not None:
        through_encoder = others["b_enc"] @ dictionary.W_enc
        comm.sum_features(through_encoder)
        others["b_dec"] -= through_encoder
    active = latents.values > 0
    total = reconstruction + auxk_coefficient * auxiliary.loss
    terms = LossTerms(total, reconstruction, torch.zeros((), device=x.device), auxiliary.loss)
    return SparseStep(terms, latents.indices[active], active.sum(), weights, others)


def _auxiliary(
    dictionary: SparseAutoencoder, wanted: PreActs, num_dead: int, centred: Tensor, residual: Tensor, coefficient: float
) -> _Auxiliary:
    """The auxiliary loss of `objective.auxk_loss` and its gradients times `coefficient`.

    The dead latents' pre-activations are those of the encoder, in the precision of its matmul. A share of the dead is
    active: as a matrix [N, m] where matmuls are cheap beside gathers, sparse where they are not. `num_dead` counts the
    dead latents of all ranks.
    """
    comm, dead, pre = dictionary.comm, wanted.latents, wanted.taken
    k = num_auxiliary(num_dead, dictionary.d_in)
    values, chosen = row_topk(pre, k) if k < len(dead) else (pre, None)
    if comm.feature_size > 1 and k < num_dead:
        values = values.masked_fill(values < smallest_kept(comm, values, k), 0)
    scale = residual.square().sum()
    comm.sum_data(scale)
    scale.clamp_min_(1e-12)
    if chosen is None or len(dead) <= k * _dense_worth(pre):
        z = values.relu() if chosen is None else torch.zeros_like(pre).scatter_(1, chosen, values.relu())
        W_dec = dictionary.W_dec[dead].to(pre.dtype)
        error, loss = _unexplained(comm, residual, z @ W_dec, scale)
        grad_out = (error * (-2 * coefficient / scale)).to(pre.dtype)
        grad_z = (grad_out @ W_dec.t()).mul_(z > 0)
        rows = RowGrads(dead, grad_z.t() @ centred.to(pre.dtype), z.t() @ grad_out, grad_z.sum(0))
        return _Auxiliary(loss, rows=rows)
    latents = SparseLatents(values.relu().to(residual.dtype), dead[chosen], dictionary.d_sae)
    error, loss = _unexplained(comm, residual, gather_sum(latents.values, latents.indices, dictionary.W_dec), scale)
    grad_out = error * (-2 * coefficient / scale)
    grad_values = value_grads(latents, dictionary.W_dec, grad_out)
    return _Auxiliary(loss, SparseGrad(latents, grad_values, centred, grad_out))


def _unexplained(comm: Comm, residual: Tensor, explained: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the dead latents of all ranks leave of the residual, and its share."""
    explained = explained.to(residual.dtype)
    comm.sum_features(explained)
    error = residual - explained
    loss = error.square().sum()
    comm.sum_data(loss)
    return error, loss / scale


def _dense_worth(pre: Tensor) -> float:
    """How many times more latents than are active a matmul may take and still cost no more than gathering, measured."""
    if pre.is_cuda:
        return 32.0
    return 7.0 if pre.dtype == torch.bfloat16 else 3.5
