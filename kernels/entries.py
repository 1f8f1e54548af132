"""Some elements of an [N, d_sae] matrix, as many in a row as there happen to be: the latents that a threshold leaves.

Row-major and without padding (compressed rows), since the rows of a ReLU dictionary differ much in how many latents are
active. All of it is sums over runs of entries: rows of the matrix for a decode, columns of it, by the transpose, for
the gradient of a weight. Few entries cost less than dense matmuls, many cost more: `above` measures and chooses.
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .index_transpose import IndexTranspose, transpose_indices
from .launch import Backend, choose_backend, guard, launch, next_power_of_2, tl, triton
from .sparse_matmul import run_sum, segmented_sum

#: Share of all elements up to which entries cost less than dense matmuls. On a CPU an entry costs 0.7 us at d = 576 in
#: decode and gradients, as much as 14 elements of the dense matmuls. On CUDA by arithmetic: memory against float32.
SPARSE_SHARE = {"cpu": 0.07, "cuda": 0.01}


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of N rows in row-major order: entry e is element (rows[e], indices[e]) with the value values[e]."""

    values: Tensor  # [E]
    rows: Tensor  # [E] int64, rising
    indices: Tensor  # [E] int64, below d_sae
    num_rows: int
    d_sae: int
    cache: dict[str, Any] = field(default_factory=dict, repr=False)  # shared by copies with other values

    @property
    def offsets(self) -> Tensor:
        """[N + 1] int64: row n owns the entries from offsets[n] up to offsets[n + 1]."""
        if "offsets" not in self.cache:
            bounds = torch.arange(self.num_rows + 1, device=self.rows.device)
            self.cache["offsets"] = torch.searchsorted(self.rows, bounds)
        return self.cache["offsets"]

    @property
    def transpose(self) -> IndexTranspose:
        """The entries sorted by latent; its tokens are rows."""
        if "transpose" not in self.cache:
            found = transpose_indices(self.indices[:, None], self.d_sae)
            self.cache["transpose"] = found._replace(tokens=self.rows[found.order].int())
        return self.cache["transpose"]

    def with_values(self, values: Tensor) -> "Entries":
        """The same entries with other values [E]."""
        guard(values=(values, "E"), indices=(self.indices, "E"))
        return Entries(values, self.rows, self.indices, self.num_rows, self.d_sae, self.cache)

    def where(self, mask: Tensor) -> "Entries":
        """The entries that `mask` [E] keeps."""
        return Entries(self.values[mask], self.rows[mask], self.indices[mask], self.num_rows, self.d_sae)

    def take(self, weights: Tensor) -> Tensor:
        """[E]: of every entry, that of its latent in `weights` [d_sae]; differentiable."""
        return _Take.apply(weights, self)

    def decode(self, values: Tensor, W_dec: Tensor, bias: Tensor | None = None) -> Tensor:
        """[N, d_out]: the sum of values * W_dec[indices] of every row, plus bias; differentiable in all three.

        Unlike `sparse_decode` it gives entries of value 0 their gradient too.
        """
        guard(values=(values, "E"), indices=(self.indices, "E"), W_dec=(W_dec, "d_sae d_out"), bias=(bias, "d_out"))
        return _EntryDecode.apply(values, W_dec, bias, self)

    def to_dense(self) -> Tensor:
        """[N, d_sae]. For tests and small inputs."""
        dense = self.values.new_zeros(self.num_rows, self.d_sae)
        return dense.index_put((self.rows, self.indices), self.values)


@dataclass(frozen=True, eq=False)
class DenseEntries:
    """All elements of an [N, d_sae] matrix behind the interface of `Entries`; `values` is 0 where nothing is kept."""

    values: Tensor  # [N, d_sae]

    def take(self, weights: Tensor) -> Tensor:
        """[d_sae], which broadcasts."""
        return weights

    def decode(self, values: Tensor, W_dec: Tensor, bias: Tensor | None = None) -> Tensor:
        """[N, d_out] of values [N, d_sae]; differentiable in all three."""
        return values @ W_dec if bias is None else torch.addmm(bias, values, W_dec)


AnyEntries: TypeAlias = Entries | DenseEntries


