"""Selection by counting: against sorting, on distributions that its first guess does not fit, with ties and NaN."""

import pytest
import torch
from kernel_checks import randn
from torch import Tensor

from saeql.kernels import row_threshold
from saeql.kernels.launch import Backend
from saeql.kernels.row_threshold import threshold_topk, worthwhile
from saeql.kernels.topk import keep_largest, row_topk

N, COLUMNS = 259, 611


def scores_of(kind: str, dtype: torch.dtype) -> Tensor:
    x = randn(N, COLUMNS, seed=1)
    shape = {
        "normal": lambda: x * torch.arange(1, N + 1)[:, None] + 3,
        "heavy": lambda: x.exp().square(),
        "two lumps": lambda: x + 1000 * (x > 0.5),
        "half zero": lambda: x.relu(),
        "few levels": lambda: (2 * x).round(),
        "all equal": lambda: torch.ones_like(x),
        "negative": lambda: -x.abs() - 1,
        "rising": lambda: torch.arange(COLUMNS).expand(N, -1).float(),
    }
    return shape[kind]().to(dtype).contiguous()


KINDS = ("normal", "heavy", "two lumps", "half zero", "few levels", "all equal", "negative", "rising")


@pytest.mark.parametrize("k", [64, 100, 288, COLUMNS - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_are_kept_however_they_are_distributed(kind: str, dtype: torch.dtype, k: int) -> None:
    scores = scores_of(kind, dtype)
    assert worthwhile(scores, k)
    before = scores.clone()
    values, indices = row_topk(scores, k)
    expected = scores.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert torch.equal(scores.gather(1, indices), values) and torch.equal(scores, before)
    assert bool((indices.sort(dim=1).values.diff(dim=1) > 0).all())
    kept = keep_largest(scores, k)
    others = torch.ones(scores.shape, dtype=torch.bool).scatter_(1, kept.sort(1, descending=True).indices[:, :k], False)
    if bool((expected > 0).all()):
        assert torch.equal(kept.sort(dim=1, descending=True).values[:, :k], expected) and not kept[others].any()
    assert torch.equal(kept.double().sum(1), expected.double().sum(1)) or kind in ("normal", "heavy", "two lumps")


@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [
        ("normal", torch.float32, N // 20),
        ("normal", torch.bfloat16, N // 20),
        ("half zero", torch.float32, N // 20),
        ("few levels", torch.bfloat16, N // 10),
        ("heavy", torch.float32, N // 5),
    ],
)
def test_few_rows_are_left_to_sorting(kind: str, dtype: torch.dtype, most: int) -> None:
    """It would be exact all the same, but slow."""
    keys = row_threshold._keys(scores_of(kind, dtype))
    limits, rest = row_threshold._limits(keys, 100)
    assert len(rest) <= most
    counts = (keys >= torch.from_numpy(limits)[:, None]).sum(1)
    counts[torch.from_numpy(rest)] = 100
    assert bool((counts == 100).all())


def test_of_equal_narrow_elements_the_first_are_kept() -> None:
    scores = torch.ones(N, COLUMNS, dtype=torch.bfloat16)
    assert threshold_topk(scores, 100)[1].sort(dim=1).values.equal(torch.arange(100).expand(N, -1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_poisoned_row_does_not_reach_others(bad: float, dtype: torch.dtype) -> None:
    scores = scores_of("normal", dtype)
    scores[5, 400] = scores[7, 3] = bad
    scores[9] = bad
    values, indices = row_topk(scores, 100)
    expected = torch.topk(scores, 100, dim=1).values
    torch.testing.assert_close(values.sort(dim=1, descending=True).values, expected, rtol=0, atol=0, equal_nan=True)
    assert int(indices.min()) >= 0 and int(indices.max()) < COLUMNS
    clean = [n for n in range(N) if n not in (5, 7, 9)]
    assert bool(keep_largest(scores, 100)[clean].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keep_largest_where_pruning_or_sorting_is_used(dtype: torch.dtype, backend: Backend, device: str) -> None:
    scores = randn(7, 130, seed=3, device=device, dtype=dtype)
    values, indices = row_topk(scores, 9, backend="reference")
    expected = torch.zeros_like(scores).scatter_(1, indices, values)
    assert torch.equal(keep_largest(scores, 9, backend=backend).sort(1).values, expected.sort(1).values)
