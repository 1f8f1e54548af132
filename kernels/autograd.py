"""The public face of the kernels: a differentiable sparse encoder and decoder, and their gradients as plain functions.

    latents = topk_encode(x, W_enc, b_enc, k)            [N, d_in] -> values and indices [N, k]
    x_hat = sparse_decode(latents, W_dec, b_dec)         -> [N, d_out]

`batch_topk_encode` and `threshold_encode` keep another number of latents in every row and pad with zeros.

A trainer that runs its own backward calls `encode_topk`, `sparse_decode`, `decode_grads` and `encode_grads` under
`no_grad`; one that has no use for the gradients of the weights themselves lets `sparse_adam` make and apply
them at once, which is fastest.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch_topk import KthLargest, encode_batch_topk, encode_threshold, smallest_kept
from .index_transpose import IndexTranspose
from .launch import Backend, guard
from .sparse_matmul import SparseLatents, gather_sum, latent_sum, sampled_dot, scatter_sum
from .topk import encode_topk

Selection: TypeAlias = Callable[[Tensor, Tensor, Tensor], SparseLatents]


class DecodeGrads(NamedTuple):
    values: Tensor | None  # [N, k]
    W_dec: Tensor | None  # [d_sae, d_out]
    b_dec: Tensor | None  # [d_out]


class EncodeGrads(NamedTuple):
    x: Tensor | None  # [N, d_in]
    W_enc: Tensor | None  # [d_sae, d_in]
    b_enc: Tensor  # [d_sae]


def value_grads(latents: SparseLatents, W_dec: Tensor, grad_out: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[N, k]: the gradient of the values of a decode, 0 where a value is 0 (the ReLU's own gradient included)."""
    return sampled_dot(grad_out, W_dec, latents.indices, backend=backend).mul_(latents.values > 0)


def decode_grads(
    latents: SparseLatents,
    W_dec: Tensor,
    grad_out: Tensor,
    *,
    values: bool = True,
    weight: bool = True,
    bias: bool = True,
    backend: Backend | None = None,
) -> DecodeGrads:
    """Gradients of `sparse_decode` given that of its output, `grad_out` [N, d_out]; what is switched off is None."""
    guard(grad_out=(grad_out, "N d_out"), W_dec=(W_dec, "d_sae d_out"), values=(latents.values, "N k"))
    return DecodeGrads(
        value_grads(latents, W_dec, grad_out, backend=backend) if values else None,
        scatter_sum(latents, grad_out, backend=backend) if weight else None,
        grad_out.sum(0) if bias else None,
    )


def encode_grads(
    latents: SparseLatents,
    grad_values: Tensor,
    x: Tensor,
    W_enc: Tensor,
    *,
    input: bool = False,
    weight: bool = True,
    backend: Backend | None = None,
) -> EncodeGrads:
    """Gradients of the encoder given those of its values, `grad_values` [N, k] (already 0 where a value is 0).

    `x` [N, d_in] is what was multiplied by W_enc, any bias taken off. The gradient of such a bias is
    -(b_enc @ W_enc) of the returned b_enc: no need to ask for that of x.
    """
    guard(x=(x, "N d_in"), W_enc=(W_enc, "d_sae d_in"), grad_values=(grad_values, "N k"))
    entries = latents.with_values(grad_values)
    return EncodeGrads(
        gather_sum(grad_values, latents.indices, W_enc, backend=backend) if input else None,
        scatter_sum(entries, x, backend=backend) if weight else None,
        latent_sum(entries),
    )


