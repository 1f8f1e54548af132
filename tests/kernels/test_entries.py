import pytest
import torch
from kernel_checks import assert_near, randn

from saeql.kernels import entries as module
from saeql.kernels.entries import DenseEntries, Entries, above, entry_dot, entry_gather, entry_scatter, entry_sum
from saeql.kernels.launch import Backend
from saeql.kernels.launch import backend as on_backend

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FEW = [(5, 63, 1000), (9, 40, 63), (1, 1, 16)]  # rows, latents, width
SHAPES = pytest.mark.parametrize(("n", "d_sae", "d"), FEW, ids=str)
# the last one has more than a segment of entries in one latent
TALL = pytest.mark.parametrize(("n", "d_sae", "d"), [*FEW, (530, 3, 24)], ids=str)


def make_entries(n: int, d_sae: int, device: str, dtype: torch.dtype = torch.float32) -> Entries:
    """Rows and latents without any entry, a row with all of them, a latent that nearly every row has; one value 0."""
    scores = randn(n, d_sae, seed=3)
    scores[:, 0] = 1
    scores[:, -1] = -1 if d_sae > 1 else 1
    scores[n // 2] = -1
    scores[0] = 1
    rows, indices = (scores > 0.3).nonzero(as_tuple=True)
    values = randn(len(rows), seed=4, dtype=dtype)
    values[0] = 0
    return Entries(values.to(device), rows.to(device), indices.to(device), n, d_sae)


def double(entries: Entries) -> torch.Tensor:
    return entries.with_values(entries.values.double()).to_dense()


@DTYPES
@SHAPES
def test_entry_gather(n: int, d_sae: int, d: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    entries, W = make_entries(n, d_sae, device, dtype), randn(d_sae, d, seed=2, dtype=dtype, device=device)
    assert_near(entry_gather(entries, W, backend=backend), double(entries) @ W.double(), dtype)


@DTYPES
@TALL
def test_entry_scatter_and_sum(n: int, d_sae: int, d: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    entries, dense = make_entries(n, d_sae, device, dtype), randn(n, d, seed=2, dtype=dtype, device=device)
    assert_near(entry_scatter(entries, dense, backend=backend), double(entries).T @ dense.double(), dtype)
    if dtype == torch.float32:
        assert_near(entry_sum(entries), double(entries).sum(0))


@DTYPES
@SHAPES
def test_entry_dot(n: int, d_sae: int, d: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    entries = make_entries(n, d_sae, device, dtype)
    dense, W = (randn(rows, d, seed=rows, dtype=dtype, device=device) for rows in (n, d_sae))
    expected = (dense.double() @ W.double().T)[entries.rows, entries.indices]
    assert_near(entry_dot(entries, dense, W, backend=backend), expected, dtype)


def weights(device: str) -> tuple[torch.Tensor, ...]:
    """x [23, 12], W_enc [40, 12], b_enc [40], b_dec [12], W_dec [40, 12], limit [40]."""
    shapes = ((23, 12), (40, 12), (40,), (12,), (40, 12), (40,))
    return tuple(randn(*shape, seed=i, device=device) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "entries"])
@pytest.mark.parametrize("limited", [False, True], ids=["relu", "limit"])
def test_above_and_decode_have_the_gradients_of_dense_autograd(
    share: float, limited: bool, backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.SPARSE_SHARE, device, share)
    x, W_enc, b_enc, b_dec, W_dec, limit = weights(device)
    bar = limit if limited else 0.0
    leaves = [t.requires_grad_() for t in (W_enc, b_enc, b_dec, W_dec)]
    with on_backend(backend):
        found = above(x, W_enc, b_enc, bar, b_dec=b_dec, whole=limited)
        assert isinstance(found, Entries if share else DenseEntries)
        kept = found.values
        if limited and isinstance(found, DenseEntries):
            kept = kept * (kept > limit)
        out = found.decode(kept * found.take(b_enc.exp()), W_dec, b_dec)
        out.square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    W, b, c, D = wide
    pre = (x.double() - c) @ W.T + b
    expected = ((pre * (pre > bar)) * b.exp()) @ D + c
    expected.square().sum().backward()
    assert_near(out, expected)
    for got, want in zip(leaves, wide, strict=True):
        assert_near(got.grad, want.grad)


def test_few_entries_take_the_sparse_route_and_many_the_dense_one(device: str) -> None:
    x, W_enc, b_enc, *_ = weights(device)
    assert isinstance(above(x, W_enc, b_enc - 100, 0.0), Entries)
    assert isinstance(above(x, W_enc, b_enc + 100, 0.0), DenseEntries)


def test_a_bfloat16_search_gives_float32_values(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SPARSE_SHARE, device, 1.0)
    x, W_enc, b_enc, *_ = weights(device)
    bias = b_enc - 5
    found = above(x, W_enc, bias, 0.0, matmul_dtype=torch.bfloat16)
    assert isinstance(found, Entries) and len(found.values) > 5 and float(found.values.min()) > 0
    exact = (x.double() @ W_enc.double().T + bias)[found.rows, found.indices]
    assert_near(found.values, exact)
    missed = (x @ W_enc.T + bias).clamp_min(0) - found.to_dense()
    assert float(missed.max()) < 0.05  # only what is near 0 in bfloat16 can be missed


def test_nothing_above_the_limit_is_no_error(device: str) -> None:
    x, W_enc, b_enc, b_dec, W_dec, _ = weights(device)
    W_enc.requires_grad_()
    found = above(x, W_enc, b_enc, 1e9, b_dec=b_dec)
    out = found.decode(found.values, W_dec)
    out.sum().backward()
    assert not out.any() and W_enc.grad is not None and not W_enc.grad.any()
