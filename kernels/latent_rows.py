"""The row of a weight's gradient that belongs to one latent: a weighted sum of dense rows over the latent's entries.

The sorted entries are cut into segments of a fixed length. Segments that lie inside one latent are summed first, each
by a program of its own; the program of a latent then adds its whole segments and what is left at both ends. So no
program sums more than two segments and one row a segment, however often a latent fires, and the order is fixed.
"""

import torch
from torch import Tensor

from .index_transpose import IndexTranspose
from .launch import launch, next_power_of_2, tl, triton

SEGMENT = 256


@triton.jit
def add_entries(acc, weights_ptr, tokens_ptr, dense_ptr, first, last, cols, d, BLOCK_T: tl.constexpr):
    """`acc` plus weight * dense[token] of the entries from `first` up to `last`."""
    for start in range(first, last, BLOCK_T):
        e = start + tl.arange(0, BLOCK_T)
        v = tl.load(weights_ptr + e, mask=e < last, other=0.0).to(tl.float32)
        rows = tl.load(tokens_ptr + e, mask=e < last, other=0).to(tl.int64)
        # Entries that are off read nothing.
        mask = (v != 0.0)[:, None] & (cols < d)[None, :]
        x = tl.load(dense_ptr + rows[:, None] * d + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(v[:, None] * x, axis=0)
    return acc


@triton.jit
def segment_sum_fwd_kernel(
    weights_ptr,  # [entries], sorted by latent
    tokens_ptr,  # [entries], sorted by latent
    offsets_ptr,  # [d_sae + 1]
    latents_ptr,  # [segments]: the latent of the first entry of each
    dense_ptr,  # [N, d]
    sums_ptr,  # [segments, d] float32, written where a segment is of one latent
    d,
    SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(0) * SEGMENT
    last = first + SEGMENT
    if tl.load(offsets_ptr + tl.load(latents_ptr + segment) + 1) >= last:
        acc = tl.zeros([BLOCK_D], tl.float32)
        acc = add_entries(acc, weights_ptr, tokens_ptr, dense_ptr, first, last, cols, d, BLOCK_T)
        tl.store(sums_ptr + segment * d + cols, acc, mask=cols < d)


@triton.jit
def latent_row(
    weights_ptr, tokens_ptr, offsets_ptr, dense_ptr, sums_ptr, f, cols, d,
    SEGMENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_D]: columns `cols` of the sum over the entries of latent `f`; arguments as in the kernel above."""
    first = tl.load(offsets_ptr + f)
    last = tl.load(offsets_ptr + f + 1)
    whole_first = (first + SEGMENT - 1) // SEGMENT
    whole_last = last // SEGMENT
    split = whole_last > whole_first
    acc = tl.zeros([BLOCK_D], tl.float32)
    head_last = tl.where(split, whole_first * SEGMENT, last)
    acc = add_entries(acc, weights_ptr, tokens_ptr, dense_ptr, first, head_last, cols, d, BLOCK_T)
    row_ptr = sums_ptr + whole_first.to(tl.int64) * d + cols
    for _ in range(whole_first, whole_last):
        acc += tl.load(row_ptr, mask=cols < d, other=0.0)
        row_ptr += d
    tail_first = tl.where(split, whole_last * SEGMENT, last)
    return add_entries(acc, weights_ptr, tokens_ptr, dense_ptr, tail_first, last, cols, d, BLOCK_T)


def segment_sums(weights: Tensor, transpose: IndexTranspose, dense: Tensor) -> Tensor:
    """float32 [entries // SEGMENT, d], for `latent_row`; segments of more than one latent are left as they are."""
    segments, d = weights.shape[0] // SEGMENT, dense.shape[1]
    starts = torch.arange(0, segments * SEGMENT, SEGMENT, dtype=torch.int32, device=dense.device)
    latents = torch.searchsorted(transpose.offsets[1:].contiguous(), starts, right=True, out_int32=True)
    sums = torch.empty(segments, d, dtype=torch.float32, device=dense.device)
    block = min(512, next_power_of_2(d))
    launch(
        segment_sum_fwd_kernel, (segments, -(-d // block)),
        weights, transpose.tokens, transpose.offsets, latents, dense, sums, d,
        SEGMENT=SEGMENT, BLOCK_T=8, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return sums
