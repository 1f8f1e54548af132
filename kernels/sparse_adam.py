"""Adam on both weights of a dictionary straight from the sparse entries of a loss.

The gradients of the weights are made, used and dropped a few rows at a time: they are never in memory as [d_sae, d].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .fused_adam import (
    AdamStep,
    Moments,
    adam_row,
    adam_rows_reference,
    block_rows,
    check_moments,
    num_warps,
    scalars,
    torch_adam_block,
)
from .index_transpose import IndexTranspose, transpose_indices
from .latent_rows import SEGMENT, latent_row, segment_sums
from .launch import Backend, choose_backend, guard, launch, next_power_of_2, tl, triton
from .sparse_matmul import SparseLatents, embedding_sum, scatter_sum_reference


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


class _Target(NamedTuple):
    weight: Tensor
    moments: Moments
    copy: Tensor | None
    project: bool = False
    renormalize: bool = False

    def rows(self, at: slice) -> "_Target":
        copy = None if self.copy is None else self.copy[at]
        return self._replace(weight=self.weight[at], moments=Moments(*(m[at] for m in self.moments)), copy=copy)


@triton.jit
def sparse_adam_bwd_kernel(
    weights_ptr,  # [entries], sorted by latent
    tokens_ptr,  # [entries], sorted by latent
    offsets_ptr,  # [d_sae + 1]
    dense_ptr,  # [N, d]
    sums_ptr,  # [entries // SEGMENT, d] float32, see latent_rows
    weight_ptr,  # [d_sae, d], in place
    first_ptr,  # [d_sae, d], in place
    second_ptr,  # [d_sae, d], in place
    copy_ptr,  # [d_sae, d], written if HAS_COPY
    d,
    lr,
    beta1,
    beta2,
    eps,
    correction1,
    correction2,
    PROJECT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < d
    g = latent_row(weights_ptr, tokens_ptr, offsets_ptr, dense_ptr, sums_ptr, f, cols, d, SEGMENT, BLOCK_T, BLOCK_D)
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
    if HAS_COPY:
        tl.store(copy_ptr + at, w.to(copy_ptr.dtype.element_ty), mask=mask)


def _triton_sparse_adam(weights: Tensor, transpose: IndexTranspose, dense: Tensor, to: _Target, adam: AdamStep) -> None:
    (d_sae, d), block = to.weight.shape, next_power_of_2(to.weight.shape[1])
    copy = to.weight if to.copy is None else to.copy
    launch(
        sparse_adam_bwd_kernel, (d_sae,),
        weights, transpose.tokens, transpose.offsets, dense, segment_sums(weights, transpose, dense),
        to.weight, *to.moments, copy, d, *scalars(adam),
        PROJECT=to.project, RENORMALIZE=to.renormalize, HAS_COPY=to.copy is not None,
        SEGMENT=SEGMENT, BLOCK_T=4, BLOCK_D=block, num_warps=num_warps(block),
    )  # fmt: skip


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


def _torch_sparse_adam(entries: _Entries, enc: _Target, dec: _Target, adam: AdamStep) -> None:
    step = torch.tensor(float(adam.step), device=enc.weight.device)
    tokens, offsets = entries.transpose.tokens, entries.transpose.offsets
    rows = min(block_rows(enc.weight), block_rows(dec.weight))
    sources = ((entries.grad_values, entries.x, enc), (entries.values, entries.grad_out, dec))
    bounds = [*offsets[::rows].tolist(), tokens.shape[0]]
    for i, start in enumerate(range(0, enc.weight.shape[0], rows)):
        own = slice(bounds[i], bounds[i + 1])
        bags = offsets[start : start + rows + 1] - bounds[i]
        for scale, dense, target in sources:
            to = target.rows(slice(start, start + rows))
            grad = embedding_sum(dense, tokens[own], bags, scale[own]).float()
            torch_adam_block(to.weight, grad, to.moments, adam, step, to.project, to.renormalize)
            if to.copy is not None:
                to.copy.copy_(to.weight)


def _reference_sparse_adam(terms: Sequence[SparseGrad], enc: _Target, dec: _Target, adam: AdamStep) -> None:
    grad_enc = sum(scatter_sum_reference(t.latents.with_values(t.grad_values), t.x) for t in terms)
    grad_dec = sum(scatter_sum_reference(t.latents, t.grad_out) for t in terms)
    for grad, to in ((grad_enc, enc), (grad_dec, dec)):
        adam_rows_reference(
            to.weight, torch.as_tensor(grad), to.moments, adam, project=to.project, renormalize=to.renormalize
        )
        if to.copy is not None:
            to.copy.copy_(to.weight)


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


def _check_copies(copies: tuple[Tensor, Tensor] | None, W_enc: Tensor, W_dec: Tensor) -> None:
    for copy, weight in zip(copies or (), (W_enc, W_dec), strict=False):
        if copy.shape != weight.shape or not copy.is_contiguous() or copy.device != weight.device:
            raise ValueError(
                f"copies: must be contiguous and on the device and in the shape of the weight, {weight.shape}"
            )


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
    copies: tuple[Tensor, Tensor] | None = None,
    backend: Backend | None = None,
) -> None:
    """One Adam step in place on W_enc [d_sae, d_in] and W_dec [d_sae, d_out] from the sparse terms of a loss.

    Equal to summing the terms' `scatter_sum` gradients and calling `adam_rows` on each weight; `project` and
    `renormalize` concern W_dec alone. `copies` of both weights, in bfloat16 usually, are written in the same pass. A
    latent of a compacted subset must carry its index in the full dictionary here. To clip gradients, scale
    `grad_values` and `grad_out` first. Raises ValueError for shapes that do not fit.
    """
    check_moments("W_enc", W_enc, enc)
    check_moments("W_dec", W_dec, dec)
    _check_terms(terms, W_enc, W_dec)
    _check_copies(copies, W_enc, W_dec)
    copy_enc, copy_dec = copies or (None, None)
    to_enc, to_dec = _Target(W_enc, enc, copy_enc), _Target(W_dec, dec, copy_dec, project, renormalize)
    name = choose_backend(W_enc, backend)
    if name == "reference":
        return _reference_sparse_adam(terms, to_enc, to_dec, adam)
    entries = _merge(terms)
    entries = entries._replace(x=entries.x.contiguous(), grad_out=entries.grad_out.contiguous())
    if name == "torch":
        return _torch_sparse_adam(entries, to_enc, to_dec, adam)
    _triton_sparse_adam(entries.grad_values, entries.transpose, entries.x, to_enc, adam)
    _triton_sparse_adam(entries.values, entries.transpose, entries.grad_out, to_dec, adam)
