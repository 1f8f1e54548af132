import pytest
import torch
from kernel_checks import assert_near, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saeql.kernels.jumprelu import (
    jumprelu,
    jumprelu_grads_reference,
    jumprelu_reference,
    step_l0,
    step_l0_grads_reference,
    step_l0_reference,
)
from saeql.kernels.launch import Backend

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize(("n", "d_sae"), [(7, 63), (3, 1000), (70, 5), (1, 1)], ids=str)
STE = pytest.mark.parametrize("ste_to_input", [False, True], ids=["plain", "ste_to_input"])
BANDWIDTH = 0.5


def make(n: int, d_sae: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Multiples of 1/8: many elements are on a threshold or on an edge of the rectangle. The last row is below all."""
    pre = (randn(n, d_sae, seed=0) * 8).round() / 8
    pre[-1] = -100.0 if n > 1 else 1.0
    threshold = ((0.5 + 0.3 * randn(d_sae, seed=1)) * 8).round() / 8
    leaves = pre.to(device, dtype), threshold.to(device)
    return leaves[0].requires_grad_(), leaves[1].requires_grad_()


@DTYPES
@SHAPES
@STE
def test_jumprelu(
    n: int,
    d_sae: int,
    ste_to_input: bool,
    dtype: torch.dtype,
    backend: Backend,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("saeql.kernels.jumprelu.CPU_BLOCK_BYTES", 2 * 4 * d_sae)  # several chunks, the last one short
    pre, threshold = make(n, d_sae, dtype, device)
    grad = randn(n, d_sae, seed=2, dtype=dtype, device=device)
    z = jumprelu(pre, threshold, BANDWIDTH, ste_to_input=ste_to_input, backend=backend)
    z.backward(grad)
    wide = [t.detach().double() for t in (pre, threshold, grad)]
    expected = jumprelu_grads_reference(wide[0], wide[1], wide[2], BANDWIDTH, ste_to_input)
    assert z.dtype == dtype
    assert_near(z, jumprelu_reference(wide[0], wide[1]))
    assert_near(pre.grad, expected[0])
    assert_near(threshold.grad, expected[1])


@DTYPES
@SHAPES
@STE
def test_step_l0(
    n: int,
    d_sae: int,
    ste_to_input: bool,
    dtype: torch.dtype,
    backend: Backend,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("saeql.kernels.jumprelu.CPU_BLOCK_BYTES", 2 * 4 * d_sae)
    pre, threshold = make(n, d_sae, dtype, device)
    grad = randn(n, seed=2, device=device)
    l0 = step_l0(pre, threshold, BANDWIDTH, ste_to_input=ste_to_input, backend=backend)
    l0.backward(grad)
    wide = [t.detach().double() for t in (pre, threshold, grad)]
    expected = step_l0_grads_reference(wide[0], wide[1], wide[2], BANDWIDTH, ste_to_input)
    assert l0.dtype == torch.float32
    assert torch.equal(l0.double(), step_l0_reference(wide[0], wide[1]))
    assert_near(threshold.grad, expected[1])
    if ste_to_input:
        assert_near(pre.grad, expected[0])
    else:
        assert pre.grad is None or not pre.grad.any()


def test_the_formulas_by_hand(backend: Backend, device: str) -> None:
    pre = torch.tensor([[0.4, 0.9], [0.6, 1.5]], device=device, requires_grad=True)
    threshold = torch.tensor([0.5, 1.0], device=device, requires_grad=True)
    z = jumprelu(pre, threshold, 0.4, backend=backend)
    assert_near(z, torch.tensor([[0.0, 0.0], [0.6, 1.5]], device=device))
    z.sum().backward()
    assert_near(pre.grad, torch.tensor([[0.0, 0.0], [1.0, 1.0]], device=device))
    assert_near(threshold.grad, torch.tensor([-2 * 0.5 / 0.4, -1.0 / 0.4], device=device))
    threshold.grad = None
    l0 = step_l0(pre, threshold, 0.4, backend=backend)
    assert l0.tolist() == [0.0, 2.0]
    l0.sum().backward()
    assert_near(threshold.grad, torch.tensor([-2 / 0.4, -1 / 0.4], device=device))


def test_gradient_of_the_threshold_is_that_of_a_smoothed_loss() -> None:
    """Averaged over pre-activations of a flat density, the pseudo-derivative is the derivative of the mean."""
    pre = torch.linspace(0, 2, 200_001, dtype=torch.float64)[:, None]
    threshold = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    jumprelu(pre, threshold, 0.1).mean().backward()
    assert threshold.grad is not None
    assert abs(float(threshold.grad) - (-0.8 / 2)) < 1e-3  # d/dt of the integral of x/2 from t to 2


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_float64_and_what_is_not_asked_for(name: Backend) -> None:
    pre, threshold = make(5, 9, torch.float64, "cpu")
    jumprelu(pre.detach(), threshold.double(), BANDWIDTH, backend=name).sum().backward()
    assert threshold.grad is not None and pre.grad is None
    both = jumprelu(pre, threshold.double(), BANDWIDTH, backend=name).sum() + step_l0(pre, threshold, BANDWIDTH).sum()
    both.backward()
    assert pre.grad is not None and pre.grad.dtype == torch.float64


def test_non_contiguous_arguments(backend: Backend, device: str) -> None:
    pre, threshold = randn(9, 6, seed=0, device=device).T, randn(18, seed=1, device=device)[::2].requires_grad_()
    grad = randn(9, 6, seed=2, device=device).T
    (jumprelu(pre, threshold, BANDWIDTH, backend=backend) * grad).sum().backward()
    expected = jumprelu_grads_reference(pre, threshold.detach(), grad, BANDWIDTH, False)[1]
    (got,) = torch.autograd.grad((jumprelu(pre, threshold, BANDWIDTH, backend=backend) * grad).sum(), threshold)
    assert_near(got, expected)


class LargestTensor(TorchDispatchMode):
    """Counts the outputs as large as [N, d_sae] that ops return with memory of their own."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.storages = elements, set[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() // out.element_size() >= self.elements:
            self.storages.add(out.untyped_storage().data_ptr())
        return out


def test_nothing_of_size_n_d_sae_but_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeql.kernels.jumprelu.CPU_BLOCK_BYTES", 2**12)
    pre, threshold = make(64, 512, torch.float32, "cpu")
    pre, grad = pre.detach(), torch.ones(64, 512)
    with LargestTensor(64 * 512 // 2) as large:
        z = jumprelu(pre, threshold, BANDWIDTH)
        l0 = step_l0(pre, threshold, BANDWIDTH)
    assert large.storages <= {z.data_ptr(), pre.data_ptr()}
    with LargestTensor(64 * 512 // 2) as large:
        torch.autograd.grad(l0.sum(), threshold)
        torch.autograd.grad(z, threshold, grad)
    assert large.storages <= {grad.data_ptr(), pre.data_ptr()}


def test_no_tokens_at_all() -> None:
    threshold = torch.ones(4, requires_grad=True)
    (jumprelu(torch.zeros(0, 4), threshold, 0.1).sum() + step_l0(torch.zeros(0, 4), threshold, 0.1).sum()).backward()
    assert threshold.grad is not None and not threshold.grad.any()


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"threshold: expected shape \[d_sae\] with d_sae = 5 as in pre, got \[4\]"):
        jumprelu(torch.zeros(2, 5), torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match=r"bandwidth: must be above 0, got 0"):
        step_l0(torch.zeros(2, 5), torch.zeros(5), 0.0)
