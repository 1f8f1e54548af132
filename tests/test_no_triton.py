"""Where triton has no wheel everything still imports, and the CPU path trains."""

import subprocess
import sys

CODE = """
import sys
sys.modules["triton"] = sys.modules["triton.language"] = None  # what a missing package looks like to `import`
import torch
from saeql.kernels import launch
from saeql.kernels.autograd import sparse_decode, topk_encode
import saeql.pipelines.run
assert not launch.HAS_TRITON
x, W = torch.randn(5, 8), torch.randn(20, 8, requires_grad=True)
sparse_decode(topk_encode(x, W, torch.zeros(20), 3), W).sum().backward()
assert W.grad is not None and W.grad.abs().sum() > 0
try:
    topk_encode(x, W, torch.zeros(20), 3, backend="triton")
except ValueError as error:
    print(error)
"""


def test_everything_but_the_triton_backend_works_without_triton():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "'triton' is not installed" in result.stdout