@triton.jit
def entry_dot_fwd_kernel(
    dense_ptr,  # [N, d]
    W_ptr,  # [d_sae, d]
    rows_ptr,  # [entries]
    indices_ptr,  # [entries]
    out_ptr,  # [entries]
    entries,
    d,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = tl.load(rows_ptr + e, mask=e < entries, other=0).to(tl.int64)
    latents = tl.load(indices_ptr + e, mask=e < entries, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = (e < entries)[:, None] & (cols < d)[None, :]
        x = tl.load(dense_ptr + rows[:, None] * d + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(W_ptr + latents[:, None] * d + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += x * w
    tl.store(out_ptr + e, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=e < entries)


def entry_dot(entries: Entries, dense: Tensor, W: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[E]: of every entry, dense[row] . W[index], for dense [N, d] and W [d_sae, d]."""
    guard(dense=(dense, "N d"), W=(W, "d_sae d"))
    name = choose_backend(W, backend)
    if name == "reference":
        return (dense @ W.T)[entries.rows, entries.indices]
    dense, W = dense.contiguous(), W.contiguous()
    if name == "torch":
        at = entries.indices, entries.offsets[:-1], entries.rows
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(dense, W, *at, 0)
    num, d = entries.rows.shape[0], W.shape[1]
    out = torch.empty(num, dtype=dense.dtype, device=dense.device)
    launch(
        entry_dot_fwd_kernel, (-(-num // 16),), dense, W, entries.rows, entries.indices, out, num, d,
        BLOCK_E=16, BLOCK_D=min(256, next_power_of_2(d)), num_warps=4,
    )  # fmt: skip
    return out


def entry_gather(entries: Entries, W: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[N, d]: the sum of value * W[index] over the entries of every row."""
    if choose_backend(W, backend) == "reference":
        return entries.to_dense() @ W
    # By rows as by latents: a run of entries picks rows of a table. The order of entries is the one they have.
    runs = IndexTranspose(entries.indices, entries.indices, entries.offsets)
    return segmented_sum(entries.values, runs, W.contiguous(), backend=backend)


def entry_scatter(entries: Entries, dense: Tensor, *, backend: Backend | None = None) -> Tensor:
    """[d_sae, d]: the sum of value * dense[row] over the entries of every latent; entries of value 0 cost little."""
    if choose_backend(dense, backend) == "reference":
        return entries.to_dense().T @ dense
    runs = entries.transpose
    return segmented_sum(entries.values.index_select(0, runs.order), runs, dense.contiguous(), backend=backend)


def entry_sum(entries: Entries) -> Tensor:
    """[d_sae]: the sum of the values of every latent."""
    return run_sum(entries.values.index_select(0, entries.transpose.order), entries.transpose)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return weights[entries.indices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return entry_sum(ctx.entries.with_values(grad_outputs[0])), None


class _EntryDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, bias: Tensor | None, entries: Entries) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.entries = entries
        out = entry_gather(entries.with_values(values), W_dec)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, entries = grad_outputs[0], ctx.entries
        values, W_dec = ctx.saved_tensors
        need_values, need_W, need_bias = ctx.needs_input_grad[:3]
        return (
            entry_dot(entries, grad, W_dec) if need_values else None,
            entry_scatter(entries.with_values(values), grad) if need_W else None,
            grad.sum(0) if need_bias else None,
            None,
        )


class _Encode(torch.autograd.Function):
    """The values that the encoder gave, with their gradient; the gradient of b_dec is taken through that of b_enc."""

    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, centred: Tensor, found: AnyEntries, on: bool
    ) -> Tensor:
        values = found.values.detach()
        ctx.save_for_backward(W_enc, centred, *((values,) if isinstance(found, DenseEntries) and on else ()))
        ctx.entries = found if isinstance(found, Entries) else None
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad_outputs[0]
        W_enc, centred, *values = ctx.saved_tensors
        if ctx.entries is not None:
            entries = ctx.entries.with_values(grad)
            weight, bias = entry_scatter(entries, centred), entry_sum(entries)
        else:
            grad = torch.ops.aten.threshold_backward(grad, values[0], 0) if values else grad
            weight, bias = grad.t() @ centred, grad.sum(0)
        b_dec = -(bias @ W_enc) if ctx.needs_input_grad[2] else None
        return weight, bias, b_dec, None, None, None


def above(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    limit: Tensor | float,
    *,
    b_dec: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    whole: bool = False,
) -> AnyEntries:
    """What of (x - b_dec) @ W_enc.T + b_enc exceeds `limit` ([d_sae] or a number), differentiable but for x.

    x [N, d_in], W_enc [d_sae, d_in], b_enc [d_sae], b_dec [d_in] or None. Entries where they are few (`SPARSE_SHARE`),
    else the dense matrix, in which whatever does not exceed a limit of 0 is 0; with `whole` the dense matrix holds
    everything, whatever the limit. `matmul_dtype` is the precision in which entries are *found*: their values, and a
    dense matrix, are computed in that of x. Raises ValueError for shapes that do not fit.
    """
    guard(x=(x, "N d_in"), W_enc=(W_enc, "d_sae d_in"), b_enc=(b_enc, "d_sae"), b_dec=(b_dec, "d_in"))
    with torch.no_grad():
        centred = x if b_dec is None else x - b_dec
        found = _find(centred, W_enc, b_enc, limit, matmul_dtype, whole)
    values = _Encode.apply(W_enc, b_enc, b_dec, centred, found, not whole)
    return found.with_values(values) if isinstance(found, Entries) else DenseEntries(values)


def _find(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, limit: Tensor | float, dtype: torch.dtype | None, whole: bool
) -> AnyEntries:
    narrow = dtype is not None and dtype != x.dtype
    inputs = tuple(t.to(dtype) for t in (b_enc, x, W_enc)) if narrow else (b_enc, x, W_enc)
    pre = torch.addmm(inputs[0], inputs[1], inputs[2].t())
    mask = pre > limit
    if int(mask.count_nonzero()) > SPARSE_SHARE.get(x.device.type, 0.0) * mask.numel():
        pre = torch.addmm(b_enc, x, W_enc.t()) if narrow else pre
        return DenseEntries(pre if whole else pre.clamp_min_(0))
    at = mask.view(-1).nonzero()[:, 0]
    d_sae = W_enc.shape[0]
    rows = at.div(d_sae, rounding_mode="floor")
    entries = Entries(pre.view(-1)[at], rows, at - rows * d_sae, x.shape[0], d_sae)
    if not narrow:
        return entries
    exact = entry_dot(entries, x, W_enc).add_(b_enc[entries.indices])
    own = limit[entries.indices] if isinstance(limit, Tensor) else limit
    return entries.with_values(exact).where(exact > own)
