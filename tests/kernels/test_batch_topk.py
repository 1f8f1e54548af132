import pytest
import torch
from kernel_checks import assert_near, randn
from torch import Tensor

from saeql.kernels.autograd import SparseLatents, batch_topk_encode, sparse_decode, threshold_encode
from saeql.kernels.batch_topk import (
    candidates_per_row,
    encode_batch_topk,
    encode_batch_topk_reference,
    encode_threshold,
)
from saeql.kernels.launch import Backend

NAMES = ("x", "W_enc", "b_enc", "b_dec", "W_dec")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize(
    ("n", "d", "d_sae", "k"), [(7, 63, 130, 5), (3, 32, 1000, 32), (4, 20, 17, 17)], ids=str
)


def make(n: int, d: int, d_sae: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of very different size, hence of very different numbers of latents; the last one is all negative."""
    x = randn(n, d, seed=0) * torch.linspace(3, 0.2, n)[:, None]
    W, b = randn(d_sae, d, seed=1) * d**-0.5, randn(d_sae, seed=2) * 0.1
    x[-1] = -8 * W.mean(0) / W.mean(0).square().sum()
    return x.to(device, dtype), W.to(device, dtype), b.to(device, dtype)


def assert_well_padded(latents: SparseLatents) -> None:
    values, indices = latents.values, latents.indices
    kept = values > 0
    assert values.shape == indices.shape and bool((values >= 0).all())
    assert values.shape[1] == max(1, int(kept.sum(1).max()))
    assert int(indices.min()) >= 0 and int(indices.max()) < latents.d_sae
    assert all(row.unique().numel() == row.numel() for row in indices)


@DTYPES
@SHAPES
def test_encode_batch_topk(
    n: int, d: int, d_sae: int, k: int, dtype: torch.dtype, backend: Backend, device: str
) -> None:
    x, W, b = make(n, d, d_sae, device, dtype)
    latents, threshold = encode_batch_topk(x, W, b, k, backend=backend)
    assert_well_padded(latents)
    acts = (x.double() @ W.double().T + b.double()).relu()
    kept = latents.values > 0
    assert latents.values.dtype == dtype
    assert int(kept.sum()) == min(n * k, int((acts > 0).sum()))
    assert float(threshold) == float(latents.values[kept].min())
    assert_near(latents.values, acts.gather(1, latents.indices) * kept)
    expected = acts.flatten().sort(descending=True).values[: n * k]
    assert_near(latents.values[kept].sort(descending=True).values, expected[: int(kept.sum())])


@pytest.mark.parametrize("large", [1, 2])
def test_rows_that_keep_more_than_their_candidates_are_whole(large: int, backend: Backend, device: str) -> None:
    n, d_sae, k = 12, 300, 4
    x, W, b = make(n, 16, d_sae, device)
    x[3 : 3 + large] = 1000 * x[3]  # these keep all there is
    latents, _ = encode_batch_topk(x, W, b, k, backend=backend)
    assert candidates_per_row(k, d_sae) == 16
    assert int((latents.values > 0).sum(1)[3 : 3 + large].min()) > 16
    assert_well_padded(latents)
    expected = encode_batch_topk_reference(x.double(), W.double(), b.double(), k)
    assert_near(latents.to_dense(), expected, torch.float32)


def test_fewer_positive_than_n_k(backend: Backend, device: str) -> None:
    n, d_sae, k = 60, 300, 4
    x, W, b = make(n, 16, d_sae, device)
    x[1:] = 0  # and the only row with any has more than its candidates
    latents, threshold = encode_batch_topk(100 * x, W, b - 5, k, backend=backend)
    acts = (100 * x.double() @ W.double().T + b.double() - 5).relu()
    assert candidates_per_row(k, d_sae) < int((acts > 0).sum()) < n * k
    assert_near(latents.to_dense(), acts, torch.float32)
    assert float(threshold) > 0


def test_ties_at_the_threshold_fill_up_to_n_k(backend: Backend, device: str) -> None:
    x, W, b = torch.ones(5, 4, device=device), torch.ones(40, 4, device=device), torch.zeros(40, device=device)
    latents, threshold = encode_batch_topk(x, W, b, 7, backend=backend)
    assert int((latents.values > 0).sum()) == 35
    assert float(threshold) == 4.0
    x[0] = 2.0
    W[:20] *= 2
    latents, threshold = encode_batch_topk(x, W, b, 9, backend=backend)
    assert int((latents.values > 0).sum()) == 45
    assert float(latents.values.sum()) == 20 * 16 + 25 * 8
    assert_well_padded(latents)


@pytest.mark.parametrize("k", [1, 100])
def test_nothing_positive(k: int, backend: Backend, device: str) -> None:
    x, W = torch.ones(3, 8, device=device), -torch.ones(100, 8, device=device)
    latents, threshold = encode_batch_topk(x, W, torch.zeros(100, device=device), k, backend=backend)
    assert latents.values.shape == (3, 1) and not latents.values.any() and float(threshold) == 0.0
    assert int(latents.indices.min()) >= 0 and int(latents.indices.max()) < 100
    latents = encode_threshold(x, W, torch.zeros(100, device=device), 0.5, backend=backend)
    assert latents.values.shape == (3, 1) and not latents.values.any()


@DTYPES
@SHAPES
def test_encode_threshold(
    n: int, d: int, d_sae: int, k: int, dtype: torch.dtype, backend: Backend, device: str
) -> None:
    x, W, b = make(n, d, d_sae, device, dtype)
    threshold = 0.4 * randn(d_sae, seed=3, device=device)  # some below 0, where the ReLU decides
    latents = encode_threshold(x, W, b, threshold, backend=backend)
    assert_well_padded(latents)
    pre = x.double() @ W.double().T + b.double()
    kept = pre > threshold.clamp_min(0)
    sure = (pre - threshold.clamp_min(0)).abs() > (0.05 if dtype == torch.bfloat16 else 1e-4)
    assert_near(latents.to_dense() * sure, pre * kept * sure)


def test_encode_threshold_scalar_and_reference(backend: Backend, device: str) -> None:
    x, W, b = make(5, 16, 90, device)
    for threshold in (0.3, torch.tensor(0.3), torch.full((90,), 0.3, device=device)):
        latents = encode_threshold(x, W, b, threshold, backend=backend)
        assert_near(latents.to_dense(), encode_threshold(x, W, b, 0.3, backend="reference").to_dense())
    with pytest.raises(ValueError, match=r"threshold: expected a scalar or shape \[90\], got \[89\]"):
        encode_threshold(x, W, b, torch.zeros(89, device=device))


def test_chunks_are_the_same(backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = make(140, 16, 64, device)
    whole = encode_threshold(x, W, b, 0.3, backend="torch").to_dense()
    batch = encode_batch_topk(x, W, b, 4, backend="torch")[0].to_dense()
    for name in ("CPU_CHUNK_BYTES", "GPU_CHUNK_BYTES"):
        monkeypatch.setattr(f"saeql.kernels.topk.{name}", 64 * 4 * 100)
    assert_near(encode_threshold(x, W, b, 0.3, backend="torch").to_dense(), whole)
    assert_near(encode_batch_topk(x, W, b, 4, backend="torch")[0].to_dense(), batch)
    if backend == "triton":
        assert_near(encode_threshold(x[:3], W, b, 0.3, backend=backend).to_dense(), whole[:3])


def test_matmul_dtype_chooses_and_recomputes(backend: Backend, device: str) -> None:
    x, W, b = make(6, 48, 300, device)
    acts = (x.double() @ W.double().T + b.double()).relu()
    latents, threshold = encode_batch_topk(x, W, b, 8, matmul_dtype=torch.bfloat16, backend=backend)
    assert latents.values.dtype == threshold.dtype == torch.float32
    assert_near(latents.values, acts.gather(1, latents.indices) * (latents.values > 0), torch.float32)
    assert float(latents.values.double().sum() / acts.flatten().topk(48).values.sum()) > 0.99
    latents = encode_threshold(x, W, b, 1.0, matmul_dtype=torch.bfloat16, backend=backend)
    kept = latents.values > 0
    assert bool((latents.values[kept] > 1.0).all())
    assert_near(latents.values, acts.gather(1, latents.indices) * kept, torch.float32)


def test_no_tokens_at_all() -> None:
    latents, threshold = encode_batch_topk(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(9), 2)
    assert latents.values.shape == (0, 1) and float(threshold) == 0.0
    assert encode_threshold(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(9), 0.1).values.shape == (0, 1)


def test_padding_starts_elsewhere_in_every_row() -> None:
    x, W, b = make(200, 16, 400, "cpu")
    latents = encode_threshold(x, W, b, 2.0)
    padding = latents.indices[latents.values == 0]
    assert padding.numel() > 5000
    assert int(torch.bincount(padding).max()) < 4 * padding.numel() // 400


@DTYPES
@pytest.mark.parametrize("encoder", ["batch", "threshold"])
def test_gradients(encoder: str, dtype: torch.dtype, backend: Backend, device: str) -> None:
    n, d, d_sae, k = 7, 63, 130, 5
    x, W, b = make(n, d, d_sae, device, dtype)
    b_dec, W_dec, cotangent = (0.1 * randn(*s, seed=9, dtype=dtype, device=device) for s in ((d,), (d_sae, d), (n, d)))
    leaves = dict(zip(NAMES, (t.requires_grad_() for t in (x, W, b, b_dec, W_dec)), strict=True))
    if encoder == "batch":
        latents, threshold = batch_topk_encode(x, W, b, k, b_dec=b_dec, backend=backend)
        assert not threshold.requires_grad
    else:
        latents = threshold_encode(x, W, b, 1.0, b_dec=b_dec, backend=backend)
    out = sparse_decode(latents, W_dec, b_dec, backend=backend)
    (out * cotangent).sum().backward()
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    pre = (wide["x"] - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"]
    acts = pre * (latents.to_dense().detach() > 0)
    expected = acts @ wide["W_dec"] + wide["b_dec"]
    (expected * cotangent.double()).sum().backward()
    assert_near(out, expected)
    for name in NAMES:
        assert_near(leaves[name].grad, wide[name].grad)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="k: must be between 1 and d_sae = 9, got 10"):
        encode_batch_topk(torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(9), 10)
    with pytest.raises(ValueError, match=r"b_enc: expected shape \[d_sae\] with d_sae = 9 as in W_enc, got \[8\]"):
        encode_threshold(torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(8), 0.1)
