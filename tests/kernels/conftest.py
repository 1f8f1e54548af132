"""Kernel tests run the Triton backend in its interpreter wherever no GPU is present."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

sys.path.insert(0, str(Path(__file__).parent))  # for kernel_checks
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))  # for the benchmark's checks

from saeql.kernels.launch import HAS_TRITON, INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_TRITON = HAS_TRITON and (DEVICE == "cuda" or INTERPRETED)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.skipif(not RUNS_TRITON, reason="no triton"))])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory from `torch.empty` starts as NaN (integers: as a number out of range), so that unwritten outputs show."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = empty(*args, **kwargs)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return out.fill_(float("nan") if out.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
