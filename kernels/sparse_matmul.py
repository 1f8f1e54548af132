"""Products of a sparse [N, d_sae] matrix, k entries a row, with dense matrices whose rows are latents or tokens.

    gather_sum    sparse   @ W      [N, d]      decode, and the gradient of x
    sampled_dot   dense    @ W.T    [N, k]      at the kept indices only: the gradient of the values
    scatter_sum   sparse.T @ dense  [d_sae, d]  the gradient of a weight

Nothing here has N * k * d or N * d_sae elements. `scatter_sum` works on the transpose of the indices (entries sorted by
latent), which one step computes once and shares between the gradients of both weights. No op uses atomics.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .index_transpose import IndexTranspose, transpose_indices
from .latent_rows import SEGMENT, latent_row, segment_sums
from .launch import Backend, choose_backend, guard, launch, next_power_of_2, tl, triton


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """The kept activations of N tokens: `values` [N, k] >= 0 and `indices` [N, k] below `d_sae`.

    The indices of a row are distinct. A value of 0 marks an entry that is off. `transpose` is computed at the first use
    and shared by every copy made with `with_values`.
    """

    values: Tensor
    indices: Tensor
    d_sae: int
    cache: list[IndexTranspose] = field(default_factory=list, repr=False)

    @property
    def transpose(self) -> IndexTranspose:
        if not self.cache:
            self.cache.append(transpose_indices(self.indices, self.d_sae))
        return self.cache[0]

    def with_values(self, values: Tensor) -> "SparseLatents":
        """The same entries with other values [N, k]."""
        guard(values=(values, "N k"), indices=(self.indices, "N k"))
        return SparseLatents(values, self.indices, self.d_sae, self.cache)

    def to_dense(self) -> Tensor:
        """[N, d_sae], differentiable. For tests and small inputs."""
        dense = self.values.new_zeros(self.values.shape[0], self.d_sae)
        return dense.scatter_add(1, self.indices.long(), self.values)


def gather_sum_reference(values: Tensor, indices: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    out = (values[:, :, None] * W[indices.long()]).sum(1)
    return out if bias is None else out + bias


def sampled_dot_reference(dense: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    return (dense @ W.T).gather(1, indices.long())


def scatter_sum_reference(latents: SparseLatents, dense: Tensor) -> Tensor:
    return latents.to_dense().T @ dense


@triton.jit
def gather_sum_fwd_kernel(
    values_ptr,  # [N, k]
    indices_ptr,  # [N, k]
    W_ptr,  # [d_sae, d]
    bias_ptr,  # [d], read if HAS_BIAS
    out_ptr,  # [N, d]
    k,
    d,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        v = tl.load(values_ptr + n * k + j, mask=j < k, other=0.0).to(tl.float32)
        rows = tl.load(indices_ptr + n * k + j, mask=j < k, other=0).to(tl.int64)
        # Entries that are off read nothing.
        mask = (v != 0.0)[:, None] & (cols < d)[None, :]
        w = tl.load(W_ptr + rows[:, None] * d + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(v[:, None] * w, axis=0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * d + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < d)


@triton.jit
def sampled_dot_fwd_kernel(
    dense_ptr,  # [N, d]
    W_ptr,  # [d_sae, d]
    indices_ptr,  # [N, k]
    out_ptr,  # [N, k]
    k,
    d,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.load(indices_ptr + n * k + j, mask=j < k, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        x = tl.load(dense_ptr + n * d + cols, mask=cols < d, other=0.0).to(tl.float32)
        mask = (j < k)[:, None] & (cols < d)[None, :]
        w = tl.load(W_ptr + rows[:, None] * d + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += x[None, :] * w
    tl.store(out_ptr + n * k + j, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=j < k)


@triton.jit
def scatter_sum_fwd_kernel(
    weights_ptr,  # [N * k], sorted by latent
    tokens_ptr,  # [N * k], sorted by latent
    offsets_ptr,  # [d_sae + 1]
    dense_ptr,  # [N, d]
    sums_ptr,  # [N * k // SEGMENT, d] float32, see latent_rows
    out_ptr,  # [d_sae, d]
    d,
    SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = latent_row(weights_ptr, tokens_ptr, offsets_ptr, dense_ptr, sums_ptr, f, cols, d, SEGMENT, BLOCK_T, BLOCK_D)
    tl.store(out_ptr + f * d + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < d)


def _triton_gather_sum(values: Tensor, indices: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    (n, k), d = values.shape, W.shape[1]
    out = torch.empty(n, d, dtype=W.dtype, device=W.device)
    block = min(512, next_power_of_2(d))
    grid = (n, -(-d // block))
    launch(
        gather_sum_fwd_kernel, grid,
        values, indices, W, W if bias is None else bias, out, k, d,
        HAS_BIAS=bias is not None, BLOCK_K=min(8, next_power_of_2(k)), BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return out


def _triton_sampled_dot(dense: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    (n, k), d = indices.shape, W.shape[1]
    out = torch.empty(n, k, dtype=dense.dtype, device=W.device)
    block_k = min(16, next_power_of_2(k))
    launch(
        sampled_dot_fwd_kernel,
        (n, -(-k // block_k)),
        dense,
        W,
        indices,
        out,
        k,
        d,
        BLOCK_K=block_k,
        BLOCK_D=min(256, next_power_of_2(d)),
        num_warps=4,
    )
    return out


def _triton_scatter_sum(weights: Tensor, transpose: IndexTranspose, dense: Tensor) -> Tensor:
    d_sae, d = transpose.offsets.shape[0] - 1, dense.shape[1]
    out = torch.empty(d_sae, d, dtype=dense.dtype, device=dense.device)
    block = min(512, next_power_of_2(d))
    launch(
        scatter_sum_fwd_kernel, (d_sae, -(-d // block)),
        weights, transpose.tokens, transpose.offsets, dense, segment_sums(weights, transpose, dense), out, d,
        SEGMENT=SEGMENT, BLOCK_T=8, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return out


def _torch_sampled_dot(dense: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    """One dot product an entry, in place in memory: what `embedding_bag` does for its own `per_sample_weights`."""
    n, k = indices.shape
    flat = indices.reshape(-1).long()
    starts = torch.arange(0, n * k, max(k, 1), device=flat.device)
    bags = torch.arange(n, device=flat.device).repeat_interleave(k)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(dense, W, flat, starts, bags, 0).view(n, k)


def embedding_sum(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """[bags, d]: the weighted sum of the `table` rows of each bag; `offsets` [bags + 1]."""
    return F.embedding_bag(
        rows, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


def gather_sum(
    values: Tensor, indices: Tensor, W: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """[N, d] in W's dtype: row n is the sum over j of values[n, j] * W[indices[n, j]], plus `bias` [d].

    Raises ValueError where values [N, k], indices [N, k], W [d_sae, d] and bias [d] do not fit together.
    """
    guard(values=(values, "N k"), indices=(indices, "N k"), W=(W, "d_sae d"), bias=(bias, "d"))
    name = choose_backend(W, backend)
    if name == "reference":
        return gather_sum_reference(values, indices, W, bias)
    values, indices, W = values.contiguous(), indices.contiguous(), W.contiguous()
    if name == "triton":
        return _triton_gather_sum(values, indices, W, None if bias is None else bias.contiguous())
    n, k = values.shape
    offsets = torch.arange(0, n * k + 1, k, dtype=indices.dtype, device=W.device)
    out = embedding_sum(W, indices.view(-1), offsets, values.view(-1))
    return out if bias is None else out.add_(bias)


def sampled_dot(dense: Tensor, W: Tensor, indices: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[N, k] in dense's dtype: entry (n, j) is dense[n] . W[indices[n, j]].

    Raises ValueError where dense [N, d], W [d_sae, d] and indices [N, k] do not fit together.
    """
    guard(dense=(dense, "N d"), W=(W, "d_sae d"), indices=(indices, "N k"))
    name = choose_backend(W, backend)
    if name == "reference":
        return sampled_dot_reference(dense, W, indices)
    dense, W, indices = dense.contiguous(), W.contiguous(), indices.contiguous()
    if name == "triton":
        return _triton_sampled_dot(dense, W, indices)
    return _torch_sampled_dot(dense.to(W.dtype), W, indices).to(dense.dtype)


