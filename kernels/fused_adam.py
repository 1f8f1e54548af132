"""Adam on weights whose rows are latents, fused with what a dictionary does to its decoder rows around the step.

    adam_rows      one weight and its gradient: projection, Adam, renormalisation
    sparse_adam    both weights straight from the sparse entries: their gradients are made, used and dropped a few
                   rows at a time and are never in memory as [d_sae, d]

Projection takes from a row's gradient its component along the row; renormalisation puts the row back on the unit
sphere after the step. Adam is that of Kingma and Ba (arXiv 1412.6980), bias-corrected, without weight decay, its
moments in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Backend, choose_backend, guard, launch, next_power_of_2, tl, triton
from .sparse_matmul import IndexTranspose, SparseLatents, embedding_sum, scatter_sum_reference, transpose_indices

# Rows a CPU block handles at a time: gradient, weight and both moments of a block stay in the cache between passes.
CPU_BLOCK_BYTES = 2 * 2**20
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class AdamStep:
    """What one step needs beside the tensors. `step` counts from 1."""

    step: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step: counts from 1, got {self.step}")


class Moments(NamedTuple):
    """Adam's running means of the gradient and of its square, float32, in the shape of the weight."""

    first: Tensor
    second: Tensor

    @classmethod
    def like(cls, weight: Tensor) -> "Moments":
        return cls(*(torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) for _ in range(2)))


class SparseGrad(NamedTuple):
    """One term of a loss, as it reaches both weights through the same kept latents.

    W_enc[f] gets the sum of grad_values * x over the tokens that keep f, W_dec[f] that of values * grad_out.
    """

    latents: SparseLatents
    grad_values: Tensor  # [N, k]
    x: Tensor  # [N, d_in]
    grad_out: Tensor  # [N, d_out]


class _Entries(NamedTuple):
    """All terms in one: the entries of every term sorted by latent, `tokens` counting on through the terms."""

    transpose: IndexTranspose
    values: Tensor  # [entries]
    grad_values: Tensor  # [entries]
    x: Tensor  # [tokens, d_in]
    grad_out: Tensor  # [tokens, d_out]


def adam_rows_reference(
    weight: Tensor, grad: Tensor, moments: Moments, adam: AdamStep, *, project: bool = False, renormalize: bool = False
) -> None:
    w, g = weight.to(moments.first.dtype), grad.to(moments.first.dtype)
    if project:
        g = g - (g * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True).clamp_min(TINY) * w
    moments.first.mul_(adam.beta1).add_(g, alpha=1 - adam.beta1)
    moments.second.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
    first = moments.first / (1 - adam.beta1**adam.step)
    second = moments.second / (1 - adam.beta2**adam.step)
    w = w - adam.lr * first / (second.sqrt() + adam.eps)
    if renormalize:
        w = w / (w * w).sum(1, keepdim=True).clamp_min(TINY).sqrt()
    weight.copy_(w)


@triton.jit
def adam_row(w, g, m_ptrs, v_ptrs, mask, lr, beta1, beta2, eps, correction1, correction2, PROJECT, RENORMALIZE):
    """One row through projection, Adam and renormalisation; stores the moments, returns the new row."""
    if PROJECT:
        g -= tl.sum(g * w, axis=0) / tl.maximum(tl.sum(w * w, axis=0), 1e-30) * w
    m = beta1 * tl.load(m_ptrs, mask=mask, other=0.0) + (1.0 - beta1) * g
    v = beta2 * tl.load(v_ptrs, mask=mask, other=0.0) + (1.0 - beta2) * g * g
    tl.store(m_ptrs, m, mask=mask)
    tl.store(v_ptrs, v, mask=mask)
    w -= lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
    if RENORMALIZE:
        w = w / tl.sqrt(tl.maximum(tl.sum(w * w, axis=0), 1e-30))
    return w


