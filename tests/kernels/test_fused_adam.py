import pytest
import torch
from kernel_checks import assert_near, randn
from torch import Tensor

from saeql.kernels.fused_adam import AdamStep, Moments, adam_rows, adam_rows_reference
from saeql.kernels.launch import Backend

FLAGS = pytest.mark.parametrize(("project", "renormalize"), [(False, False), (True, True)], ids=["plain", "unit"])


def moments_of(weight: Tensor, seed: int) -> Moments:
    """Not zero, so that their decay shows."""
    first, second = (0.01 * randn(*weight.shape, seed=seed + i, device=weight.device) for i in range(2))
    return Moments(first, second.square())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@FLAGS
def test_adam_rows(project: bool, renormalize: bool, dtype: torch.dtype, backend: Backend, device: str) -> None:
    weight, grad = (randn(9, 63, seed=i, dtype=dtype, device=device) for i in range(2))
    moments, adam = moments_of(weight, 5), AdamStep(step=3, lr=0.1)
    expected, m64 = weight.double(), Moments(*(m.double() for m in moments))
    adam_rows_reference(expected, grad.double(), m64, adam, project=project, renormalize=renormalize)
    before = grad.clone()
    adam_rows(weight, grad, moments, adam, project=project, renormalize=renormalize, backend=backend)
    assert_near(weight, expected)
    assert_near(moments.first, m64.first)
    assert_near(moments.second, m64.second)
    assert torch.equal(grad, before)


@FLAGS
def test_adam_rows_with_bf16_moments(project: bool, renormalize: bool, backend: Backend, device: str) -> None:
    weight, grad = (randn(9, 63, seed=i, device=device) for i in range(2))
    moments, adam = Moments(*(m.bfloat16() for m in moments_of(weight, 5))), AdamStep(step=3, lr=0.1)
    expected, m64 = weight.double(), Moments(*(m.double() for m in moments))
    adam_rows_reference(expected, grad.double(), m64, adam, project=project, renormalize=renormalize)
    adam_rows(weight, grad, moments, adam, project=project, renormalize=renormalize, backend=backend)
    assert_near(weight, expected)  # by the moments before they are rounded
    assert moments.first.dtype == moments.second.dtype == torch.bfloat16
    assert_near(moments.first, m64.first)
    assert_near(moments.second, m64.second)


def test_adam_rows_is_torch_adam_over_many_steps(backend: Backend, device: str) -> None:
    ours = randn(7, 20, seed=0, device=device)
    theirs = ours.clone().requires_grad_()
    optimizer, moments = torch.optim.Adam([theirs], lr=0.05), Moments.like(ours)
    for step in range(1, 6):
        theirs.grad = randn(7, 20, seed=step, device=device)
        adam_rows(ours, theirs.grad, moments, AdamStep(step, lr=0.05), backend=backend)
        optimizer.step()
    assert_near(ours, theirs)


def test_adam_rows_on_a_bias(backend: Backend, device: str) -> None:
    bias, grad = (randn(63, seed=i, device=device) for i in range(2))
    expected, moments = bias.clone(), Moments.like(bias)
    adam_rows_reference(expected, grad, Moments.like(bias), AdamStep(1, lr=0.1))
    adam_rows(bias, grad, moments, AdamStep(1, lr=0.1), backend=backend)
    assert_near(bias, expected)


def test_projected_gradient_is_orthogonal_and_rows_stay_unit(backend: Backend, device: str) -> None:
    weight = torch.nn.functional.normalize(randn(6, 40, seed=0, device=device), dim=1)
    before, moments = weight.clone(), Moments.like(weight)
    adam = AdamStep(1, lr=0.01)
    adam_rows(weight, 3 * before + randn(6, 40, seed=1, device=device), moments, adam, project=True, renormalize=True,
              backend=backend)  # fmt: skip
    assert_near((moments.first * before).sum(1), torch.zeros(6, device=device))
    assert_near(weight.norm(dim=1), torch.ones(6, device=device))


def test_rows_of_zeros_stay_finite(backend: Backend, device: str) -> None:
    weight, grad = torch.zeros(3, 16, device=device), torch.zeros(3, 16, device=device)
    adam_rows(weight, grad, Moments.like(weight), AdamStep(1, lr=0.1), project=True, renormalize=True, backend=backend)
    assert torch.equal(weight, torch.zeros_like(weight))


def test_arguments_that_do_not_fit_are_named() -> None:
    W, adam = torch.zeros(5, 4), AdamStep(1, lr=0.1)
    with pytest.raises(ValueError, match=r"grad: expected shape \[5, 4\]"):
        adam_rows(W, torch.zeros(5, 3), Moments.like(W), adam)
    with pytest.raises(ValueError, match="weight: weight and moments"):
        adam_rows(W, W, Moments.like(W.T.contiguous()), adam)
    with pytest.raises(ValueError, match=r"project and renormalize need shape \[rows, d\]"):
        adam_rows(W[0], W[0], Moments.like(W[0]), adam, project=True)
    with pytest.raises(ValueError, match="step: counts from 1"):
        AdamStep(0, lr=0.1)
