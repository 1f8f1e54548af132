import math
import threading
from collections.abc import Callable

import pytest
import torch
from kernel_checks import assert_near, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saeql.kernels import autograd, sparse_matmul
from saeql.kernels.autograd import SparseLatents, encode_grads, encode_topk, sparse_decode, topk_encode, value_grads
from saeql.kernels.index_transpose import IndexTranspose
from saeql.kernels.launch import Backend

NAMES = ("x", "W_enc", "b_enc", "b_dec", "W_dec")


def make_leaves(n: int, d: int, d_sae: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Scaled so that pre-activations are of order 1."""
    shapes = {"x": (n, d), "W_enc": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,), "W_dec": (d_sae, d)}
    scale = {"W_enc": d**-0.5, "b_enc": 0.3, "b_dec": 0.3}
    leaves = {}
    for i, (name, shape) in enumerate(shapes.items()):
        leaves[name] = (randn(*shape, seed=i) * scale.get(name, 1.0)).to(device=device, dtype=dtype).requires_grad_()
    return leaves


def run(leaves: dict[str, Tensor], k: int, cotangent: Tensor, backend: Backend | None) -> tuple[SparseLatents, Tensor]:
    latents = topk_encode(leaves["x"], leaves["W_enc"], leaves["b_enc"], k, b_dec=leaves["b_dec"], backend=backend)
    out = sparse_decode(latents, leaves["W_dec"], leaves["b_dec"], backend=backend)
    (out * cotangent).sum().backward()
    return latents, out


def dense_run(leaves: dict[str, Tensor], indices: Tensor, cotangent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same function as dense float64 autograd sees it, keeping the given indices."""
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    pre = (wide["x"] - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"]
    acts = torch.zeros_like(pre).scatter(1, indices, pre.gather(1, indices).relu())
    out = acts @ wide["W_dec"] + wide["b_dec"]
    (out * cotangent.double()).sum().backward()
    return wide, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n", "d", "d_sae", "k"), [(7, 63, 130, 5), (3, 24, 500, 20), (4, 16, 17, 17)], ids=str)
def test_encode_decode(n: int, d: int, d_sae: int, k: int, dtype: torch.dtype, backend: Backend, device: str) -> None:
    leaves = make_leaves(n, d, d_sae, dtype, device)
    cotangent = randn(n, d, seed=9, dtype=dtype, device=device)
    latents, out = run(leaves, k, cotangent, backend)
    if dtype == torch.bfloat16:
        # A value next to 0 may be rounded to the other side of the ReLU: compare where it is not.
        cotangent = cotangent * ((latents.values == 0) | (latents.values > 0.05)).all(1, keepdim=True)
        for leaf in leaves.values():
            leaf.grad = None
        latents, out = run(leaves, k, cotangent, backend)
    wide, expected = dense_run(leaves, latents.indices, cotangent)
    assert bool((latents.values >= 0).all())
    assert_near(out, expected)
    for name in NAMES:
        grad = leaves[name].grad
        assert grad is not None and grad.dtype == dtype
        assert_near(grad, wide[name].grad)


def test_reference_backend_agrees_in_float64() -> None:
    leaves = make_leaves(6, 20, 50, torch.float64, "cpu")
    cotangent = randn(6, 20, seed=1, dtype=torch.float64)
    for name in ("torch", "reference"):
        for leaf in leaves.values():
            leaf.grad = None
        latents, out = run(leaves, 8, cotangent, name)
        wide, expected = dense_run(leaves, latents.indices, cotangent)
        assert_near(out, expected)
        for leaf in NAMES:
            assert_near(leaves[leaf].grad, wide[leaf].grad)


def test_gradcheck() -> None:
    leaves = make_leaves(3, 4, 9, torch.float64, "cpu")

    def function(*tensors: Tensor) -> Tensor:
        x, W_enc, b_enc, b_dec, W_dec = tensors
        return sparse_decode(topk_encode(x, W_enc, b_enc, 3, b_dec=b_dec), W_dec, b_dec)

    assert torch.autograd.gradcheck(function, tuple(leaves[name] for name in NAMES), fast_mode=False)


def test_no_gradient_through_values_that_are_zero(backend: Backend, device: str) -> None:
    leaves = make_leaves(4, 16, 40, torch.float32, device)
    with torch.no_grad():
        leaves["b_enc"].fill_(-100.0)
    run(leaves, 6, torch.ones(4, 16, device=device), backend)
    for name in ("x", "W_enc", "b_enc", "W_dec"):
        grad = leaves[name].grad
        assert grad is not None and not grad.any(), name


def test_gradients_that_are_not_asked_for_are_not_made() -> None:
    leaves = make_leaves(4, 16, 40, torch.float32, "cpu")
    for name in ("x", "W_dec"):
        leaves[name].requires_grad_(False)
    run(leaves, 6, torch.ones(4, 16), None)
    assert leaves["x"].grad is None and leaves["W_dec"].grad is None
    assert leaves["W_enc"].grad is not None


def test_gradient_of_a_compacted_subset_reaches_the_whole_weight(backend: Backend, device: str) -> None:
    leaves = make_leaves(2, 12, 700, torch.float32, device)
    dead = torch.arange(0, 700, 2, device=device)
    W, b, k_aux = leaves["W_enc"], leaves["b_enc"], 288
    latents = topk_encode(leaves["x"], W[dead], b[dead], k_aux, b_dec=leaves["b_dec"], backend=backend)
    sparse_decode(latents, leaves["W_dec"][dead], backend=backend).square().sum().backward()
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    pre = (wide["x"] - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"]
    full = dead[latents.indices]
    (torch.zeros_like(pre).scatter(1, full, pre.gather(1, full).relu()) @ wide["W_dec"]).square().sum().backward()
    for name in NAMES:
        assert_near(leaves[name].grad, wide[name].grad)
    assert W.grad is not None and W.grad[dead].any() and not W.grad[1::2].any()


def test_explicit_gradients_are_those_of_autograd() -> None:
    leaves = make_leaves(6, 20, 50, torch.float32, "cpu")
    cotangent = randn(6, 20, seed=1)
    run(leaves, 8, cotangent, None)
    x, W_enc, b_enc, b_dec, W_dec = (leaves[name].detach() for name in NAMES)
    latents = encode_topk(x - b_dec, W_enc, b_enc, 8)
    decode = autograd.decode_grads(latents, W_dec, cotangent, values=False)
    grads = encode_grads(latents, value_grads(latents, W_dec, cotangent), x - b_dec, W_enc, input=True)
    assert decode.values is None and decode.b_dec is not None
    b_dec_grad = decode.b_dec - grads.b_enc @ W_enc
    for name, grad in zip(NAMES, (grads.x, grads.W_enc, grads.b_enc, b_dec_grad, decode.W_dec), strict=True):
        assert_near(grad, leaves[name].grad)


def test_transpose_is_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original: Callable[..., IndexTranspose] = sparse_matmul.transpose_indices

    def counted(indices: Tensor, d_sae: int) -> IndexTranspose:
        calls.append(d_sae)
        return original(indices, d_sae)

    monkeypatch.setattr(sparse_matmul, "transpose_indices", counted)
    run(make_leaves(6, 20, 50, torch.float32, "cpu"), 8, torch.ones(6, 20), None)
    assert calls == [50]


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest storage that any op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, elements)
        return out


def test_backward_allocates_nothing_of_size_n_k_d_or_n_d_sae() -> None:
    n, d, d_sae, k = 512, 32, 256, 16
    leaves = make_leaves(n, d, d_sae, torch.float32, "cpu")
    latents = topk_encode(leaves["x"], leaves["W_enc"], leaves["b_enc"], k, b_dec=leaves["b_dec"])
    loss = sparse_decode(latents, leaves["W_dec"], leaves["b_dec"]).square().mean()
    with LargestTensor() as largest:
        loss.backward()
    assert 0 < largest.elements <= max(n * d, d_sae * d, n * k + 1)
    assert largest.elements < min(n * k * d, n * d_sae) / 4


def test_forward_holds_one_chunk_of_pre_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeql.kernels.topk.CPU_CHUNK_BYTES", 128 * 256 * 4)
    monkeypatch.setattr("saeql.kernels.topk._thread", threading.local())
    leaves = make_leaves(1024, 8, 256, torch.float32, "cpu")
    with LargestTensor() as largest:
        topk_encode(leaves["x"], leaves["W_enc"], leaves["b_enc"], 4)
    assert largest.elements <= 128 * 256


def test_two_runs_are_bit_identical() -> None:
    results = []
    for _ in range(2):
        leaves = make_leaves(300, 63, 1000, torch.float32, "cpu")
        _, out = run(leaves, 32, randn(300, 63, seed=3), None)
        results.append([out, *(leaves[name].grad for name in NAMES)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_shapes_that_do_not_fit_are_named() -> None:
    leaves = make_leaves(4, 16, 40, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"b_dec: expected shape \[d_in\] with d_in = 16 as in x, got \[15\]"):
        topk_encode(leaves["x"], leaves["W_enc"], leaves["b_enc"], 3, b_dec=torch.zeros(15))
    latents = topk_encode(leaves["x"], leaves["W_enc"], leaves["b_enc"], 3)
    with pytest.raises(ValueError, match=r"W_dec: expected d_sae = 40 rows as in latents, got shape \[39, 16\]"):
        sparse_decode(latents, leaves["W_dec"][:39])
    assert math.isfinite(sparse_decode(latents, leaves["W_dec"]).sum().item())
