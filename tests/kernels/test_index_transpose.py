import pytest
import torch
from torch import Tensor

from saeql.kernels import index_transpose
from saeql.kernels.index_transpose import transpose_indices, transpose_indices_reference
from saeql.kernels.launch import Backend

# Of one pass, of two and of three in Triton; 16- and 32-bit keys in PyTorch.
SIZES = pytest.mark.parametrize("d_sae", [1, 63, 256, 257, 2**15, 2**15 + 1, 70000])


def make_indices(n: int, k: int, d_sae: int, device: str) -> Tensor:
    """Half of the entries in one latent; the first and the last latent are in use."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, d_sae, (n, k), generator=generator)
    indices[torch.rand(n, k, generator=generator) < 0.5] = d_sae // 2
    indices[0, 0], indices[-1, -1] = d_sae - 1, 0
    return indices.to(device)


@SIZES
def test_transpose_indices(d_sae: int, backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_transpose, "BLOCK", 128)  # several blocks, the last one short
    indices = make_indices(77, 5, d_sae, device)
    got, expected = transpose_indices(indices, d_sae, backend=backend), transpose_indices_reference(indices, d_sae)
    for name in ("order", "tokens", "offsets"):
        actual, wanted = getattr(got, name), getattr(expected, name)
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted), name


def test_the_reference_by_hand() -> None:
    order, tokens, offsets = transpose_indices_reference(torch.tensor([[2, 0], [3, 2], [0, 3]]), 5)
    assert order.tolist() == [1, 4, 0, 3, 2, 5]
    assert tokens.tolist() == [0, 2, 0, 1, 1, 2]
    assert offsets.tolist() == [0, 2, 2, 4, 6, 6]


def test_full_blocks_and_narrow_indices(backend: Backend, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_transpose, "BLOCK", 128)
    indices = make_indices(64, 4, 600, device)
    expected = transpose_indices_reference(indices, 600)
    assert all(map(torch.equal, transpose_indices(indices.int(), 600, backend=backend), expected))
    strided = indices.T.contiguous().T
    assert all(map(torch.equal, transpose_indices(strided, 600, backend=backend), expected))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_no_entries(shape: tuple[int, int], backend: Backend, device: str) -> None:
    order, tokens, offsets = transpose_indices(torch.zeros(shape, dtype=torch.int64, device=device), 9, backend=backend)
    assert order.shape == tokens.shape == (0,) and offsets.tolist() == [0] * 10
