import pytest
import torch
from kernel_checks import assert_near, randn
from torch import Tensor

from saeql.kernels.batch_topk import encode_batch_topk
from saeql.kernels.launch import Backend
from saeql.kernels.topk import PreActs, encode_topk, row_topk

SHAPES = [(5, 63, 4), (3, 1000, 32), (2, 40, 40), (4, 1, 1), (1, 1000, 300)]


def assert_is_topk(scores: Tensor, values: Tensor, indices: Tensor, k: int) -> None:
    """Properties rather than indices: ties may go either way."""
    assert values.shape == indices.shape == (scores.shape[0], k)
    assert all(row.unique().numel() == k for row in indices)
    assert torch.equal(scores.gather(1, indices), values)
    expected = scores.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n", "columns", "k"), SHAPES, ids=str)
def test_row_topk(n: int, columns: int, k: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    scores = randn(n, columns, seed=0, dtype=dtype, device=device)  # in bf16 with many ties
    assert_is_topk(scores, *row_topk(scores, k, backend=backend), k)


def test_row_topk_ties_infinities_and_zeros(backend: Backend, device: str) -> None:
    scores = torch.zeros(5, 200, device=device)
    scores[1] = -1.5
    scores[2, 17:] = -float("inf")
    scores[3, ::3] = 2.0
    scores[4] = torch.arange(200) % 7
    assert_is_topk(scores, *row_topk(scores, 31, backend=backend), 31)


def test_row_topk_with_all_large_elements_in_one_group(backend: Backend, device: str) -> None:
    scores = randn(2, 512, seed=1, device=device)
    scores[0, 64:96] += 100
    scores[1, ::64] += 100
    assert_is_topk(scores, *row_topk(scores, 16, backend=backend), 16)


@pytest.mark.parametrize("k", [0, 11])
def test_row_topk_refuses_an_impossible_k(k: int) -> None:
    with pytest.raises(ValueError, match="k: must be between 1 and columns = 10"):
        row_topk(torch.zeros(2, 10), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n", "d", "d_sae", "k"), [(7, 63, 130, 5), (3, 32, 1000, 32), (4, 20, 17, 17)], ids=str)
def test_encode_topk(n: int, d: int, d_sae: int, k: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    x, W = (randn(rows, d, seed=i, dtype=dtype, device=device) for i, rows in enumerate((n, d_sae)))
    b = randn(d_sae, seed=3, dtype=dtype, device=device)
    latents = encode_topk(x, W, b, k, backend=backend)
    pre = (x.double() @ W.double().T + b.double()).relu()
    assert latents.values.dtype == dtype and latents.d_sae == d_sae
    assert all(row.unique().numel() == k for row in latents.indices)
    assert_near(latents.values, pre.gather(1, latents.indices))
    assert_near(latents.values.sort(1).values, pre.sort(1).values[:, -k:])


def test_encode_topk_all_negative_rows_give_zeros(backend: Backend, device: str) -> None:
    x, W = torch.ones(3, 8, device=device), -torch.ones(100, 8, device=device)
    latents = encode_topk(x, W, torch.zeros(100, device=device), 6, backend=backend)
    assert torch.equal(latents.values, torch.zeros(3, 6, device=device))
    assert int(latents.indices.min()) >= 0 and int(latents.indices.max()) < 100


def test_encode_topk_in_chunks_is_the_same(backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = (randn(*shape, seed=5, device=device) for shape in ((140, 16), (64, 16), (64,)))
    whole = encode_topk(x, W, b, 4, backend="torch").to_dense()
    for name in ("CPU_CHUNK_BYTES", "GPU_CHUNK_BYTES"):
        monkeypatch.setattr(f"saeql.kernels.topk.{name}", 64 * 4 * 100)
    if backend == "triton":
        x, whole = x[:3], whole[:3]
    assert_near(encode_topk(x, W, b, 4, backend=backend).to_dense(), whole)


def test_encode_topk_matmul_dtype_chooses_and_recomputes(backend: Backend, device: str) -> None:
    x, W, b = (randn(*shape, seed=7, device=device) for shape in ((6, 48), (300, 48), (300,)))
    latents = encode_topk(x, W, b, 8, matmul_dtype=torch.bfloat16, backend=backend)
    pre = (x.double() @ W.double().T + b.double()).relu()
    assert_near(latents.values, pre.gather(1, latents.indices), torch.float32)
    assert float(latents.values.double().sum() / pre.topk(8).values.sum()) > 0.99


def test_encode_topk_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"b_enc: expected shape \[d_sae\] with d_sae = 9 as in W_enc, got \[8\]"):
        encode_topk(torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(8), 2)
    with pytest.raises(ValueError, match="k: must be between 1 and d_sae = 9, got 10"):
        encode_topk(torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(9), 10)


@pytest.mark.parametrize("encoder", ["topk", "batch_topk"])
def test_some_pre_activations_are_taken_along(
    encoder: str, backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeql.kernels.topk.CPU_CHUNK_BYTES", 1)  # as many chunks as there may be
    x, W, b = (
        randn(140, 8, seed=0, device=device),
        randn(40, 8, seed=1, device=device),
        randn(40, seed=2, device=device),
    )
    wanted = PreActs(torch.tensor([0, 3, 39], device=device))
    cast = W.bfloat16()
    encode = encode_topk if encoder == "topk" else encode_batch_topk
    encode(x, W, b, 4, matmul_dtype=torch.bfloat16, W_cast=cast, wanted=wanted, backend=backend)
    assert wanted.taken.dtype == torch.bfloat16
    assert_near(wanted.taken, (x @ W.T + b)[:, wanted.latents])


def test_a_cast_weight_that_does_not_fit_is_refused() -> None:
    x, W, b = randn(3, 8, seed=0), randn(40, 8, seed=1), randn(40, seed=2)
    with pytest.raises(ValueError, match=r"W_cast: expected torch.bfloat16 \[40, 8\], got torch.float32"):
        encode_topk(x, W, b, 4, matmul_dtype=torch.bfloat16, W_cast=W)
