"""The gradients of both weights of a dictionary as the sparse entries that make them, before anything is summed."""

from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .fused_adam import block_rows
from .index_transpose import IndexTranspose
from .latent_rows import SEGMENT, latent_row, segment_sums
from .launch import Backend, choose_backend, guard, launch, next_power_of_2, tl, triton
from .sparse_matmul import SparseLatents, embedding_sum, run_sum, scatter_sum

#: Which of W_enc and W_dec are asked for.
Wanted: TypeAlias = tuple[bool, bool]
BOTH: Wanted = (True, True)


class SparseGrad(NamedTuple):
    """A loss as it reaches both weights through the same kept latents.

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
    """The entries of a term sorted by latent."""

    transpose: IndexTranspose
    values: Tensor  # [entries]
    grad_values: Tensor  # [entries]


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
    """The gradients of both weights: one term's entries, and `rows` that have been summed already, for some latents.

    The indices of the term and `rows.latents` count in the full dictionary. Raises ValueError where shapes do not fit.
    """

    def __init__(self, term: SparseGrad, rows: RowGrads | None = None):
        self.term, self.rows, self.d_sae = term, rows, term.latents.d_sae
        guard(
            x=(term.x, "N d_in"), grad_out=(term.grad_out, "N d_out"), grad_values=(term.grad_values, "N k"),
            values=(term.latents.values, "N k"), indices=(term.latents.indices, "N k"),
        )  # fmt: skip
        if rows is not None:
            guard(
                rows=(rows.latents, "m"), x=(term.x, "N d_in"), grad_out=(term.grad_out, "N d_out"),
                W_enc=(rows.W_enc, "m d_in"), W_dec=(rows.W_dec, "m d_out"), b_enc=(rows.b_enc, "m"),
            )  # fmt: skip

    @cached_property
    def entries(self) -> SortedEntries:
        """Computed at the first use."""
        transpose, tensors = self.term.latents.transpose, (self.term.latents.values, self.term.grad_values)
        return SortedEntries(transpose, *(t.reshape(-1).index_select(0, transpose.order) for t in tensors))

    @property
    def sums(self) -> tuple[tuple[Tensor, Tensor, Tensor | None], ...]:
        """Of W_enc and of W_dec: factors of the sorted entries, the rows [N, d] they pick, what is summed already."""
        entries, term, rows = self.entries, self.term, self.rows
        return (
            (entries.grad_values, term.x.contiguous(), rows and rows.W_enc),
            (entries.values, term.grad_out.contiguous(), rows and rows.W_dec),
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
        term, rows = self.term, self.rows
        if rows is not None:
            rows = RowGrads(rows.latents, rows.W_enc * factor, rows.W_dec * factor, rows.b_enc * factor)
        term = term._replace(grad_values=term.grad_values * factor, grad_out=term.grad_out * factor)
        return SparseGrads(term, rows)

    def b_enc(self) -> Tensor:
        """[d_sae]: the gradient of the encoder's bias."""
        sums = run_sum(self.entries.grad_values, self.entries.transpose)
        if self.rows is not None:
            sums.index_add_(0, self.rows.latents, self.rows.b_enc.to(sums.dtype))
        return sums

    def dense(self, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
        """[d_sae, d_in] and [d_sae, d_out]: both gradients in memory."""
        term, rows = self.term, self.rows
        W_enc = scatter_sum(term.latents.with_values(term.grad_values), term.x, backend=backend)
        W_dec = scatter_sum(term.latents, term.grad_out, backend=backend)
        if rows is not None:
            W_enc.index_add_(0, rows.latents, rows.W_enc.to(W_enc.dtype))
            W_dec.index_add_(0, rows.latents, rows.W_dec.to(W_dec.dtype))
        return W_enc, W_dec

    def blocks(self, rows: int, wanted: Wanted = BOTH) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
        """The float32 gradients of both weights `rows` latents at a time: (which latents, of W_enc, of W_dec).

        None stands for the gradient of a weight that is not `wanted`.
        """
        transpose, sums = self.entries.transpose, self.sums
        bounds = [*transpose.offsets[::rows].tolist(), transpose.tokens.shape[0]]
        summed = None if self.rows is None else self.rows.latents.tolist()
        for i, start in enumerate(range(0, self.d_sae, rows)):
            own = slice(bounds[i], bounds[i + 1])
            at = slice(start, min(start + rows, self.d_sae))
            bags = transpose.offsets[start : start + rows + 1] - bounds[i]
            grads: list[Tensor | None] = []
            for (factors, dense, more), is_wanted in zip(sums, wanted, strict=True):
                if not is_wanted:
                    grads.append(None)
                    continue
                grad = embedding_sum(dense, transpose.tokens[own], bags, factors[own]).float()
                if summed is not None and self.rows is not None and more is not None:
                    inside = slice(bisect_left(summed, at.start), bisect_left(summed, at.stop))
                    grad.index_add_(0, self.rows.latents[inside] - start, more[inside].float())
                grads.append(grad)
            yield at, grads[0], grads[1]

    @torch.no_grad()
    def square_norm(self, wanted: Wanted = BOTH, *, backend: Backend | None = None) -> Tensor:
        """The sum of squares of the `wanted` gradients, a float32 scalar; they are never in memory as a whole."""
        x, grad_out = self.term.x, self.term.grad_out
        name = choose_backend(x, backend)
        if name == "reference":
            grads = compress(self.dense(backend=name), wanted)
            return torch.stack([grad.double().square().sum() for grad in grads]).sum().float()
        if name == "triton":
            return torch.stack([_triton_square_norm(self, *parts) for parts in compress(self.sums, wanted)]).sum()
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for _, *pair in self.blocks(block_rows(max(x.shape[1], grad_out.shape[1]), x.device), wanted):
            for grad in pair:
                if grad is not None:
                    total += torch.linalg.vector_norm(grad).double().square()
        return total.float()


def summed_row_arguments(
    grads: SparseGrads, factors: Tensor, dense: Tensor, rows: Tensor | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What every kernel takes that makes a latent's row of a gradient, one of `grads.sums`: arguments and constants."""
    transpose = grads.entries.transpose
    # without rows, tensors that are never read
    summed = (dense, transpose.offsets) if rows is None else (rows.contiguous(), grads.row_at)
    sums = segment_sums(factors, transpose, dense)
    arguments = (factors, transpose.tokens, transpose.offsets, dense, sums, *summed)
    return arguments, {"HAS_ROWS": rows is not None, "SEGMENT": SEGMENT, "BLOCK_T": 4}


def _triton_square_norm(grads: SparseGrads, factors: Tensor, dense: Tensor, rows: Tensor | None) -> Tensor:
    arguments, constants = summed_row_arguments(grads, factors, dense, rows)
    d = dense.shape[1]
    out = torch.empty(grads.d_sae, dtype=torch.float32, device=dense.device)
    launch(
        square_norm_fwd_kernel, (grads.d_sae,), *arguments, out, d,
        **constants, BLOCK_D=next_power_of_2(d), num_warps=4,
    )  # fmt: skip
    return out.sum()