def scatter_sum(latents: SparseLatents, dense: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[d_sae, d] in dense's dtype: row f is the sum of value * dense[n] over the tokens n that keep latent f.

    Rows of latents that no token keeps are 0. Raises ValueError where the values [N, k] do not fit dense [N, d].
    """
    guard(values=(latents.values, "N k"), dense=(dense, "N d"))
    name = choose_backend(dense, backend)
    if name == "reference":
        return scatter_sum_reference(latents, dense)
    transpose = latents.transpose
    return segmented_sum(latents.values.reshape(-1).index_select(0, transpose.order), transpose, dense, backend=name)


def segmented_sum(weights: Tensor, runs: IndexTranspose, dense: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[runs, d]: row r is the sum of weights[e] * dense[tokens[e]] over the entries e of run r, given as a transpose.

    `weights` [entries] is in the order of the runs. Sparse backends only; "reference" runs as "torch".
    """
    dense = dense.contiguous()
    if choose_backend(dense, backend) == "triton":
        runs = runs._replace(tokens=runs.tokens.int(), offsets=runs.offsets.int())
        return _triton_scatter_sum(weights, runs, dense)
    return embedding_sum(dense, runs.tokens, runs.offsets, weights)


def run_sum(weights: Tensor, runs: IndexTranspose) -> Tensor:
    """[runs]: the sum of each run's `weights` [entries], which are in the order of the runs; float32 on the way."""
    wide = weights.float() if weights.dtype == torch.bfloat16 else weights
    sums = torch.segment_reduce(wide, "sum", offsets=runs.offsets.long(), unsafe=True, initial=0.0)
    return sums.to(weights.dtype)


def latent_sum(latents: SparseLatents) -> Tensor:
    """[d_sae]: the sum of the values of each latent over all tokens: the gradient of an encoder bias."""
    return run_sum(latents.values.reshape(-1).index_select(0, latents.transpose.order), latents.transpose)
