"""Every kernel as the benchmarks run it: its inputs, its call, what a float64 reference expects, and what it must move.

The formulas count bytes (or floating-point operations) with N rows, d = d_in, F = d_sae, k, and s bytes an element:
every operand once, and one row of d for each gathered entry. A cache that serves a row twice does better than that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from bench_shapes import Shape, make_rows
from torch import Tensor

from saeql.kernels.autograd import latent_sum
from saeql.kernels.batch_topk import encode_batch_topk, encode_threshold
from saeql.kernels.entries import Entries, entry_dot
from saeql.kernels.fused_adam import AdamStep, Moments, adam_rows, adam_rows_reference
from saeql.kernels.index_transpose import transpose_indices, transpose_indices_reference
from saeql.kernels.jumprelu import (
    jumprelu,
    jumprelu_grads_reference,
    jumprelu_reference,
    step_l0,
    step_l0_grads_reference,
    step_l0_reference,
)
from saeql.kernels.sparse_adam import sparse_adam
from saeql.kernels.sparse_grads import RowGrads, SparseGrad, SparseGrads
from saeql.kernels.sparse_matmul import (
    SparseLatents,
    gather_sum,
    gather_sum_reference,
    sampled_dot,
    sampled_dot_reference,
    scatter_sum,
    scatter_sum_reference,
)
from saeql.kernels.topk import encode_topk, keep_largest, row_topk

ENCODE_BYTES = "(N*d + F*d + F + 2*N*F)*s + N*k*(s + 8)"  # pre-activations written once and read once
ENCODE_FLOPS = "2*N*d*F"
#: A power of two, and small against the thresholds: the edges of the step are then exact in float32.
BANDWIDTH = 2.0**-4
ADAM = AdamStep(step=3, lr=1e-2)
#: Largest difference, as a share of the largest expected magnitude: sums of thousands of products, in another order.
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 1e-2}


class Pair(NamedTuple):
    """An output of a kernel beside what it should be; equal within `tolerance` times the largest expected magnitude."""

    output: str
    actual: Tensor
    expected: Tensor
    tolerance: float


@dataclass(frozen=True)
class Case:
    """One kernel at one shape in one dtype. Runs on whatever `kernels.launch.backend` says."""

    name: str
    bytes: str
    call: Callable[..., Any]
    compare: Callable[[Any], list[Pair]]
    inputs: Callable[[], tuple[Any, ...]] = tuple  # made anew for each use, since some kernels write in place
    flops: str = "0"


class Workload:
    """Inputs of all kernels at one shape, float32 or bfloat16, with latents that a random dictionary really keeps."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.shape, self.dtype, self.tolerance = shape, dtype, TOLERANCES[dtype]
        self._generator = torch.Generator(shape.device).manual_seed(1)
        self.x = make_rows(1, shape)[0].to(dtype)
        self.W = torch.nn.functional.normalize(self.randn(shape.d_sae, shape.d_in).float(), dim=1).to(dtype)
        self.b = 0.1 * self.randn(shape.d_sae)
        values, indices = self.pre.topk(shape.k)
        # Found without a kernel of ours, so that one that is wrong does not spoil the inputs of the others.
        known = transpose_indices_reference(indices, shape.d_sae)
        self.latents = SparseLatents(values.relu(), indices, shape.d_sae, [known])
        self.grad_out = self.randn(shape.rows, shape.d_in)
        self.grad_values = self.randn(shape.rows, shape.k)

    def randn(self, *size: int) -> Tensor:
        made = torch.randn(*size, generator=self._generator, device=self.shape.device)
        return made.to(self.dtype)

    def count(self, formula: str) -> int:
        """The value of a formula in N, d, F, k and s."""
        shape = self.shape
        names = {"N": shape.rows, "d": shape.d_in, "F": shape.d_sae, "k": shape.k, "s": self.dtype.itemsize}
        return int(eval(formula, {"__builtins__": {}}, names))

    @cached_property
    def pre(self) -> Tensor:
        return torch.addmm(self.b, self.x, self.W.t())

    @cached_property
    def pre64(self) -> Tensor:
        return torch.addmm(self.b.double(), self.x.double(), self.W.double().t())

    @cached_property
    def threshold(self) -> Tensor:
        """[d_sae], from 1 to 2: above most pre-activations."""
        return 1 + torch.rand(self.shape.d_sae, generator=self._generator, device=self.shape.device)

    @cached_property
    def weights(self) -> tuple[Tensor, Moments]:
        """Float32, as a trainer keeps them; moments not near 0, so that their decay shows and no update is huge."""
        first, second = (0.01 * self.randn(*self.W.shape).float() for _ in range(2))
        return self.W.float(), Moments(first, second.square() + 1e-4)

    def pair(self, output: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> Pair:
        return Pair(output, actual, expected, self.tolerance if tolerance is None else tolerance)


def _encoders(w: Workload) -> list[Case]:
    k = w.shape.k

    def values(latents: SparseLatents) -> Pair:
        return w.pair("values", latents.values, w.pre64.gather(1, latents.indices).relu() * (latents.values > 0))

    def topk(latents: SparseLatents) -> list[Pair]:
        best = w.pre64.topk(k).values.relu()
        return [values(latents), w.pair("largest", latents.values.sort(1, descending=True).values, best)]

    def choice(latents: SparseLatents) -> list[Pair]:
        """Other latents than the best may be chosen, but hardly worse ones."""
        best = w.pre64.topk(k).values.relu().sum()
        return [values(latents), w.pair("sum", latents.values.double().sum(), best, TOLERANCES[torch.bfloat16])]

    def batch(outcome: tuple[SparseLatents, Tensor]) -> list[Pair]:
        latents, smallest = outcome
        best = w.pre64.relu().flatten().topk(w.shape.rows * k).values
        kept = latents.values.flatten()
        kept = torch.cat([kept, kept.new_zeros(max(0, len(best) - len(kept)))]).sort(descending=True).values
        return [
            values(latents),
            w.pair("largest", kept[: len(best)], best),
            w.pair("others", kept[len(best) :], torch.zeros_like(kept[len(best) :]), 0.0),
            w.pair("smallest", smallest, best[best > 0].amin()),
        ]

    limit = float(w.latents.values.amin(1).mean())

    def above(latents: SparseLatents) -> list[Pair]:
        """Elements next to the threshold may fall on either side of it."""
        clear = (w.pre64 - limit).abs() > w.tolerance * w.pre64.abs().amax()
        return [w.pair("kept", latents.to_dense() * clear, w.pre64 * (w.pre64 > limit) * clear)]

    def rows(outcome: tuple[Tensor, Tensor]) -> list[Pair]:
        best = w.pre.double().topk(k).values
        found = w.pre.gather(1, outcome[1])
        return [
            w.pair("values", outcome[0], found.double(), 0.0),
            w.pair("largest", outcome[0].sort(1, descending=True).values, best, 0.0),
        ]

    def kept(outcome: Tensor) -> list[Pair]:
        """Where they stand, and as many; which of equal ones is open."""
        best = w.pre.double().topk(many).values.sum(1)
        return [
            w.pair("sums", outcome.double().sum(1), best),
            w.pair("elements", outcome, w.pre * (outcome != 0), 0.0),
        ]

    plain, many = (w.x, w.W, w.b), min(288, w.shape.d_sae // 2)
    found = [
        Case("encode_topk", ENCODE_BYTES, lambda: encode_topk(*plain, k), topk, flops=ENCODE_FLOPS),
        Case("row_topk", "N*F*s + N*k*(s + 8)", lambda: row_topk(w.pre, k), rows),
        Case(f"keep_largest, {many}", "2*N*F*s", lambda: keep_largest(w.pre, many), kept),
        Case("encode_batch_topk", ENCODE_BYTES, lambda: encode_batch_topk(*plain, k), batch, flops=ENCODE_FLOPS),
        Case("encode_threshold", ENCODE_BYTES, lambda: encode_threshold(*plain, limit), above, flops=ENCODE_FLOPS),
    ]
    if w.dtype == torch.float32:
        # x and W converted, the product in 2 bytes, the values of the chosen latents in 4 bytes again.
        size = "8*(N*d + F*d) + 4*N*F + 4*N*k*d + 20*N*k"
        fast = torch.bfloat16
        found.append(
            Case(
                "encode_topk, bfloat16 choice",
                size,
                lambda: encode_topk(*plain, k, matmul_dtype=fast),
                choice,
                flops=ENCODE_FLOPS,
            )
        )
    return found


def _products(w: Workload) -> list[Case]:
    latents = w.latents
    wide = latents.with_values(latents.values.double())
    rows = torch.arange(w.shape.rows, device=w.W.device).repeat_interleave(w.shape.k)
    entries = Entries(latents.values.flatten(), rows, latents.indices.flatten(), w.shape.rows, w.shape.d_sae)

    def transposed(actual: Any) -> list[Pair]:
        expected = transpose_indices_reference(latents.indices, w.shape.d_sae)
        return [
            w.pair(name, getattr(actual, name), getattr(expected, name), 0.0) for name in ("order", "tokens", "offsets")
        ]

    def gathered(actual: Tensor) -> list[Pair]:
        bias = w.grad_out[0].double()
        return [w.pair("out", actual, gather_sum_reference(wide.values, latents.indices, w.W.double(), bias))]

    def dots(actual: Tensor) -> list[Pair]:
        return [w.pair("out", actual, sampled_dot_reference(w.grad_out.double(), w.W.double(), latents.indices))]

    return [
        Case(
            "gather_sum",
            "N*k*(d*s + s + 8) + N*d*s + d*s",
            lambda: gather_sum(latents.values, latents.indices, w.W, w.grad_out[0]),
            gathered,
        ),
        Case(
            "sampled_dot",
            "N*k*(d*s + s + 8) + N*d*s",
            lambda: sampled_dot(w.grad_out, w.W, latents.indices),
            dots,
        ),
        Case(
            "entry_dot",
            "N*k*(2*d*s + s + 16)",
            lambda: entry_dot(entries, w.grad_out, w.W),
            lambda actual: dots(actual.view(w.shape.rows, w.shape.k)),
        ),
        Case(
            "transpose_indices",
            "N*k*(8 + 8 + 4) + 4*F",
            lambda: transpose_indices(latents.indices, w.shape.d_sae),
            transposed,
        ),
        Case(
            "scatter_sum",
            "N*k*(d*s + 3*s + 12) + F*d*s + 4*F",
            lambda: scatter_sum(latents, w.grad_out),
            lambda actual: [w.pair("out", actual, scatter_sum_reference(wide, w.grad_out.double()))],
        ),
        Case(
            "latent_sum",
            "N*k*(3*s + 8) + F*(s + 4)",
            lambda: latent_sum(latents),
            lambda actual: [w.pair("out", actual, wide.to_dense().sum(0))],
        ),
    ]


def _optimizers(w: Workload) -> list[Case]:
    copied = w.dtype != torch.float32
    grad = w.randn(*w.W.shape)

    def rows_inputs(dtype: torch.dtype | None = None) -> tuple[Tensor, Moments]:
        weight, moments = w.weights
        return weight.to(dtype or weight.dtype, copy=True), Moments(
            *(m.to(dtype or m.dtype, copy=True) for m in moments)
        )

    def rows_call(weight: Tensor, moments: Moments) -> tuple[Tensor, ...]:
        adam_rows(weight, grad, moments, ADAM, project=True, renormalize=True)
        return weight, *moments

    def rows_compare(actual: tuple[Tensor, ...]) -> list[Pair]:
        weight, moments = rows_inputs(torch.float64)
        adam_rows_reference(weight, grad.double(), moments, ADAM, project=True, renormalize=True)
        names = ("weight", "first moment", "second moment")
        return [
            w.pair(*parts, TOLERANCES[torch.float32]) for parts in zip(names, actual, (weight, *moments), strict=True)
        ]

    def both_inputs(dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        enc, dec = rows_inputs(dtype), rows_inputs(dtype)
        copies = tuple(torch.zeros_like(w.W) for _ in range(2)) if copied else (None, None)
        return *enc, *dec, copies

    def both_call(W_enc: Tensor, enc: Moments, W_dec: Tensor, dec: Moments, copies: Any) -> tuple[Any, ...]:
        sparse_adam(both_grads(), W_enc, enc, W_dec, dec, ADAM, copies=copies)
        return W_enc, *enc, W_dec, *dec, copies

    def both_compare(actual: tuple[Any, ...]) -> list[Pair]:
        W_enc, enc, W_dec, dec, _ = both_inputs(torch.float64)
        wide = w.latents.with_values(w.latents.values.double())
        term = SparseGrad(wide, w.grad_values.double(), w.x.double(), w.grad_out.double())
        exact = RowGrads(summed.latents, *(part.double() for part in summed[1:]))
        sparse_adam(SparseGrads(term, exact), W_enc, enc, W_dec, dec, ADAM, backend="reference")
        names = [f"{weight} {part}".strip() for weight in ("W_enc", "W_dec") for part in ("", "first", "second")]
        expected = (W_enc, *enc, W_dec, *dec)
        # The PyTorch path sums a row of a gradient in the dtype of its terms.
        found = [w.pair(*parts) for parts in zip(names, actual[:-1], expected, strict=True)]
        copies = zip(("W_enc copy", "W_dec copy"), actual[-1], (W_enc, W_dec), strict=True)
        return found + [w.pair(*parts) for parts in copies if parts[1] is not None]

    summed_at = torch.arange(0, w.shape.d_sae - 1, 16, device=w.W.device)
    summed = RowGrads(summed_at, grad[summed_at], grad[summed_at + 1], grad[summed_at, 0])

    def both_grads() -> SparseGrads:
        return SparseGrads(SparseGrad(w.latents, w.grad_values, w.x, w.grad_out), summed)

    def norm_compare(actual: Tensor) -> list[Pair]:
        expected = torch.stack([grad.double().square().sum() for grad in both_grads().dense(backend="reference")]).sum()
        return [w.pair("sum of squares", actual, expected)]

    copy_bytes = " + 4*F*d" if copied else ""
    return [
        Case("adam_rows", "F*d*(24 + s)", rows_call, rows_compare, rows_inputs),
        Case(
            "sparse_adam",
            f"48*F*d{copy_bytes} + N*k*(2*d*s + 6*s + 24) + 8*F + F*d*s//8",
            both_call,
            both_compare,
            both_inputs,
        ),
        Case(
            "square_norm",
            "N*k*(2*d*s + 6*s + 24) + 8*F + F*d*s//8",
            lambda: both_grads().square_norm(),
            norm_compare,
        ),
    ]


def _jumprelus(w: Workload) -> list[Case]:
    def backward(function: Callable[..., Tensor], grad_of: Tensor, need_pre: bool) -> Callable[[], tuple[Any, ...]]:
        def inputs() -> tuple[Any, ...]:
            pre, threshold = w.pre.detach().requires_grad_(need_pre), w.threshold.detach().requires_grad_()
            return function(pre, threshold, BANDWIDTH), [pre, threshold] if need_pre else [threshold], grad_of

        return inputs

    def grad(out: Tensor, leaves: list[Tensor], grad_of: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad_of, retain_graph=True)

    grad_z, grad_l0 = w.randn(w.shape.rows, w.shape.d_sae), w.randn(w.shape.rows).float()
    wide = w.threshold.double()

    def gate_compare(actual: tuple[Tensor, ...]) -> list[Pair]:
        expected = jumprelu_grads_reference(w.pre.double(), wide, grad_z.double(), BANDWIDTH, False)
        return [w.pair(*parts) for parts in zip(("pre", "threshold"), actual, expected, strict=True)]

    def l0_compare(actual: tuple[Tensor, ...]) -> list[Pair]:
        expected = step_l0_grads_reference(w.pre.double(), wide, grad_l0.double(), BANDWIDTH, False)
        return [w.pair("threshold", actual[0], expected[1])]

    return [
        Case(
            "jumprelu forward",
            "2*N*F*s + 4*F",
            lambda: jumprelu(w.pre, w.threshold, BANDWIDTH),
            lambda z: [w.pair("z", z, jumprelu_reference(w.pre.double(), wide))],
        ),
        Case("jumprelu backward", "3*N*F*s + 8*F", grad, gate_compare, backward(jumprelu, grad_z, True)),
        Case(
            "step_l0 forward",
            "N*F*s + 4*F + 4*N",
            lambda: step_l0(w.pre, w.threshold, BANDWIDTH),
            lambda l0: [w.pair("l0", l0, step_l0_reference(w.pre.double(), wide), 0.0)],
        ),
        Case("step_l0 backward", "N*F*s + 8*F + 4*N", grad, l0_compare, backward(step_l0, grad_l0, False)),
    ]


def cases(w: Workload) -> list[Case]:
    """All kernels on one workload."""
    return [*_encoders(w), *_products(w), *_optimizers(w), *_jumprelus(w)]
