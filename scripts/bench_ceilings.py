"""What the device can do at best, measured, and the least time that a training step needs by those rates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_clock import Clock
from bench_shapes import Shape

from saeql.kernels.launch import fast_matmul_dtype

SQUARE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
ROUNDS = {"cpu": 5, "cuda": 20}


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let float32 products on a card round their factors to 10 bits, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def precisions(device: str) -> dict[str, torch.dtype]:
    """Names of the matmul precisions of a device, and what their factors are stored in."""
    fast = fast_matmul_dtype(device)
    found = {"float32": torch.float32}
    if device == "cuda":
        found["tfloat32"] = torch.float32
    return found | ({"bfloat16": fast} if fast else {})


def encoder_gemm(shape: Shape, precision: str) -> Callable[[], Any]:
    """The encoder's matmul alone, `addmm` into memory that is there already."""
    dtype = precisions(shape.device)[precision]
    x, weight = (torch.randn(n, shape.d_in, device=shape.device).to(dtype) for n in (shape.rows, shape.d_sae))
    bias = torch.zeros(shape.d_sae, device=shape.device, dtype=dtype)
    out = torch.empty(shape.rows, shape.d_sae, device=shape.device, dtype=dtype)

    def run() -> None:
        with tf32(precision == "tfloat32"):
            torch.addmm(bias, x, weight.t(), out=out)

    return run


@dataclass
class Ceilings:
    """Best rates seen: TFLOP/s by precision, for a big square product and the encoder's; GB/s read plus written."""

    copy: float
    square: dict[str, float]
    encoder: dict[str, float] = field(default_factory=dict)

    def matmul(self, precision: str) -> float:
        """TFLOP/s, the better of both."""
        return max(self.square[precision], self.encoder.get(precision, 0.0))

    def as_json(self) -> dict[str, Any]:
        matmul = {"square": _rounded(self.square), "encoder": _rounded(self.encoder)}
        return {"matmul_tflops": matmul, "copy_gigabytes_per_second": round(self.copy, 1)}


def _rounded(rates: dict[str, float]) -> dict[str, float]:
    return {name: round(rate, 4) for name, rate in rates.items()}


def measure_ceilings(clock: Clock) -> Ceilings:
    """Copy and square products of this device."""
    device = clock.device
    n, rounds = SQUARE[device], ROUNDS[device]
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    copy = 2 * source.numel() / min(clock.many(lambda: target.copy_(source), rounds)) / 1e9
    square = {}
    for name in precisions(device):
        product = encoder_gemm(Shape(n, n, n, 1, 0.0, device), name)
        square[name] = 2 * n**3 / min(clock.many(product, rounds)) / 1e12
    return Ceilings(copy, square)


def measure_encoder(shape: Shape, clock: Clock, ceilings: Ceilings) -> dict[str, float]:
    """Median milliseconds of the encoder's matmul by precision; its best rates go into `ceilings`."""
    found = {}
    for name in precisions(shape.device):
        times = sorted(clock.many(encoder_gemm(shape, name), ROUNDS[shape.device]))
        ceilings.encoder[name] = 2 * shape.rows * shape.d_in * shape.d_sae / times[0] / 1e12
        found[name] = times[len(times) // 2] * 1e3
    return found


def floor(shape: Shape, itemsize: int, tflops: float, copy: float) -> dict[str, float]:
    """Milliseconds that a sparse step cannot do without, by part; auxiliary losses come on top.

    `gemm`  the encoder's product at `tflops`; everything else at `copy` GB/s:
    `pre`   pre-activations in `itemsize` bytes, written once and read once;
    `rows`  a row of d_in gathered for each kept latent of each token, four times: decode, value gradients, the
            gradients of both weights;
    `adam`  both weights and their moments in float32, read and written, gradients never in memory; copies of both
            weights where the encoder's product has another precision.
    """
    n, d, d_sae = shape.rows, shape.d_in, shape.d_sae
    moved = {
        "pre": 2 * n * d_sae * itemsize,
        "rows": 4 * n * shape.k * d * itemsize,
        "adam": 2 * d_sae * d * (24 + (itemsize if itemsize < 4 else 0)),
    }
    parts = {"gemm": 2 * n * d * d_sae / tflops / 1e9, **{name: size / copy / 1e6 for name, size in moved.items()}}
    return {"milliseconds": sum(parts.values()), **parts}
