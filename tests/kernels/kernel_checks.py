"""How near to a float64 reference each dtype has to come: (relative, absolute)."""

from typing import Any

import torch
from torch import Tensor

TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-4, 1e-5),  # sums of up to 1000 products, in another order
    torch.bfloat16: (2e-2, 2e-2),  # 8 bits of mantissa, inputs of order 1
}


def assert_near(actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype | None = None) -> None:
    assert actual is not None and expected is not None
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    atol *= max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype=dtype, **kwargs
    )
