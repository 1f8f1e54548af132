import pytest
import torch
from kernel_checks import assert_near, randn

from saeql.kernels.launch import Backend
from saeql.kernels.sparse_matmul import (
    SparseLatents,
    gather_sum,
    gather_sum_reference,
    latent_sum,
    sampled_dot,
    sampled_dot_reference,
    scatter_sum,
    scatter_sum_reference,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize(("n", "k", "d_sae", "d"), [(5, 9, 63, 1000), (8, 3, 40, 63), (2, 1, 1, 16)], ids=str)


def make_latents(n: int, k: int, d_sae: int, device: str, dtype: torch.dtype = torch.float32) -> SparseLatents:
    """Skewed: latent 0 is kept by every token, the last ones by none; some values are 0."""
    generator = torch.Generator().manual_seed(n)
    scores = torch.rand(n, d_sae, generator=generator) - torch.arange(d_sae) / d_sae
    scores[:, 0] = 2
    indices = scores.topk(k).indices
    values = randn(n, k, seed=11, dtype=dtype).relu()
    return SparseLatents(values.to(device), indices.to(device), d_sae)


@DTYPES
@SHAPES
def test_gather_sum(n: int, k: int, d_sae: int, d: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    latents = make_latents(n, k, d_sae, device, dtype)
    W, bias = (randn(*s, seed=2, dtype=dtype, device=device) for s in ((d_sae, d), (d,)))
    for b in (bias, None):
        out = gather_sum(latents.values, latents.indices, W, b, backend=backend)
        expected = gather_sum_reference(
            latents.values.double(), latents.indices, W.double(), None if b is None else b.double()
        )
        assert out.dtype == dtype
        assert_near(out, expected)


@DTYPES
@SHAPES
def test_sampled_dot(n: int, k: int, d_sae: int, d: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    latents = make_latents(n, k, d_sae, device)
    dense, W = (randn(rows, d, seed=rows, dtype=dtype, device=device) for rows in (n, d_sae))
    expected = sampled_dot_reference(dense.double(), W.double(), latents.indices)
    assert_near(sampled_dot(dense, W, latents.indices, backend=backend), expected)


@DTYPES
@SHAPES
def test_scatter_sum(n: int, k: int, d_sae: int, d: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    latents = make_latents(n, k, d_sae, device, dtype)
    dense = randn(n, d, seed=4, dtype=dtype, device=device)
    out = scatter_sum(latents, dense, backend=backend)
    expected = scatter_sum_reference(latents.with_values(latents.values.double()), dense.double())
    assert out.dtype == dtype
    assert_near(out, expected)
    unused = torch.bincount(latents.indices.flatten(), minlength=d_sae) == 0
    assert not out[unused].any()


def test_non_contiguous_arguments(backend: Backend, device: str) -> None:
    latents = make_latents(6, 4, 30, device)
    W, dense = randn(20, 30, seed=1, device=device).T, randn(20, 6, seed=2, device=device).T
    values, indices = (t.T.contiguous().T for t in (latents.values, latents.indices))
    assert_near(gather_sum(values, indices, W, backend=backend), gather_sum_reference(values, indices, W))
    assert_near(sampled_dot(dense, W, indices, backend=backend), sampled_dot_reference(dense, W, indices))
    strided = SparseLatents(values, indices, 30)
    assert_near(scatter_sum(strided, dense, backend=backend), scatter_sum_reference(strided, dense))


def test_transpose_is_made_once_and_shared() -> None:
    latents = make_latents(6, 4, 30, "cpu")
    assert latents.with_values(latents.values * 2).transpose is latents.transpose


def test_latent_sum(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        latents = make_latents(9, 4, 63, device, dtype)
        assert_near(latent_sum(latents), latents.with_values(latents.values.double()).to_dense().sum(0))


def test_no_tokens_at_all() -> None:
    empty = SparseLatents(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), 10)
    assert torch.equal(scatter_sum(empty, torch.zeros(0, 4)), torch.zeros(10, 4))
    assert gather_sum(empty.values, empty.indices, torch.zeros(10, 4)).shape == (0, 4)
    assert torch.equal(latent_sum(empty), torch.zeros(10))


def test_shapes_that_do_not_fit_are_named() -> None:
    latents = make_latents(6, 4, 30, "cpu")
    with pytest.raises(ValueError, match=r"indices: .* got \[6, 3\]"):
        gather_sum(latents.values, latents.indices[:, :3], torch.zeros(30, 5))
    with pytest.raises(ValueError, match=r"W: .* with d = 4 as in dense, got \[30, 5\]"):
        sampled_dot(torch.zeros(6, 4), torch.zeros(30, 5), latents.indices)
    with pytest.raises(ValueError, match=r"dense: .* got \[7, 4\]"):
        scatter_sum(latents, torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r"indices: .* with N = 2"):
        latents.with_values(torch.zeros(2, 4))
