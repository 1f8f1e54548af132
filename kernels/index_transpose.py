"""The transpose of the indices of kept latents: entries sorted by latent, then by token.

The Triton backend sorts by digits of 8 bits, the lowest first, each pass a counting sort: a histogram of every block of
entries, a scan over digits and blocks, and a stable scatter. 65536 latents take two passes. It uses no atomics, so that
every run gives the same order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Backend, choose_backend, guard, launch, tl, triton

BLOCK = 1024
DIGIT_BITS = 8


class IndexTranspose(NamedTuple):
    """The entries of [N, k] indices in the order of their latent, then of their token.

    Entry `order[e]` (flat, in row-major [N, k]) belongs to token `tokens[e]`; latent f owns the entries from
    `offsets[f]` up to `offsets[f + 1]`.
    """

    order: Tensor  # [N * k] int64
    tokens: Tensor  # [N * k] int32
    offsets: Tensor  # [d_sae + 1] int32


def transpose_indices_reference(indices: Tensor, d_sae: int) -> IndexTranspose:
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=d_sae)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return IndexTranspose(order, (order // max(1, indices.shape[1])).int(), offsets.int())


@triton.jit
def digit_count_fwd_kernel(
    keys_ptr,  # [entries]
    counts_ptr,  # [DIGITS, num_blocks]
    upto_ptr,  # [DIGITS, num_blocks]: in the block, the entries of this digit and all lower ones
    entries,
    num_blocks,
    SHIFT: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    e = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + e, mask=e < entries, other=0).to(tl.int32)
    count = tl.histogram((key >> SHIFT) & (DIGITS - 1), DIGITS, mask=e < entries)
    at = tl.arange(0, DIGITS) * num_blocks + block
    tl.store(counts_ptr + at, count)
    tl.store(upto_ptr + at, tl.cumsum(count, 0))


@triton.jit
def digit_scatter_fwd_kernel(
    keys_ptr,  # [entries]
    order_ptr,  # [entries], of the pass before; read unless FIRST
    base_ptr,  # [DIGITS, num_blocks]: where a digit's entries of a block go, less their place in the sorted block
    keys_out_ptr,  # [entries] int32
    order_out_ptr,  # [entries]
    tokens_ptr,  # [entries] int32, written if LAST
    entries,
    num_blocks,
    k,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    here = tl.arange(0, BLOCK)
    e = block * BLOCK + here
    key = tl.load(keys_ptr + e, mask=e < entries, other=0).to(tl.int32)
    digit = tl.where(e < entries, (key >> SHIFT) & (DIGITS - 1), DIGITS)
    # With its place below the digit every number is another one: any sort is stable.
    packed = tl.sort(digit * BLOCK + here)
    digit = packed // BLOCK
    e = block * BLOCK + packed % BLOCK  # pyright: ignore[reportOperatorIssue]
    mask = digit < DIGITS
    to = tl.load(base_ptr + digit * num_blocks + block, mask=mask, other=0) + here
    key = tl.load(keys_ptr + e, mask=mask, other=0).to(tl.int32)
    order = e
    if not FIRST:
        order = tl.load(order_ptr + e, mask=mask, other=0)
    tl.store(keys_out_ptr + to, key, mask=mask)
    tl.store(order_out_ptr + to, order.to(order_out_ptr.dtype.element_ty), mask=mask)
    if LAST:
        tl.store(tokens_ptr + to, order // k, mask=mask)


def _triton_sort(flat: Tensor, k: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted keys int32, order int64, tokens int32."""
    entries, device = flat.shape[0], flat.device
    if entries >= 2**31 - BLOCK:
        raise ValueError(f"indices: at most 2^31 - {BLOCK} entries can be transposed, got {entries}")
    num_blocks, digits = -(-entries // BLOCK), 2**DIGIT_BITS
    passes = max(1, -(-(d_sae - 1).bit_length() // DIGIT_BITS))
    counts, upto = (torch.empty(digits, num_blocks, dtype=torch.int32, device=device) for _ in range(2))
    tokens = torch.empty(entries, dtype=torch.int32, device=device)
    keys = order = flat
    for i in range(passes):
        meta = {"SHIFT": i * DIGIT_BITS, "DIGITS": digits, "BLOCK": BLOCK, "num_warps": 4}
        launch(digit_count_fwd_kernel, (num_blocks,), keys, counts, upto, entries, num_blocks, **meta)
        base = counts.view(-1).cumsum(0, dtype=torch.int32).view_as(upto).sub_(upto)
        first, last = i == 0, i == passes - 1
        sorted_keys = torch.empty(entries, dtype=torch.int32, device=device)
        sorted_order = torch.empty(entries, dtype=torch.int64 if last else torch.int32, device=device)
        launch(
            digit_scatter_fwd_kernel, (num_blocks,),
            keys, order, base, sorted_keys, sorted_order, tokens, entries, num_blocks, k,
            FIRST=first, LAST=last, **meta,
        )  # fmt: skip
        keys, order = sorted_keys, sorted_order
    return keys, order, tokens


def _torch_sort(flat: Tensor, k: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    # PyTorch sorts 16- and 32-bit keys by radix, much faster than 64-bit ones.
    keys, order = flat.to(torch.int16 if d_sae <= 2**15 else torch.int32).sort(stable=True)
    return keys.int(), order, (order // k).int()


def transpose_indices(indices: Tensor, d_sae: int, *, backend: Backend | None = None) -> IndexTranspose:
    """Sort the entries of `indices` [N, k], all below d_sae, by latent. Stable, hence deterministic."""
    guard(indices=(indices, "N k"))
    name = choose_backend(indices, backend)
    if name == "reference":
        return transpose_indices_reference(indices, d_sae)
    sort = _triton_sort if name == "triton" else _torch_sort
    keys, order, tokens = sort(indices.reshape(-1), max(1, indices.shape[1]), d_sae)
    bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=keys.device)
    return IndexTranspose(order, tokens, torch.searchsorted(keys, bounds, out_int32=True))