@triton.jit
def adam_rows_fwd_kernel(
    weight_ptr,  # [rows, d], in place
    grad_ptr,  # [rows, d]
    first_ptr,  # [rows, d] float32, in place
    second_ptr,  # [rows, d] float32, in place
    d,
    lr,
    beta1,
    beta2,
    eps,
    correction1,
    correction2,
    PROJECT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)
    mask = cols < d
    at = tl.program_id(0).to(tl.int64) * d + cols
    w = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w = adam_row(
        w,
        g,
        first_ptr + at,
        second_ptr + at,
        mask,
        lr,
        beta1,
        beta2,
        eps,
        correction1,
        correction2,
        PROJECT,
        RENORMALIZE,
    )
    tl.store(weight_ptr + at, w.to(weight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sparse_adam_bwd_kernel(
    weights_ptr,  # [entries], sorted by latent
    tokens_ptr,  # [entries], sorted by latent
    offsets_ptr,  # [d_sae + 1]
    dense_ptr,  # [N, d]
    weight_ptr,  # [d_sae, d], in place
    first_ptr,  # [d_sae, d] float32, in place
    second_ptr,  # [d_sae, d] float32, in place
    d,
    lr,
    beta1,
    beta2,
    eps,
    correction1,
    correction2,
    PROJECT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < d
    first = tl.load(offsets_ptr + f)
    last = tl.load(offsets_ptr + f + 1)
    g = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_T):
        e = start + tl.arange(0, BLOCK_T)
        s = tl.load(weights_ptr + e, mask=e < last, other=0.0).to(tl.float32)
        rows = tl.load(tokens_ptr + e, mask=e < last, other=0).to(tl.int64)
        x_mask = (s != 0.0)[:, None] & mask[None, :]
        x = tl.load(dense_ptr + rows[:, None] * d + cols[None, :], mask=x_mask, other=0.0).to(tl.float32)
        g += tl.sum(s[:, None] * x, axis=0)
    at = f * d + cols
    w = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w = adam_row(
        w,
        g,
        first_ptr + at,
        second_ptr + at,
        mask,
        lr,
        beta1,
        beta2,
        eps,
        correction1,
        correction2,
        PROJECT,
        RENORMALIZE,
    )
    tl.store(weight_ptr + at, w.to(weight_ptr.dtype.element_ty), mask=mask)


def _scalars(adam: AdamStep) -> tuple[float, ...]:
    corrections = 1 - adam.beta1**adam.step, 1 - adam.beta2**adam.step
    return adam.lr, adam.beta1, adam.beta2, adam.eps, *corrections


def _warps(block: int) -> int:
    return max(4, min(16, block // 128))


def _triton_adam_rows(
    weight: Tensor, grad: Tensor, moments: Moments, adam: AdamStep, project: bool, renormalize: bool
) -> None:
    (rows, d), block = weight.shape, next_power_of_2(weight.shape[1])
    launch(
        adam_rows_fwd_kernel, (rows,),
        weight, grad, moments.first, moments.second, d, *_scalars(adam),
        PROJECT=project, RENORMALIZE=renormalize, BLOCK_D=block, num_warps=_warps(block),
    )  # fmt: skip


def _triton_sparse_adam(
    weights: Tensor,
    transpose: IndexTranspose,
    dense: Tensor,
    weight: Tensor,
    moments: Moments,
    adam: AdamStep,
    project: bool,
    renormalize: bool,
) -> None:
    (d_sae, d), block = weight.shape, next_power_of_2(weight.shape[1])
    launch(
        sparse_adam_bwd_kernel, (d_sae,),
        weights, transpose.tokens, transpose.offsets, dense, weight, moments.first, moments.second, d, *_scalars(adam),
        PROJECT=project, RENORMALIZE=renormalize, BLOCK_T=4, BLOCK_D=block, num_warps=_warps(block),
    )  # fmt: skip


def _torch_adam_block(
    weight: Tensor, grad: Tensor, moments: Moments, adam: AdamStep, step: Tensor, project: bool, renormalize: bool
) -> None:
    """`grad` is scratch: the projection is made in place."""
    w = weight if weight.dtype == torch.float32 else weight.float()
    if project:
        along = torch.linalg.vecdot(grad, w) / torch.linalg.vecdot(w, w).clamp_min_(TINY)
        grad.addcmul_(w, along[:, None], value=-1)
    torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
        [w], [grad], [moments.first], [moments.second], [], [step], lr=adam.lr, beta1=adam.beta1, beta2=adam.beta2,
        weight_decay=0.0, eps=adam.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if renormalize:
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min_(TINY**0.5))
    if w is not weight:
        weight.copy_(w)


def _block_rows(weight: Tensor) -> int:
    if weight.device.type != "cpu":
        return max(1, weight.shape[0])
    per_row = 4 * max(1, weight.shape[1:].numel())
    return max(1, CPU_BLOCK_BYTES // per_row)


def _check_moments(name: str, weight: Tensor, moments: Moments) -> None:
    for tensor in (weight, *moments):
        if tensor.shape != weight.shape or not tensor.is_contiguous():
            raise ValueError(f"{name}: weight and moments must be contiguous and of one shape, {list(weight.shape)}")


@torch.no_grad()
def adam_rows(
    weight: Tensor,
    grad: Tensor,
    moments: Moments,
    adam: AdamStep,
    *,
    project: bool = False,
    renormalize: bool = False,
    backend: Backend | None = None,
) -> None:
    """One Adam step in place on `weight` [rows, d] (or a bias [rows]) and its moments, given `grad` of the same shape.

    `project` first takes out of each row's gradient its component along the row, `renormalize` makes each row a
    unit vector after the step; both need a 2-D weight. `grad` is left as it is. Raises ValueError for shapes that do
    not fit.
    """
    _check_moments("weight", weight, moments)
    if grad.shape != weight.shape:
        raise ValueError(f"grad: expected shape {list(weight.shape)} as the weight, got {list(grad.shape)}")
    if (project or renormalize) and weight.dim() != 2:
        raise ValueError(f"weight: project and renormalize need shape [rows, d], got {list(weight.shape)}")
    name = choose_backend(weight, backend)
    if name == "reference":
        return adam_rows_reference(weight, grad, moments, adam, project=project, renormalize=renormalize)
    if name == "triton" and weight.dim() == 2:
        return _triton_adam_rows(weight, grad.contiguous(), moments, adam, project, renormalize)
    step = torch.tensor(float(adam.step), device=weight.device)
    rows = _block_rows(weight)
    for start in range(0, weight.shape[0], rows):
        at = slice(start, start + rows)
        g = grad[at].to(torch.float32, copy=project)
        block = Moments(moments.first[at], moments.second[at])
        _torch_adam_block(weight[at], g, block, adam, step, project, renormalize)


def _merge(terms: Sequence[SparseGrad]) -> _Entries:
    first = terms[0]
    if len(terms) == 1:
        order = first.latents.transpose.order
        values, grads = first.latents.values.reshape(-1)[order], first.grad_values.reshape(-1)[order]
        return _Entries(first.latents.transpose, values, grads, first.x, first.grad_out)
    flat = torch.cat([t.latents.indices.reshape(-1) for t in terms])
    merged = transpose_indices(flat[:, None], first.latents.d_sae)
    tokens, count = [], 0
    for term in terms:
        n, k = term.grad_values.shape
        tokens.append(torch.arange(count, count + n, dtype=torch.int32, device=flat.device).repeat_interleave(k))
        count += n
    order = merged.order
    return _Entries(
        merged._replace(tokens=torch.cat(tokens)[order]),
        torch.cat([t.latents.values.reshape(-1) for t in terms])[order],
        torch.cat([t.grad_values.reshape(-1) for t in terms])[order],
        torch.cat([t.x for t in terms]),
        torch.cat([t.grad_out for t in terms]),
    )


def _torch_sparse_adam(
    entries: _Entries,
    weights: tuple[Tensor, Tensor],
    moments: tuple[Moments, Moments],
    adam: AdamStep,
    project: bool,
    renormalize: bool,
) -> None:
    step = torch.tensor(float(adam.step), device=weights[0].device)
    tokens, offsets = entries.transpose.tokens, entries.transpose.offsets
    rows = min(_block_rows(weight) for weight in weights)
    sources = ((entries.grad_values, entries.x, False, False), (entries.values, entries.grad_out, project, renormalize))
    bounds = [*offsets[::rows].tolist(), tokens.shape[0]]
    for i, start in enumerate(range(0, weights[0].shape[0], rows)):
        at, own = slice(start, start + rows), slice(bounds[i], bounds[i + 1])
        bags = offsets[start : start + rows + 1] - bounds[i]
        for weight, moment, (scale, dense, proj, renorm) in zip(weights, moments, sources, strict=True):
            grad = embedding_sum(dense, tokens[own], bags, scale[own]).float()
            block = Moments(moment.first[at], moment.second[at])
            _torch_adam_block(weight[at], grad, block, adam, step, proj, renorm)


def _check_terms(terms: Sequence[SparseGrad], W_enc: Tensor, W_dec: Tensor) -> None:
    if not terms:
        raise ValueError("terms: expected at least one SparseGrad, got none")
    for term in terms:
        guard(
            W_enc=(W_enc, "d_sae d_in"), W_dec=(W_dec, "d_sae d_out"), x=(term.x, "N d_in"),
            grad_out=(term.grad_out, "N d_out"), grad_values=(term.grad_values, "N k"),
            values=(term.latents.values, "N k"), indices=(term.latents.indices, "N k"),
        )  # fmt: skip
        if term.latents.d_sae != W_enc.shape[0]:
            raise ValueError(f"latents: expected d_sae = {W_enc.shape[0]} as in W_enc, got {term.latents.d_sae}")


@torch.no_grad()
def sparse_adam(
    terms: Sequence[SparseGrad],
    W_enc: Tensor,
    enc: Moments,
    W_dec: Tensor,
    dec: Moments,
    adam: AdamStep,
    *,
    project: bool = True,
    renormalize: bool = True,
    backend: Backend | None = None,
) -> None:
    """One Adam step in place on W_enc [d_sae, d_in] and W_dec [d_sae, d_out] from the sparse terms of a loss.

    Equal to summing the terms' `scatter_sum` gradients and calling `adam_rows` on each weight; `project` and
    `renormalize` concern W_dec alone. A latent of a compacted subset must carry its index in the full dictionary
    here. To clip gradients, scale `grad_values` and `grad_out` first. Raises ValueError for shapes that do not fit.
    """
    _check_moments("W_enc", W_enc, enc)
    _check_moments("W_dec", W_dec, dec)
    _check_terms(terms, W_enc, W_dec)
    name = choose_backend(W_enc, backend)
    if name == "reference":
        grad_enc = sum(scatter_sum_reference(t.latents.with_values(t.grad_values), t.x) for t in terms)
        grad_dec = sum(scatter_sum_reference(t.latents, t.grad_out) for t in terms)
        adam_rows_reference(W_enc, torch.as_tensor(grad_enc), enc, adam)
        adam_rows_reference(W_dec, torch.as_tensor(grad_dec), dec, adam, project=project, renormalize=renormalize)
        return
    entries = _merge(terms)
    entries = entries._replace(x=entries.x.contiguous(), grad_out=entries.grad_out.contiguous())
    if name == "torch":
        return _torch_sparse_adam(entries, (W_enc, W_dec), (enc, dec), adam, project, renormalize)
    _triton_sparse_adam(entries.grad_values, entries.transpose, entries.x, W_enc, enc, adam, False, False)
    _triton_sparse_adam(entries.values, entries.transpose, entries.grad_out, W_dec, dec, adam, project, renormalize)