class _SparseEncode(torch.autograd.Function):
    """An encoder that keeps the latents which `select`, given (x - b_dec, W_enc, b_enc), chooses."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        select: Selection,
        cache: list[IndexTranspose],
        backend: Backend | None,
    ) -> tuple[Tensor, Tensor]:
        centred = x if b_dec is None else x - b_dec
        latents = select(centred, W_enc, b_enc)
        ctx.save_for_backward(centred, W_enc, latents.values, latents.indices)
        ctx.cache, ctx.backend = cache, backend
        ctx.mark_non_differentiable(latents.indices)
        return latents.values, latents.indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_values = grad_outputs[0]
        centred, W_enc, values, indices = ctx.saved_tensors
        latents = SparseLatents(values, indices, W_enc.shape[0], ctx.cache)
        need_x, need_W, need_b, need_b_dec = ctx.needs_input_grad[:4]
        grads = encode_grads(
            latents, grad_values * (values > 0), centred, W_enc, input=need_x, weight=need_W, backend=ctx.backend
        )
        b_dec = -(grads.b_enc @ W_enc) if need_b_dec else None
        return grads.x, grads.W_enc, grads.b_enc if need_b else None, b_dec, None, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        cache: list[IndexTranspose],
        backend: Backend | None,
    ) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        ctx.cache, ctx.backend = cache, backend
        return gather_sum(values, indices, W_dec, b_dec, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_out = grad_outputs[0]
        values, indices, W_dec = ctx.saved_tensors
        latents = SparseLatents(values, indices, W_dec.shape[0], ctx.cache)
        need_values, _, need_W, need_b = ctx.needs_input_grad[:4]
        grads = decode_grads(
            latents, W_dec, grad_out, values=need_values, weight=need_W, bias=need_b, backend=ctx.backend
        )
        return grads.values, None, grads.W_dec, grads.b_dec, None, None


def _encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, select: Selection, backend: Backend | None
) -> SparseLatents:
    guard(x=(x, "N d_in"), W_enc=(W_enc, "d_sae d_in"), b_enc=(b_enc, "d_sae"), b_dec=(b_dec, "d_in"))
    cache: list[IndexTranspose] = []
    values, indices = _SparseEncode.apply(x, W_enc, b_enc, b_dec, select, cache, backend)
    return SparseLatents(values, indices, W_enc.shape[0], cache)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> SparseLatents:
    """The k largest of each row of (x - b_dec) @ W_enc.T + b_enc, through a ReLU (Gao et al., arXiv 2406.04093, TopK).

    x [N, d_in], W_enc [d_sae, d_in], b_enc [d_sae], b_dec [d_in] or None; the values of the result are differentiable
    in all four. Passing `b_dec` here rather than subtracting it first saves the gradient of x. For `matmul_dtype` see
    `topk.encode_topk`. To encode with some latents only, index both: `topk_encode(x, W_enc[dead], b_enc[dead], k_aux)`;
    gradients reach the whole weight. Raises ValueError for shapes or a k that do not fit.
    """
    select = partial(encode_topk, k=k, matmul_dtype=matmul_dtype, backend=backend)
    return _encode(x, W_enc, b_enc, b_dec, select, backend)


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_dec: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    kth_largest: KthLargest | None = None,
    num_rows: int | None = None,
    backend: Backend | None = None,
) -> tuple[SparseLatents, Tensor]:
    """The N * k largest positive of (x - b_dec) @ W_enc.T + b_enc (Bussmann et al., arXiv 2412.06410), padded.

    Returns the latents, differentiable as those of `topk_encode`, and the smallest value kept, which is not. See
    `batch_topk.encode_batch_topk`. Raises ValueError for shapes or a k that do not fit.
    """

    def select(centred: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseLatents:
        return encode_batch_topk(
            centred, W_enc, b_enc, k,
            matmul_dtype=matmul_dtype, kth_largest=kth_largest, num_rows=num_rows, backend=backend,
        )[0]  # fmt: skip

    latents = _encode(x, W_enc, b_enc, b_dec, select, backend)
    return latents, smallest_kept(latents.values.detach())


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | float,
    *,
    b_dec: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> SparseLatents:
    """All of (x - b_dec) @ W_enc.T + b_enc above 0 and the `threshold` [d_sae] (or scalar) of its latent, padded.

    Differentiable as `topk_encode`; the threshold gets no gradient here (that is `jumprelu`'s work). See
    `batch_topk.encode_threshold`. Raises ValueError for shapes that do not fit.
    """
    select = partial(encode_threshold, threshold=threshold, matmul_dtype=matmul_dtype, backend=backend)
    return _encode(x, W_enc, b_enc, b_dec, select, backend)


def sparse_decode(
    latents: SparseLatents, W_dec: Tensor, b_dec: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """[N, d_out]: row n is the sum of values[n, j] * W_dec[indices[n, j]], plus b_dec [d_out].

    Differentiable in the values, W_dec [d_sae, d_out] and b_dec. The gradient of a value that is 0 is 0, which is
    that of the ReLU before it. Raises ValueError for shapes that do not fit.
    """
    if W_dec.shape[0] != latents.d_sae:
        raise ValueError(f"W_dec: expected d_sae = {latents.d_sae} rows as in latents, got shape {list(W_dec.shape)}")
    guard(W_dec=(W_dec, "d_sae d_out"), b_dec=(b_dec, "d_out"), values=(latents.values, "N k"))
    return _SparseDecode.apply(latents.values, latents.indices, W_dec, b_dec, latents.cache, backend)
