"""JumpReLU and its L0 with straight-through gradients of the thresholds (Rajamanoharan et al., arXiv 2407.14435).

    z  = pre * H(pre - threshold)                  [N, d_sae]
    l0 = sum over latents of H(pre - threshold)    [N]

H is the step. Its derivative, a delta, is replaced by K((pre - threshold) / bandwidth) / bandwidth with the rectangle
K(u) = 1 for |u| < 1/2, 0 elsewhere. Beside the output z and the gradient of `pre`, nothing of the size [N, d_sae] is
made: the sum over N for the threshold goes through [slabs of rows, d_sae] in Triton, through chunks of rows in PyTorch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import Backend, choose_backend, guard, launch, next_power_of_2, tl, triton

# Of a chunk of rows: it and its temporaries then stay in the cache.
CPU_BLOCK_BYTES = 2**19
GPU_BLOCK_BYTES = 2**26
ROWS, COLUMNS = 8, 256  # of a tile in the backward kernel
MAX_SLABS = 64


def jumprelu_reference(pre: Tensor, threshold: Tensor) -> Tensor:
    return pre * (pre > threshold)


def step_l0_reference(pre: Tensor, threshold: Tensor) -> Tensor:
    return (pre > threshold).to(_wide(pre)).sum(1)


def jumprelu_grads_reference(
    pre: Tensor, threshold: Tensor, grad: Tensor, bandwidth: float, ste_to_input: bool
) -> tuple[Tensor, Tensor]:
    """Of pre and of the threshold, given that of z."""
    delta = threshold / bandwidth * (((pre - threshold) / bandwidth).abs() < 0.5) * grad
    return (pre > threshold) * grad + (delta if ste_to_input else 0), -delta.sum(0)


def step_l0_grads_reference(
    pre: Tensor, threshold: Tensor, grad: Tensor, bandwidth: float, ste_to_input: bool
) -> tuple[Tensor, Tensor]:
    """Of pre and of the threshold, given that of l0."""
    delta = 1 / bandwidth * (((pre - threshold) / bandwidth).abs() < 0.5) * grad[:, None]
    return delta if ste_to_input else torch.zeros_like(pre), -delta.sum(0)


@triton.jit
def jumprelu_fwd_kernel(
    pre_ptr,  # [N, d_sae]
    threshold_ptr,  # [d_sae]
    z_ptr,  # [N, d_sae]
    d_sae,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pre = tl.load(pre_ptr + n * d_sae + f, mask=f < d_sae, other=0.0).to(tl.float32)
    threshold = tl.load(threshold_ptr + f, mask=f < d_sae, other=0.0).to(tl.float32)
    z = tl.where(pre <= threshold, 0.0, pre)  # a NaN stays one
    tl.store(z_ptr + n * d_sae + f, z.to(z_ptr.dtype.element_ty), mask=f < d_sae)


@triton.jit
def step_l0_fwd_kernel(
    pre_ptr,  # [N, d_sae]
    threshold_ptr,  # [d_sae]
    l0_ptr,  # [N] float32
    d_sae,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, d_sae, BLOCK):
        f = start + tl.arange(0, BLOCK)
        pre = tl.load(pre_ptr + n * d_sae + f, mask=f < d_sae, other=-float("inf")).to(tl.float32)
        threshold = tl.load(threshold_ptr + f, mask=f < d_sae, other=0.0).to(tl.float32)
        count += (pre > threshold).to(tl.int32)
    tl.store(l0_ptr + n, tl.sum(count, axis=0).to(tl.float32))


@triton.jit
def jumprelu_bwd_kernel(
    pre_ptr,  # [N, d_sae]
    threshold_ptr,  # [d_sae]
    grad_ptr,  # [N, d_sae] of z, or [N] of l0
    grad_pre_ptr,  # [N, d_sae], written if HAS_GRAD_PRE
    partial_ptr,  # [slabs, d_sae] float32: of the threshold, but for its factor
    N,
    d_sae,
    rows_per_slab,
    bandwidth,
    IS_L0: tl.constexpr,
    STE_TO_INPUT: tl.constexpr,
    HAS_GRAD_PRE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    first = tl.program_id(1).to(tl.int64) * rows_per_slab
    last = tl.minimum(first + rows_per_slab, N)
    threshold = tl.load(threshold_ptr + f, mask=f < d_sae, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < last)[:, None] & (f < d_sae)[None, :]
        at = n[:, None] * d_sae + f[None, :]
        pre = tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if IS_L0:
            grad = tl.load(grad_ptr + n, mask=n < last, other=0.0).to(tl.float32)[:, None]
        else:
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        near = tl.where(tl.abs(pre - threshold) < 0.5 * bandwidth, grad, 0.0)
        acc += near
        if HAS_GRAD_PRE:
            out = near * 0.0
            if STE_TO_INPUT:
                out = near / bandwidth if IS_L0 else near * threshold / bandwidth
            if not IS_L0:
                out += tl.where(pre > threshold, grad, 0.0)
            tl.store(grad_pre_ptr + at, out.to(grad_pre_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * d_sae + f, tl.sum(acc, axis=0), mask=f < d_sae)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _triton_grads(
    pre: Tensor, threshold: Tensor, grad: Tensor, grad_pre: Tensor | None, bandwidth: float, ste_to_input: bool
) -> Tensor:
    n, d_sae = pre.shape
    slabs = max(1, min(MAX_SLABS, -(-n // ROWS)))
    rows = -(-n // (slabs * ROWS)) * ROWS
    slabs = -(-n // max(1, rows))
    partial = torch.empty(slabs, d_sae, dtype=torch.float32, device=pre.device)
    launch(
        jumprelu_bwd_kernel, (-(-d_sae // COLUMNS), slabs),
        pre, threshold, grad, pre if grad_pre is None else grad_pre, partial, n, d_sae, rows, bandwidth,
        IS_L0=grad.dim() == 1, STE_TO_INPUT=ste_to_input, HAS_GRAD_PRE=grad_pre is not None,
        BLOCK_N=ROWS, BLOCK_F=COLUMNS, num_warps=4,
    )  # fmt: skip
    return partial.sum(0)


def _chunk_rows(pre: Tensor) -> int:
    limit = CPU_BLOCK_BYTES if pre.device.type == "cpu" else GPU_BLOCK_BYTES
    return max(1, limit // (4 * max(1, pre.shape[1])))


def _torch_grads(
    pre: Tensor, threshold: Tensor, grad: Tensor, grad_pre: Tensor | None, bandwidth: float, ste_to_input: bool
) -> Tensor:
    rows, dtype = _chunk_rows(pre), _wide(pre)
    threshold = threshold.to(dtype)
    total = torch.zeros(pre.shape[1], dtype=dtype, device=pre.device)
    scale = threshold / bandwidth if grad.dim() == 2 else torch.full_like(threshold, 1 / bandwidth)
    for start in range(0, pre.shape[0], rows):
        at = slice(start, start + rows)
        g = grad[at].to(dtype) if grad.dim() == 2 else grad[at, None].to(dtype)
        above = pre[at] - threshold
        near = above.abs().lt_(0.5 * bandwidth).mul_(g)
        total += near.sum(0)
        if grad_pre is None:
            continue
        out = near.mul_(scale) if ste_to_input else near.zero_()
        grad_pre[at] = out.addcmul_(above.gt_(0), g) if grad.dim() == 2 else out
    return total


def _grads(
    pre: Tensor, threshold: Tensor, grad: Tensor, need_pre: bool, bandwidth: float, ste_to_input: bool, name: Backend
) -> tuple[Tensor | None, Tensor]:
    """Of pre (where it is asked for) and of the threshold, given that of z [N, d_sae] or of l0 [N]."""
    is_l0 = grad.dim() == 1
    if name == "reference":
        function = step_l0_grads_reference if is_l0 else jumprelu_grads_reference
        grad_pre, grad_threshold = function(pre, threshold, grad, bandwidth, ste_to_input)
        return grad_pre.to(pre.dtype) if need_pre else None, grad_threshold.to(threshold.dtype)
    need_pre = need_pre and (ste_to_input or not is_l0)
    grad_pre = torch.empty_like(pre) if need_pre else None
    function = _triton_grads if name == "triton" else _torch_grads
    total = function(pre, threshold, grad.contiguous(), grad_pre, bandwidth, ste_to_input)
    scale = 1 / bandwidth if is_l0 else threshold.to(total.dtype) / bandwidth
    return grad_pre, (-scale * total).to(threshold.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool, name: Backend
    ) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.options = bandwidth, ste_to_input, name
        if name == "reference":
            return jumprelu_reference(pre, threshold)
        z, d_sae = torch.empty_like(pre), pre.shape[1]
        if name == "triton":
            block = min(1024, next_power_of_2(d_sae))
            launch(jumprelu_fwd_kernel, (pre.shape[0], -(-d_sae // block)), pre, threshold, z, d_sae, BLOCK=block)
            return z
        rows = _chunk_rows(pre)
        for start in range(0, pre.shape[0], rows):
            at = slice(start, start + rows)
            torch.mul(pre[at], pre[at] > threshold, out=z[at])
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, threshold = ctx.saved_tensors
        grads = _grads(pre, threshold, grad_outputs[0], ctx.needs_input_grad[0], *ctx.options)
        return *grads, None, None, None


class _StepL0(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool, name: Backend
    ) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.options = bandwidth, ste_to_input, name
        if name == "reference":
            return step_l0_reference(pre, threshold)
        l0, d_sae = torch.empty(pre.shape[0], dtype=_wide(pre), device=pre.device), pre.shape[1]
        if name == "triton":
            block = min(2048, next_power_of_2(d_sae))
            launch(step_l0_fwd_kernel, (pre.shape[0],), pre, threshold, l0, d_sae, BLOCK=block)
            return l0
        rows = _chunk_rows(pre)
        for start in range(0, pre.shape[0], rows):
            at = slice(start, start + rows)
            l0[at] = (pre[at] > threshold).sum(1)
        return l0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, threshold = ctx.saved_tensors
        grads = _grads(pre, threshold, grad_outputs[0], ctx.needs_input_grad[0], *ctx.options)
        return *grads, None, None, None


def _check(pre: Tensor, threshold: Tensor, bandwidth: float) -> None:
    guard(pre=(pre, "N d_sae"), threshold=(threshold, "d_sae"))
    if not bandwidth > 0:
        raise ValueError(f"bandwidth: must be above 0, got {bandwidth}")


def jumprelu(
    pre: Tensor, threshold: Tensor, bandwidth: float, *, ste_to_input: bool = False, backend: Backend | None = None
) -> Tensor:
    """[N, d_sae]: pre where it exceeds its latent's `threshold` [d_sae], else 0.

    The gradient of pre is that of the kept elements; that of the threshold is -(threshold / bandwidth) * K times that
    of z. `ste_to_input` lets the step's pseudo-derivative, (threshold / bandwidth) * K, through to pre as well.
    For log-thresholds pass their `exp()`. Raises ValueError for shapes that do not fit or a bandwidth not above 0.
    """
    _check(pre, threshold, bandwidth)
    name = choose_backend(pre, backend)
    return _JumpReLU.apply(pre.contiguous(), threshold.contiguous(), bandwidth, ste_to_input, name)


def step_l0(
    pre: Tensor, threshold: Tensor, bandwidth: float, *, ste_to_input: bool = False, backend: Backend | None = None
) -> Tensor:
    """[N], float32 at least: how many of each row of pre [N, d_sae] exceed the `threshold` [d_sae] of their latent.

    The gradient of the threshold is -(1 / bandwidth) * K; pre gets none, or with `ste_to_input` (1 / bandwidth) * K.
    Raises ValueError for shapes that do not fit or a bandwidth not above 0.
    """
    _check(pre, threshold, bandwidth)
    name = choose_backend(pre, backend)
    return _StepL0.apply(pre.contiguous(), threshold.contiguous(), bandwidth, ste_to_input, name)


def jumprelu_entries(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """`jumprelu` and the step of single elements: pre [E] and, for each, the `threshold` [E] of its latent.

    Gradients as those of `jumprelu` and `step_l0`, by plain autograd.
    """
    fixed = threshold.detach()
    above = (pre.detach() > fixed).to(pre.dtype)
    near = ((pre.detach() - fixed).abs() < 0.5 * bandwidth).to(pre.dtype)
    delta = (near / bandwidth) * (threshold - fixed)  # 0, with the gradient of the step's estimator
    return pre * above - fixed * delta, above - delta
