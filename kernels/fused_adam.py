"""Adam on a weight whose rows are latents, fused with what a dictionary does to its decoder rows around the step.

Projection takes from a row's gradient its component along the row; renormalisation puts the row back on the unit
sphere after the step. Adam is that of Kingma and Ba (arXiv 1412.6980), bias-corrected, without weight decay. It
computes in float32; moments may be kept in bfloat16.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Backend, choose_backend, launch, next_power_of_2, tl, triton

# Of a weight, at a time: the gradient, weight and moments of a block then stay in the cache between passes.
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
    """Adam's running means of the gradient and of its square, in the shape of the weight."""

    first: Tensor
    second: Tensor

    @classmethod
    def like(cls, weight: Tensor, dtype: torch.dtype = torch.float32) -> "Moments":
        """Zeros; in bfloat16 they take half of the memory and are rounded to 8 bits after every step."""
        return cls(*(torch.zeros(weight.shape, dtype=dtype, device=weight.device) for _ in range(2)))


def adam_rows_reference(
    weight: Tensor, grad: Tensor, moments: Moments, adam: AdamStep, *, project: bool = False, renormalize: bool = False
) -> None:
    dtype = torch.promote_types(moments.first.dtype, torch.float32)
    w, g = weight.to(dtype), grad.to(dtype)
    if project:
        g = g - (g * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True).clamp_min(TINY) * w
    m = adam.beta1 * moments.first.to(dtype) + (1 - adam.beta1) * g
    v = adam.beta2 * moments.second.to(dtype) + (1 - adam.beta2) * g * g
    moments.first.copy_(m)
    moments.second.copy_(v)
    m, v = m / (1 - adam.beta1**adam.step), v / (1 - adam.beta2**adam.step)
    w = w - adam.lr * m / (v.sqrt() + adam.eps)
    if renormalize:
        w = w / (w * w).sum(1, keepdim=True).clamp_min(TINY).sqrt()
    weight.copy_(w)


@triton.jit
def adam_row(w, g, m_ptrs, v_ptrs, mask, lr, beta1, beta2, eps, correction1, correction2, PROJECT, RENORMALIZE):
    """One row through projection, Adam and renormalisation; stores the moments, returns the new row."""
    if PROJECT:
        g -= tl.sum(g * w, axis=0) / tl.maximum(tl.sum(w * w, axis=0), 1e-30) * w
    m = beta1 * tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32) + (1.0 - beta1) * g
    v = beta2 * tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32) + (1.0 - beta2) * g * g
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
    first_ptr,  # [rows, d], in place
    second_ptr,  # [rows, d], in place
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


def scalars(adam: AdamStep) -> tuple[float, ...]:
    corrections = 1 - adam.beta1**adam.step, 1 - adam.beta2**adam.step
    return adam.lr, adam.beta1, adam.beta2, adam.eps, *corrections


def num_warps(block: int) -> int:
    return max(4, min(16, block // 128))


def _triton_adam_rows(
    weight: Tensor, grad: Tensor, moments: Moments, adam: AdamStep, project: bool, renormalize: bool
) -> None:
    (rows, d), block = weight.shape, next_power_of_2(weight.shape[1])
    launch(
        adam_rows_fwd_kernel, (rows,),
        weight, grad, moments.first, moments.second, d, *scalars(adam),
        PROJECT=project, RENORMALIZE=renormalize, BLOCK_D=block, num_warps=num_warps(block),
    )  # fmt: skip


def torch_adam_block(
    weight: Tensor, grad: Tensor, moments: Moments, adam: AdamStep, step: Tensor, project: bool, renormalize: bool
) -> None:
    """`grad` is scratch: the projection is made in place."""
    w, m, v = (t if t.dtype == torch.float32 else t.float() for t in (weight, *moments))
    if project:
        along = torch.linalg.vecdot(grad, w) / torch.linalg.vecdot(w, w).clamp_min_(TINY)
        grad.addcmul_(w, along[:, None], value=-1)
    torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
        [w], [grad], [m], [v], [], [step], lr=adam.lr, beta1=adam.beta1, beta2=adam.beta2,
        weight_decay=0.0, eps=adam.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if renormalize:
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min_(TINY**0.5))
    for kept, new in zip((weight, *moments), (w, m, v), strict=True):
        if new is not kept:
            kept.copy_(new)


def block_rows(width: int, device: torch.device) -> int:
    """Rows of `width` numbers that a CPU works on at a time; elsewhere all of them."""
    return max(1, CPU_BLOCK_BYTES // (4 * max(1, width))) if device.type == "cpu" else 2**31


def check_moments(name: str, weight: Tensor, moments: Moments) -> None:
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
    check_moments("weight", weight, moments)
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
    rows = block_rows(weight.shape[1:].numel(), weight.device)
    for start in range(0, weight.shape[0], rows):
        at = slice(start, start + rows)
        g = grad[at].to(torch.float32, copy=project)
        block = Moments(moments.first[at], moments.second[at])
        torch_adam_block(weight[at], g, block, adam, step, project, renormalize)
