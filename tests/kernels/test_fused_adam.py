import copy

import pytest
import torch
from kernel_checks import assert_near, randn
from torch import Tensor

from saeql.kernels.fused_adam import AdamStep, Moments, SparseGrad, adam_rows, adam_rows_reference, sparse_adam
from saeql.kernels.launch import Backend
from saeql.kernels.sparse_matmul import SparseLatents, scatter_sum

FLAGS = pytest.mark.parametrize(("project", "renormalize"), [(False, False), (True, True)], ids=["plain", "unit"])


def moments_of(weight: Tensor, seed: int) -> Moments:
    """Not zero, so that their decay shows."""
    first, second = (0.01 * randn(*weight.shape, seed=seed + i, device=weight.device) for i in range(2))
    return Moments(first, second.square())


def make_term(n: int, k: int, d_sae: int, d: int, device: str, seed: int, dtype: torch.dtype) -> SparseGrad:
    generator = torch.Generator().manual_seed(seed)
    indices = (torch.rand(n, d_sae, generator=generator) - torch.arange(d_sae) / d_sae).topk(k).indices.to(device)
    values = randn(n, k, seed=seed, dtype=dtype, device=device).relu()
    grad_values = randn(n, k, seed=seed + 1, dtype=dtype, device=device) * (values > 0)
    x, grad_out = (randn(n, d, seed=seed + i, dtype=dtype, device=device) for i in (2, 3))
    return SparseGrad(SparseLatents(values, indices, d_sae), grad_values, x, grad_out)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@FLAGS
def test_sparse_adam(
    project: bool, renormalize: bool, dtype: torch.dtype, backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeql.kernels.fused_adam.CPU_BLOCK_BYTES", 63 * 4 * 7)  # several blocks, the last one short
    term = make_term(11, 5, 24, 63, device, seed=0, dtype=dtype)
    W_enc, W_dec = (randn(24, 63, seed=20 + i, dtype=dtype, device=device) for i in range(2))
    enc, dec, adam = moments_of(W_enc, 30), moments_of(W_dec, 40), AdamStep(step=4, lr=0.1)
    wide = [(W.double(), Moments(*(m.double() for m in ms))) for W, ms in ((W_enc, enc), (W_dec, dec))]
    latents = term.latents.with_values(term.latents.values.double())
    grad_enc = scatter_sum(latents.with_values(term.grad_values.double()), term.x.double(), backend="reference")
    grad_dec = scatter_sum(latents, term.grad_out.double(), backend="reference")
    adam_rows_reference(wide[0][0], grad_enc, wide[0][1], adam)
    adam_rows_reference(wide[1][0], grad_dec, wide[1][1], adam, project=project, renormalize=renormalize)
    sparse_adam([term], W_enc, enc, W_dec, dec, adam, project=project, renormalize=renormalize, backend=backend)
    for weight, moments, (expected, expected_moments) in ((W_enc, enc, wide[0]), (W_dec, dec, wide[1])):
        assert_near(weight, expected)
        # The torch backend rounds a bf16 gradient once more before it is squared.
        assert_near(moments.first, expected_moments.first, dtype)
        assert_near(moments.second, expected_moments.second, dtype)


def test_sparse_adam_sums_its_terms(backend: Backend, device: str) -> None:
    terms = [make_term(n, k, 20, 16, device, seed=n, dtype=torch.float32) for n, k in ((6, 3), (4, 7))]
    start = [randn(20, 16, seed=i, device=device) for i in range(2)]
    results = []
    for name in (backend, "reference"):
        W_enc, W_dec = copy.deepcopy(start)
        enc, dec = Moments.like(W_enc), Moments.like(W_dec)
        sparse_adam(terms, W_enc, enc, W_dec, dec, AdamStep(1, lr=0.1), backend=name)  # pyright: ignore[reportArgumentType]
        results.append((*enc, *dec, W_enc, W_dec))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)


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
    with pytest.raises(ValueError, match="terms: expected at least one"):
        sparse_adam([], W, Moments.like(W), W, Moments.like(W), adam)
    term = make_term(6, 3, 20, 4, "cpu", seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match="latents: expected d_sae = 5"):
        sparse_adam([term], W, Moments.like(W), W, Moments.like(W), adam)
