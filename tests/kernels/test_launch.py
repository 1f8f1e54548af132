import subprocess
import sys

import pytest
import torch

from saeql.kernels import launch
from saeql.kernels.launch import backend, choose_backend, guard


def test_choice_goes_argument_then_block_then_device() -> None:
    x = torch.zeros(1)
    assert choose_backend(x) == "torch"
    with backend("reference"):
        assert choose_backend(x) == "reference"
        assert choose_backend(x, "torch") == "torch"
        with backend("torch"):
            assert choose_backend(x) == "torch"
        assert choose_backend(x) == "reference"
    assert choose_backend(x) == "torch"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'tritn'"), backend("tritn"):
        pass
    with pytest.raises(ValueError, match="'fast'"):
        choose_backend(torch.zeros(1), "fast")


def test_triton_on_cpu_tensors_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors|not installed"):
        choose_backend(torch.zeros(1), "triton")


def test_guard_names_the_argument_and_the_shapes() -> None:
    x, W = torch.zeros(5, 7), torch.zeros(9, 8)
    guard(x=(x, "N d_in"), bias=(None, "d_in"))
    with pytest.raises(ValueError, match=r"W_enc: expected shape \[d_sae, d_in\] with d_in = 7 as in x, got \[9, 8\]"):
        guard(x=(x, "N d_in"), W_enc=(W, "d_sae d_in"))
    with pytest.raises(ValueError, match=r"x: expected shape \[N\], got \[5, 7\]"):
        guard(x=(x, "N"))
    with pytest.raises(ValueError, match="W: is on meta, but x is on cpu"):
        guard(x=(x, "N d"), W=(torch.zeros(9, 7, device="meta"), "f d"))


def test_imports_and_runs_where_triton_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from saeql.kernels.autograd import sparse_decode, topk_encode
latents = topk_encode(torch.randn(3, 4), torch.randn(9, 4), torch.zeros(9), 2)
assert sparse_decode(latents, torch.randn(9, 4)).shape == (3, 4)
import saeql.kernels.fused_adam
try:
    topk_encode(torch.randn(3, 4), torch.randn(9, 4), torch.zeros(9), 2, backend="triton")
except ValueError as error:
    assert "not installed" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)
