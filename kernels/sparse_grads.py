"""The gradients of both weights of a dictionary as the sparse entries that make them, before anything is summed."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .fused_adam import block_rows
from .index_transpose import IndexTranspose, transpose_indices
from .latent_rows import SEGMENT, latent_row, segment_sums
from .launch import Backend, choose_backend, guard, launch, next_power_of_2, tl, triton
from .sparse_matmul import SparseLatents, embedding_sum, scatter_sum, scatter_sum_reference


class SparseGrad(NamedTuple):
    """One term of a loss, as it reaches both weights through the same kept latents.

    W_enc[f] gets the sum of grad_values * x over the tokens that keep f, W_dec[f] that of values * grad_out.
    """

    latents: SparseLatents
    grad_values: Tensor  # [N, k]
    x: Tensor  # [N, d_in]
    grad_out: Tensor  # [N, d_out]


class RowGrads(NamedTuple):
    """Gradients of some rows of both weights, summed already."""

    latents: Tensor  # [m], distinct, rising
    W_enc: Tensor  # [m, d_in]
    W_dec: Tensor  # [m, d_out]
    b_enc: Tensor  # [m]


class SortedEntries(NamedTuple):
    """The entries of all terms sorted by latent; `tokens` counts on through the terms."""

    transpose: IndexTranspose
    values: Tensor  # [entries]
    grad_values: Tensor  # [entries]
    x: Tensor  # [tokens, d_in]
    grad_out: Tensor  # [tokens, d_out]


@triton.jit
def square_norm_fwd_kernel(
    weights_ptr,  # [entries], sorted by latent
    tokens_ptr,  # [entries], sorted by latent
    offsets_ptr,  # [d_sae + 1]
    dense_ptr,  # [N, d]
    sums_ptr,  # [entries // SEGMENT, d] float32, see latent_rows
    rows_ptr,  # [m, d], summed already; read if HAS_ROWS
    row_at_ptr,  # [d_sae] int32: where a latent stands in them, or -1
    out_ptr,  # [d_sae] float32
    d,
    HAS_ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    g = latent_row(weights_ptr, tokens_ptr, offsets_ptr, dense_ptr, sums_ptr, f, cols, d, SEGMENT, BLOCK_T, BLOCK_D)
    g = tl.where(cols < d, g, 0.0)
    if HAS_ROWS:
        g += summed_row(rows_ptr, row_at_ptr, f, cols, d)
    tl.store(out_ptr + f, tl.sum(g * g, axis=0))


@triton.jit
def summed_row(rows_ptr, row_at_ptr, f, cols, d):
    """float32 [cols]: the row of latent f among the rows summed already, 0 where it has none."""
    at = tl.load(row_at_ptr + f).to(tl.int64)
    row = tl.where(cols < d, at, -1)
    return tl.load(rows_ptr + row * d + cols, mask=row >= 0, other=0.0).to(tl.float32)


class SparseGrads:
    """All terms of a loss. Raises ValueError where there is none, or they differ in their number of latents.

    `rows` adds what has been summed already, for some latents. The indices of the terms and `rows.latents` count in the
    full dictionary.
    """

    def __init__(self, terms: Sequence[SparseGrad], rows: RowGrads | None = None):
        if not terms:
            raise ValueError("terms: expected at least one SparseGrad, got none")
        self.terms, self.rows, self.d_sae = tuple(terms), rows, terms[0].latents.d_sae
        for term in terms:
            guard(
                x=(term.x, "N d_in"), grad_out=(term.grad_out, "N d_out"), grad_values=(term.grad_values, "N k"),
                values=(term.latents.values, "N k"), indices=(term.latents.indices, "N k"),
            )  # fmt: skip
            if term.latents.d_sae != self.d_sae:
                raise ValueError(f"latents: terms of d_sae = {self.d_sae} and {term.latents.d_sae} cannot be summed")
        if rows is not None:
            guard(
                rows=(rows.latents, "m"), x=(terms[0].x, "N d_in"), grad_out=(terms[0].grad_out, "N d_out"),
                W_enc=(rows.W_enc, "m d_in"), W_dec=(rows.W_dec, "m d_out"), b_enc=(rows.b_enc, "m"),
            )  # fmt: skip

    @cached_property
    def entries(self) -> SortedEntries:
        """All terms in one, computed at the first use."""
        first = self.terms[0]
        if len(self.terms) == 1:
            order = first.latents.transpose.order
            values, grads = (t.reshape(-1).index_select(0, order) for t in (first.latents.values, first.grad_values))
            return SortedEntries(
                first.latents.transpose, values, grads, first.x.contiguous(), first.grad_out.contiguous()
            )
        flat = torch.cat([t.latents.indices.reshape(-1) for t in self.terms])
        merged = transpose_indices(flat[:, None], self.d_sae)
        tokens, count = [], 0
        for term in self.terms:
            n, k = term.grad_values.shape
            tokens.append(torch.arange(count, count + n, dtype=torch.int32, device=flat.device).repeat_interleave(k))
            count += n
        order = merged.order
        return SortedEntries(
            merged._replace(tokens=torch.cat(tokens)[order]),
            torch.cat([t.latents.values.reshape(-1) for t in self.terms])[order],
            torch.cat([t.grad_values.reshape(-1) for t in self.terms])[order],
            torch.cat([t.x for t in self.terms]),
            torch.cat([t.grad_out for t in self.terms]),
        )

    @cached_property
    def row_at(self) -> Tensor:
        """int32 [d_sae]: where each latent stands in `rows`, -1 where it does not."""
        assert self.rows is not None
        m, device = self.rows.latents.shape[0], self.rows.latents.device
        at = torch.full((self.d_sae,), -1, dtype=torch.int32, device=device)
        at[self.rows.latents] = torch.arange(m, dtype=torch.int32, device=device)
        return at

    def scaled(self, factor: Tensor | float) -> "SparseGrads":
        """The gradients times a factor."""
        terms = [t._replace(grad_values=t.grad_values * factor, grad_out=t.grad_out * factor) for t in self.terms]
        rows = self.rows
        if rows is not None:
            rows = RowGrads(rows.latents, rows.W_enc * factor, rows.W_dec * factor, rows.b_enc * factor)
        return SparseGrads(terms, rows)

    def b_enc(self) -> Tensor:
        """[d_sae]: the gradient of the encoder's bias."""
        entries = self.entries
        wide = entries.grad_values.float() if entries.grad_values.dtype == torch.bfloat16 else entries.grad_values
        offsets = entries.transpose.offsets.long()
        sums = torch.segment_reduce(wide, "sum", offsets=offsets, unsafe=True, initial=0.0)
        if self.rows is not None:
            sums[self.rows.latents] += self.rows.b_enc.to(sums.dtype)
        return sums.to(entries.grad_values.dtype)

    def dense(self, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
        """[d_sae, d_in] and [d_sae, d_out]: both gradients in memory."""
        first = self.terms[0]
        if choose_backend(first.x, backend) == "reference":
            enc = [scatter_sum_reference(t.latents.with_values(t.grad_values), t.x) for t in self.terms]
            dec = [scatter_sum_reference(t.latents, t.grad_out) for t in self.terms]
        else:
            enc = [scatter_sum(t.latents.with_values(t.grad_values), t.x, backend=backend) for t in self.terms]
            dec = [scatter_sum(t.latents, t.grad_out, backend=backend) for t in self.terms]
        for grads, row in ((enc, "W_enc"), (dec, "W_dec")):
            for more in grads[1:]:
                grads[0] += more
            if self.rows is not None:
                grads[0].index_add_(0, self.rows.latents, getattr(self.rows, row).to(grads[0].dtype))
        return enc[0], dec[0]

    def blocks(self, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The float32 gradients of both weights `rows` latents at a time: (which latents, of W_enc, of W_dec)."""
        entries = self.entries
        tokens, offsets = entries.transpose.tokens, entries.transpose.offsets
        bounds = [*offsets[::rows].tolist(), tokens.shape[0]]
        summed = None if self.rows is None else self.rows.latents.tolist()
        for i, start in enumerate(range(0, self.d_sae, rows)):
            own = slice(bounds[i], bounds[i + 1])
            at = slice(start, min(start + rows, self.d_sae))
            bags = offsets[start : start + rows + 1] - bounds[i]
            grads = [
                embedding_sum(dense, tokens[own], bags, scale[own]).float()
                for scale, dense in ((entries.grad_values, entries.x), (entries.values, entries.grad_out))
            ]
            if summed is not None and self.rows is not None:
                inside = slice(bisect_left(summed, at.start), bisect_left(summed, at.stop))
                local = self.rows.latents[inside] - start
                grads[0].index_add_(0, local, self.rows.W_enc[inside].float())
                grads[1].index_add_(0, local, self.rows.W_dec[inside].float())
            yield at, grads[0], grads[1]

    @torch.no_grad()
    def square_norm(self, *, backend: Backend | None = None) -> Tensor:
        """The sum of squares of both gradients, a float32 scalar; they are never in memory as a whole."""
        first = self.terms[0]
        name = choose_backend(first.x, backend)
        if name == "reference":
            return torch.stack([grad.double().square().sum() for grad in self.dense(backend=name)]).sum().float()
        if name == "triton":
            entries, rows = self.entries, self.rows
            return _triton_square_norm(entries.grad_values, entries.x, rows and rows.W_enc, self) + _triton_square_norm(
                entries.values, entries.grad_out, rows and rows.W_dec, self
            )
        total = torch.zeros((), dtype=torch.float64, device=first.x.device)
        for _, *pair in self.blocks(block_rows(max(first.x.shape[1], first.grad_out.shape[1]), first.x.device)):
            for grad in pair:
                total += torch.linalg.vector_norm(grad).double().square()
        return total.float()


def summed_rows(grads: SparseGrads, rows: Tensor | None, dense: Tensor) -> tuple[Tensor, Tensor]:
    """The two arguments of a kernel for what is summed already; without it, tensors that are never read."""
    return (dense, grads.entries.transpose.offsets) if rows is None else (rows.contiguous(), grads.row_at)


def _triton_square_norm(weights: Tensor, dense: Tensor, rows: Tensor | None, grads: SparseGrads) -> Tensor:
    transpose, d = grads.entries.transpose, dense.shape[1]
    out = torch.empty(grads.d_sae, dtype=torch.float32, device=dense.device)
    launch(
        square_norm_fwd_kernel, (grads.d_sae,),
        weights, transpose.tokens, transpose.offsets, dense, segment_sums(weights, transpose, dense),
        *summed_rows(grads, rows, dense), out, d,
        HAS_ROWS=rows is not None, SEGMENT=SEGMENT, BLOCK_T=4, BLOCK_D=next_power_of_2(d), num_warps=4,
    )  # fmt: skip
    return out.sum()
