import copy

import pytest
import torch
from kernel_checks import assert_near, randn
from torch import Tensor

from saeql.kernels.fused_adam import AdamStep, Moments, adam_rows_reference
from saeql.kernels.launch import Backend
from saeql.kernels.sparse_adam import sparse_adam
from saeql.kernels.sparse_grads import RowGrads, SparseGrad, SparseGrads
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
    grads = SparseGrads(term)
    sparse_adam(grads, W_enc, enc, W_dec, dec, adam, project=project, renormalize=renormalize, backend=backend)
    for weight, moments, (expected, expected_moments) in ((W_enc, enc, wide[0]), (W_dec, dec, wide[1])):
        assert_near(weight, expected)
        # The torch backend rounds a bf16 gradient once more before it is squared.
        assert_near(moments.first, expected_moments.first, dtype)
        assert_near(moments.second, expected_moments.second, dtype)


def make_rows(latents: list[int], d: int, device: str) -> RowGrads:
    rows, m = torch.tensor(latents, device=device), len(latents)
    enc, dec = (randn(m, d, seed=50 + i, device=device) for i in range(2))
    return RowGrads(rows, enc, dec, randn(m, seed=52, device=device))


def test_rows_that_are_summed_already_are_added(backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeql.kernels.fused_adam.CPU_BLOCK_BYTES", 16 * 4 * 7)  # several blocks
    term, rows = make_term(6, 3, 20, 16, device, seed=0, dtype=torch.float32), make_rows([0, 6, 7, 19], 16, device)
    start = [randn(20, 16, seed=i, device=device) for i in range(2)]
    results = []
    for name in (backend, "reference"):
        grads = SparseGrads(term, rows).scaled(0.5)
        W_enc, W_dec = copy.deepcopy(start)
        enc, dec = Moments.like(W_enc), Moments.like(W_dec)
        sparse_adam(grads, W_enc, enc, W_dec, dec, AdamStep(1, lr=0.1), backend=name)  # pyright: ignore[reportArgumentType]
        results.append((*enc, *dec, W_enc, W_dec, grads.b_enc()))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)
    enc = scatter_sum(term.latents.with_values(term.grad_values), term.x, backend="reference")
    enc[rows.latents] += rows.W_enc
    assert_near(results[0][0], 0.1 * 0.5 * enc)
    bias = torch.zeros(20, device=device).index_add_(0, term.latents.indices.flatten(), term.grad_values.flatten())
    assert_near(results[0][-1], 0.5 * bias.index_add(0, rows.latents, rows.b_enc))


@pytest.mark.parametrize("with_rows", [False, True])
def test_square_norm_is_that_of_both_gradients(
    with_rows: bool, backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeql.kernels.fused_adam.CPU_BLOCK_BYTES", 19 * 4 * 7)
    term = make_term(6, 3, 20, 19, device, seed=6, dtype=torch.float32)
    grads = SparseGrads(term, make_rows([2, 3, 18], 19, device) if with_rows else None)
    expected = sum(g.double().square().sum() for g in grads.dense(backend="reference"))
    assert_near(grads.square_norm(backend=backend), torch.as_tensor(expected))


@pytest.mark.parametrize("segment", [4, 8, 16])
def test_latents_that_fire_on_very_many_tokens(
    segment: int, backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("latent_rows", "sparse_grads", "sparse_matmul"):
        monkeypatch.setattr(f"saeql.kernels.{module}.SEGMENT", segment)
    term = make_term(41, 3, 9, 20, device, seed=0, dtype=torch.float32)
    with torch.no_grad():
        term.latents.indices[:, 0] = 4  # of all tokens, and the others start and end anywhere in a segment
        term.latents.indices[:, 1:].remainder_(4)
        term.latents.indices[:, 2].add_(5)
    counts = torch.bincount(term.latents.indices.flatten(), minlength=9)
    assert int(counts.max()) == 41 and int(counts.min()) < 16
    start = [randn(9, 20, seed=i, device=device) for i in range(2)]
    results = []
    for name in (backend, "reference"):
        W_enc, W_dec = copy.deepcopy(start)
        enc, dec = Moments.like(W_enc), Moments.like(W_dec)
        sparse_adam(SparseGrads(term), W_enc, enc, W_dec, dec, AdamStep(1, lr=0.1), backend=name)  # pyright: ignore[reportArgumentType]
        gradient = scatter_sum(term.latents, term.grad_out, backend=name)  # pyright: ignore[reportArgumentType]
        results.append((*enc, *dec, W_enc, W_dec, gradient))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected)


@FLAGS
def test_copies_and_bf16_moments(project: bool, renormalize: bool, backend: Backend, device: str) -> None:
    term = make_term(11, 5, 24, 63, device, seed=0, dtype=torch.float32)
    start = [randn(24, 63, seed=20 + i, device=device) for i in range(2)]
    results = []
    for name in (backend, "reference"):
        W_enc, W_dec = copy.deepcopy(start)
        copies = torch.empty_like(W_enc, dtype=torch.bfloat16), torch.empty_like(W_dec, dtype=torch.bfloat16)
        enc, dec = Moments.like(W_enc, torch.bfloat16), Moments.like(W_dec, torch.bfloat16)
        for step in (1, 2, 3):
            sparse_adam(SparseGrads(term), W_enc, enc, W_dec, dec, AdamStep(step, lr=0.1), project=project,
                        renormalize=renormalize, copies=copies, backend=name)  # pyright: ignore[reportArgumentType]  # fmt: skip
        assert enc.first.dtype == dec.second.dtype == torch.bfloat16
        for bf16, weight in zip(copies, (W_enc, W_dec), strict=True):
            torch.testing.assert_close(bf16.float(), weight, rtol=2**-7, atol=0)  # the interpreter rounds towards 0
        results.append((*enc, *dec, W_enc, W_dec))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, torch.bfloat16)


def test_two_runs_are_bit_identical() -> None:
    results = []
    for _ in range(2):
        W_enc, W_dec = (randn(200, 63, seed=i) for i in range(2))
        enc, dec = Moments.like(W_enc), Moments.like(W_dec)
        for step in range(1, 4):
            term = make_term(300, 8, 200, 63, "cpu", seed=step, dtype=torch.float32)
            sparse_adam(SparseGrads(term), W_enc, enc, W_dec, dec, AdamStep(step, lr=0.01))
        results.append((W_enc, W_dec, *enc, *dec))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_arguments_that_do_not_fit_are_named() -> None:
    W, adam = torch.zeros(5, 4), AdamStep(1, lr=0.1)
    term = make_term(6, 3, 20, 4, "cpu", seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match="latents: expected d_sae = 5"):
        sparse_adam(SparseGrads(term), W, Moments.like(W), W, Moments.like(W), adam)
    term = make_term(3, 2, 5, 4, "cpu", seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match="copies: must be contiguous"):
        sparse_adam(SparseGrads(term), W, Moments.like(W), W, Moments.like(W), adam, copies=(W, torch.zeros(5, 3)))
