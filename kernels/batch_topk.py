"""Encoders that keep another number of latents in every row: the N * k largest of a batch, or all above a threshold.

Both are exact and hold one chunk of the [N, d_sae] pre-activations at a time. Rows are padded to the widest one:
padding has the value 0, so that it adds nothing anywhere, and an index that its row does not keep, another start in
every row, so that no latent collects the padding of all of them.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .launch import Backend, choose_backend, guard, launch, tl, triton
from .sparse_matmul import SparseLatents
from .topk import PreActs, check_k, encode_chunks, encode_tile, encoder_inputs, pre_chunks, tile_options, values_at

COMPACT_COLUMNS = 1024


#: The k-th largest of the values of all ranks together, 0 where they are fewer: `sae/comm.py` has one.
KthLargest: TypeAlias = Callable[[Tensor, int], Tensor]


class _Entries(NamedTuple):
    """What is kept, in the order of the rows."""

    rows: Tensor  # [entries] int64
    indices: Tensor  # [entries] int64
    values: Tensor  # [entries]


def encode_batch_topk_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """[N, d_sae]: dense, 0 where a pre-activation is not kept."""
    acts = (x @ W_enc.T + b_enc).relu()
    order = acts.reshape(-1).argsort(descending=True, stable=True)[: acts.shape[0] * k]
    return torch.zeros_like(acts).view(-1).scatter(0, order, acts.view(-1)[order]).view_as(acts)


def encode_threshold_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, limit: Tensor) -> Tensor:
    """[N, d_sae]: dense, 0 where a pre-activation is not kept."""
    pre = x @ W_enc.T + b_enc
    return pre * (pre > limit)


@triton.jit
def encode_count_fwd_kernel(
    x_ptr,  # [N, d]
    W_ptr,  # [d_sae, d]
    b_ptr,  # [d_sae]
    limit_ptr,  # [d_sae] float32
    pre_ptr,  # [N, d_sae]
    counts_ptr,  # [N, num_tiles]: in each tile of BLOCK_F columns, how many exceed their limit
    N,
    d_sae,
    d,
    num_tiles,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = encode_tile(x_ptr, W_ptr, b_ptr, n, f, N, d_sae, d, PRECISION, WIDEN, BLOCK_N, BLOCK_F, BLOCK_D)
    pre = acc.to(pre_ptr.dtype.element_ty)
    tl.store(pre_ptr + n[:, None] * d_sae + f[None, :], pre, mask=(n < N)[:, None] & (f < d_sae)[None, :])
    # Of the rounded values, as the compaction sees them.
    limit = tl.load(limit_ptr + f, mask=f < d_sae, other=float("inf"))
    count = tl.sum((pre.to(tl.float32) > limit[None, :]).to(tl.int32), axis=1)
    tl.store(counts_ptr + n * num_tiles + tl.program_id(1), count, mask=n < N)


@triton.jit
def compact_fwd_kernel(
    pre_ptr,  # [N, d_sae]
    limit_ptr,  # [d_sae] float32
    offsets_ptr,  # [N * num_tiles + 1]: the first entry of every tile
    rows_ptr,  # [entries]
    indices_ptr,  # [entries]
    values_ptr,  # [entries]
    d_sae,
    num_tiles,
    TILES: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES
    first = tl.load(offsets_ptr + n * num_tiles + tile)
    last = tl.load(offsets_ptr + n * num_tiles + tl.minimum(tile + TILES, num_tiles))
    if last > first:
        f = tile * BLOCK_F + tl.arange(0, TILES * BLOCK_F)
        pre = tl.load(pre_ptr + n * d_sae + f, mask=f < d_sae, other=0.0)
        limit = tl.load(limit_ptr + f, mask=f < d_sae, other=float("inf"))
        kept = pre.to(tl.float32) > limit
        at = first + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(rows_ptr + at, tl.zeros_like(f).to(tl.int64) + n, mask=kept)
        tl.store(indices_ptr + at, f.to(tl.int64), mask=kept)
        tl.store(values_ptr + at, pre, mask=kept)


def _triton_threshold_chunk(x: Tensor, W: Tensor, b: Tensor, limit: Tensor, pre: Tensor) -> _Entries:
    (n, d), d_sae = x.shape, W.shape[0]
    tile = tile_options(x.dtype)
    block = tile["BLOCK_F"]
    num_tiles = -(-d_sae // block)
    offsets = torch.zeros(n * num_tiles + 1, dtype=torch.int32, device=x.device)
    counts = offsets[1:]
    launch(
        encode_count_fwd_kernel, (-(-n // tile["BLOCK_N"]), num_tiles),
        x, W, b, limit, pre, counts, n, d_sae, d, num_tiles, **tile,
    )  # fmt: skip
    torch.cumsum(counts, 0, dtype=torch.int32, out=counts)
    total, tiles = int(offsets[-1]), max(1, COMPACT_COLUMNS // block)
    rows, indices = (torch.empty(total, dtype=torch.int64, device=x.device) for _ in range(2))
    values = torch.empty(total, dtype=pre.dtype, device=x.device)
    launch(
        compact_fwd_kernel, (n, -(-num_tiles // tiles)),
        pre, limit, offsets, rows, indices, values, d_sae, num_tiles,
        TILES=tiles, BLOCK_F=block, num_warps=4,
    )  # fmt: skip
    return _Entries(rows, indices, values)


def _torch_threshold_chunk(x: Tensor, W: Tensor, b: Tensor, limit: Tensor, pre: Tensor) -> _Entries:
    torch.addmm(b, x, W.T, out=pre)
    rows, indices = (pre > limit).nonzero(as_tuple=True)
    return _Entries(rows, indices, pre[rows, indices])


def _threshold_entries(x: Tensor, W: Tensor, b: Tensor, limit: Tensor, name: Backend) -> _Entries:
    parts: list[_Entries] = []
    start = 0
    for part, pre in pre_chunks(x, W.shape[0]):
        chunk = (_triton_threshold_chunk if name == "triton" else _torch_threshold_chunk)(part, W, b, limit, pre)
        parts.append(chunk._replace(rows=chunk.rows + start))
        start += part.shape[0]
    return _Entries(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _dense_entries(acts: Tensor) -> _Entries:
    rows, indices = (acts > 0).nonzero(as_tuple=True)
    return _Entries(rows, indices, acts[rows, indices])


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """Of a flat tensor, 0 where it has fewer elements."""
    return values.topk(k, sorted=False).values.amin() if 0 < k <= values.numel() else values.new_zeros(())


def _keep_largest(values: Tensor, k: int, kth_largest: KthLargest) -> Tensor:
    """Where the k largest positive elements of a flat tensor are; of those equal to the last one, the first."""
    bound = kth_largest(values, k)
    if kth_largest is not _kth_largest:  # some are elsewhere: of equal ones each rank keeps all
        return (values >= bound) & (values > 0)
    keep, equal = values > bound, (values == bound) & (values > 0)
    return keep | (equal & (equal.cumsum(0) <= k - keep.sum()))


def candidates_per_row(k: int, d_sae: int) -> int:
    """How many of each row are looked at first: rows that keep more than 4 times their share are encoded again."""
    return min(d_sae, max(2 * k, min(4 * k, 512)))


def _batch_entries(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    total: int,
    width: int,
    name: Backend,
    wanted: PreActs | None = None,
    kth_largest: KthLargest = _kth_largest,
) -> _Entries:
    """The `total` largest of the batch among the `width` largest of every row.

    The last of those kept is a lower bound of the threshold, so that a row may lack some only if all its candidates
    are above the bound, and whatever it lacks is above the bound as well.
    """
    n = x.shape[0]
    values, indices = encode_chunks(x, W, b, width, name, wanted)
    bound = kth_largest(values.view(-1), total)
    cut = (values.amin(1) > bound) if width < W.shape[0] else torch.zeros(n, dtype=torch.bool, device=x.device)
    again = cut.nonzero()[:, 0]
    rows = torch.arange(n, device=x.device).repeat_interleave(width)
    found = _Entries(rows, indices.view(-1), values.view(-1))
    if again.numel():
        more = _threshold_entries(x[again], W, b, _limit(bound, W), name)
        found.values[cut.repeat_interleave(width)] = 0
        found = _Entries(*map(torch.cat, zip(found, more._replace(rows=again[more.rows]), strict=True)))
    at = _keep_largest(found.values, total, kth_largest).nonzero()[:, 0]
    if again.numel():
        at = at[found.rows[at].int().sort(stable=True).indices]
    return _Entries(*(column[at] for column in found))


def _fill(indices: Tensor, counts: Tensor, d_sae: int) -> Tensor:
    """`indices` [N, width], from counts[n] on replaced by latents that row n does not have, in a circle over d_sae."""
    n, width = indices.shape
    slots = torch.arange(width, device=indices.device)
    starts = (torch.arange(n, device=indices.device) * width % d_sae)[:, None]
    steps = torch.where(slots < counts[:, None], (indices - starts) % d_sae, width).clamp_(max=width)
    free = torch.ones(n, width + 1, dtype=torch.bool, device=indices.device).scatter_(1, steps, False)[:, :width]
    # The free ones in order go behind the kept ones; those for which there is no room, into a last column.
    target = torch.where(free, counts[:, None] + free.cumsum(1) - 1, width).clamp_(max=width)
    padded = torch.nn.functional.pad(indices, (0, 1))
    return padded.scatter_(1, target, (starts + slots) % d_sae)[:, :width].contiguous()


def _pad(entries: _Entries, n: int, d_sae: int) -> tuple[Tensor, Tensor]:
    """Values and indices [N, width], the widest row setting the width (at least 1)."""
    device = entries.rows.device
    bounds = torch.searchsorted(entries.rows, torch.arange(n + 1, device=device))
    counts = bounds.diff()
    width = max(1, int(counts.max())) if n else 1
    slots = torch.arange(entries.rows.shape[0], device=device) - bounds[entries.rows]
    values, indices = entries.values.new_zeros(n, width), entries.indices.new_zeros(n, width)
    values[entries.rows, slots] = entries.values
    indices[entries.rows, slots] = entries.indices
    return values, _fill(indices, counts, d_sae)


def _limit(threshold: Tensor | float, W_enc: Tensor) -> Tensor:
    """[d_sae]: what a pre-activation has to exceed; never narrower than float32."""
    dtype = torch.promote_types(W_enc.dtype, torch.float32)
    limit = torch.as_tensor(threshold, dtype=dtype, device=W_enc.device).clamp_min(0)
    if limit.dim() > 1 or limit.numel() not in (1, W_enc.shape[0]):
        raise ValueError(f"threshold: expected a scalar or shape [{W_enc.shape[0]}], got {list(limit.shape)}")
    return limit.expand(W_enc.shape[0]).contiguous()


def smallest_kept(values: Tensor) -> Tensor:
    """The smallest value above 0, a scalar tensor; 0 where there is none."""
    if values.numel() == 0:
        return values.new_zeros(())
    smallest = torch.where(values > 0, values, torch.inf).amin()
    return torch.where(smallest.isinf(), 0, smallest)


@torch.no_grad()
def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    matmul_dtype: torch.dtype | None = None,
    W_cast: Tensor | None = None,
    wanted: PreActs | None = None,
    kth_largest: KthLargest | None = None,
    num_rows: int | None = None,
    backend: Backend | None = None,
) -> tuple[SparseLatents, Tensor]:
    """Keep the N * k largest positive elements of x @ W_enc.T + b_enc (Bussmann et al., arXiv 2412.06410). No gradient.

    Returns the latents, padded to the widest row, and the smallest value kept (0 where none is), whose running mean
    is the threshold of inference. x [N, d_in], W_enc [d_sae, d_in], b_enc [d_sae] of one dtype. `matmul_dtype` is the
    precision in which latents are *chosen*; it, `W_cast` and `wanted` are as in `encode_topk`. Of equal elements at
    the threshold as many are kept as make N * k; which ones is not specified. Where rows or latents of the batch are on
    other ranks, `num_rows` is the whole batch's N and `kth_largest` finds an element among all ranks. Raises ValueError
    for shapes or a k that do not fit.
    """
    guard(x=(x, "N d_in"), W_enc=(W_enc, "d_sae d_in"), b_enc=(b_enc, "d_sae"))
    if kth_largest is None:
        check_k(k, W_enc.shape[0], "d_sae")
    name = choose_backend(x, backend)
    dtype = matmul_dtype or x.dtype
    narrow = encoder_inputs(x, W_enc, b_enc, dtype, W_cast)
    if name == "reference":
        entries = _dense_entries(encode_batch_topk_reference(*narrow, k))
        if wanted is not None:
            wanted.take(narrow[0] @ narrow[1].T + narrow[2])
    else:
        width = candidates_per_row(k, W_enc.shape[0])
        total = (num_rows or x.shape[0]) * k
        entries = _batch_entries(*narrow, total, width, name, wanted, kth_largest or _kth_largest)
    values, indices = _pad(entries, x.shape[0], W_enc.shape[0])
    if dtype != x.dtype:
        values = values_at(x, W_enc, b_enc, indices, name) * (values > 0)
    return SparseLatents(values, indices, W_enc.shape[0]), smallest_kept(values)


@torch.no_grad()
def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor | float,
    *,
    matmul_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> SparseLatents:
    """Keep all of x @ W_enc.T + b_enc above 0 and the `threshold` [d_sae] (or scalar) of its latent. No gradient.

    How JumpReLU and BatchTopK dictionaries encode at inference. Padded to the widest row, so give it fewer rows at a
    time where some may keep very many. With `matmul_dtype` (see `encode_topk`) what is then found not to exceed its
    threshold in the dtype of x is 0. Raises ValueError for shapes that do not fit.
    """
    guard(x=(x, "N d_in"), W_enc=(W_enc, "d_sae d_in"), b_enc=(b_enc, "d_sae"))
    name = choose_backend(x, backend)
    dtype = matmul_dtype or x.dtype
    limit = _limit(threshold, W_enc)
    narrow = encoder_inputs(x, W_enc, b_enc, dtype, None)
    if name == "reference":
        entries = _dense_entries(encode_threshold_reference(*narrow, limit))
    else:
        entries = _threshold_entries(*narrow, limit, name)
    values, indices = _pad(entries, x.shape[0], W_enc.shape[0])
    if dtype != x.dtype:
        exact = values_at(x, W_enc, b_enc, indices, name)
        values = exact * ((values > 0) & (exact > limit[indices]))
    return SparseLatents(values, indices, W_enc.shape[0])
