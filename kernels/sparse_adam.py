"""Adam on both weights of a dictionary straight from the sparse entries of a loss.

The gradients of the weights are made, used and dropped a few rows at a time: they are never in memory as [d_sae, d].
"""

from typing import NamedTuple, TypeAlias

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
from .latent_rows import latent_row
from .launch import Backend, choose_backend, guard, launch, next_power_of_2, tl, triton
from .sparse_grads import SparseGrads, summed_row, summed_row_arguments


class _Target(NamedTuple):
    weight: Tensor
    moments: Moments
    copy: Tensor | None
    project: bool = False
    renormalize: bool = False

    def rows(self, at: slice) -> "_Target":
        copy = None if self.copy is None else self.copy[at]
        return self._replace(weight=self.weight[at], moments=Moments(*(m[at] for m in self.moments)), copy=copy)


#: W_enc and W_dec; None: left as it is.
_Targets: TypeAlias = tuple[_Target | None, _Target | None]


@triton.jit
def sparse_adam_bwd_kernel(
    weights_ptr,  # [entries], sorted by latent
    tokens_ptr,  # [entries], sorted by latent
    offsets_ptr,  # [d_sae + 1]
    dense_ptr,  # [N, d]
    sums_ptr,  # [entries // SEGMENT, d] float32, see latent_rows
    rows_ptr,  # [m, d], summed already; read if HAS_ROWS
    row_at_ptr,  # [d_sae] int32: where a latent stands in them, or -1
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
    HAS_ROWS: tl.constexpr,
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
    if HAS_ROWS:
        g += summed_row(rows_ptr, row_at_ptr, f, cols, d)
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


def _triton_sparse_adam(
    grads: SparseGrads, factors: Tensor, dense: Tensor, rows: Tensor | None, to: _Target, adam: AdamStep
) -> None:
    arguments, constants = summed_row_arguments(grads, factors, dense, rows)
    (d_sae, d), block = to.weight.shape, next_power_of_2(to.weight.shape[1])
    launch(
        sparse_adam_bwd_kernel, (d_sae,),
        *arguments, to.weight, *to.moments, to.weight if to.copy is None else to.copy, d, *scalars(adam),
        **constants, PROJECT=to.project, RENORMALIZE=to.renormalize, HAS_COPY=to.copy is not None,
        BLOCK_D=block, num_warps=num_warps(block),
    )  # fmt: skip


def _torch_sparse_adam(grads: SparseGrads, targets: _Targets, adam: AdamStep) -> None:
    device = grads.term.x.device
    step = torch.tensor(float(adam.step), device=device)
    rows = block_rows(max(t.weight.shape[1] for t in targets if t is not None), device)
    for at, *pair in grads.blocks(rows, (targets[0] is not None, targets[1] is not None)):
        for grad, target in zip(pair, targets, strict=True):
            if grad is None or target is None:
                continue
            to = target.rows(at)
            torch_adam_block(to.weight, grad, to.moments, adam, step, to.project, to.renormalize)
            if to.copy is not None:
                to.copy.copy_(to.weight)


def _reference_sparse_adam(grads: SparseGrads, targets: _Targets, adam: AdamStep) -> None:
    for grad, to in zip(grads.dense(backend="reference"), targets, strict=True):
        if to is None:
            continue
        adam_rows_reference(to.weight, grad, to.moments, adam, project=to.project, renormalize=to.renormalize)
        if to.copy is not None:
            to.copy.copy_(to.weight)


def _check_copies(copies: tuple[Tensor | None, Tensor | None], W_enc: Tensor, W_dec: Tensor) -> None:
    for copy, weight in zip(copies, (W_enc, W_dec), strict=True):
        if copy is None:
            continue
        if copy.shape != weight.shape or not copy.is_contiguous() or copy.device != weight.device:
            raise ValueError(
                f"copies: must be contiguous and on the device and in the shape of the weight, {weight.shape}"
            )


@torch.no_grad()
def sparse_adam(
    grads: SparseGrads,
    W_enc: Tensor,
    enc: Moments | None,
    W_dec: Tensor,
    dec: Moments | None,
    adam: AdamStep,
    *,
    project: bool = True,
    renormalize: bool = True,
    copies: tuple[Tensor | None, Tensor | None] = (None, None),
    backend: Backend | None = None,
) -> None:
    """One Adam step in place on W_enc [d_sae, d_in] and W_dec [d_sae, d_out] from the sparse gradients of a loss.

    Equal to making the gradients with `dense` and calling `adam_rows` on each weight; `project` and
    `renormalize` concern W_dec alone. `copies` of the weights, in bfloat16 usually, are written in the same pass.
    A weight without moments is frozen: neither it nor its copy is touched, and its gradient is never made.
    Raises ValueError for shapes that do not fit.
    """
    for name, weight, moments in (("W_enc", W_enc, enc), ("W_dec", W_dec, dec)):
        if moments is not None:
            check_moments(name, weight, moments)
    guard(W_enc=(W_enc, "d_sae d_in"), W_dec=(W_dec, "d_sae d_out"), x=(grads.term.x, "N d_in"),
          grad_out=(grads.term.grad_out, "N d_out"))  # fmt: skip
    if grads.d_sae != W_enc.shape[0]:
        raise ValueError(f"latents: expected d_sae = {W_enc.shape[0]} as in W_enc, got {grads.d_sae}")
    _check_copies(copies, W_enc, W_dec)
    to_enc = None if enc is None else _Target(W_enc, enc, copies[0])
    to_dec = None if dec is None else _Target(W_dec, dec, copies[1], project, renormalize)
    if to_enc is None and to_dec is None:
        return
    name = choose_backend(W_enc, backend)
    if name == "reference":
        return _reference_sparse_adam(grads, (to_enc, to_dec), adam)
    if name == "torch":
        return _torch_sparse_adam(grads, (to_enc, to_dec), adam)
    for parts, target in zip(grads.sums, (to_enc, to_dec), strict=True):
        if target is not None:
            _triton_sparse_adam(grads, *parts, target, adam)
