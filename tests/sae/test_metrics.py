"""Closed forms that every metric must meet exactly."""

import math

import numpy as np
import pytest
import torch

from saeql.sae.metrics import VarianceUnexplained, bootstrap_ratio, ce_recovered, dead_share, fvu, l0


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(500, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5


def test_fvu_of_the_mean_is_one_and_of_x_is_zero(x: torch.Tensor):
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1, abs=1e-12)
    assert fvu(x, x) == 0


def test_fvu_is_shift_and_scale_invariant(x: torch.Tensor):
    x_hat = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    value = fvu(x, x_hat)
    assert 0 < value < 1
    assert fvu(x + 1e3, x_hat + 1e3) == pytest.approx(value, rel=1e-9)
    assert fvu(x * 1e-4, x_hat * 1e-4) == pytest.approx(value, rel=1e-9)


def test_fvu_of_known_noise(x: torch.Tensor):
    noise = torch.full_like(x, 0.5)
    assert fvu(x, x + noise) == pytest.approx(0.25 * x.numel() / float((x - x.mean(0)).square().sum()), rel=1e-12)


def test_fvu_does_not_depend_on_the_batch_size(x: torch.Tensor):
    x_hat = x * 0.9
    whole = fvu(x, x_hat)
    for size in (1, 7, 499):
        meter = VarianceUnexplained(x.shape[1])
        for start in range(0, len(x), size):
            meter.update(x[start : start + size], x_hat[start : start + size])
        assert meter.value() == pytest.approx(whole, rel=1e-10)


def test_fvu_keeps_its_digits_under_a_large_offset_in_float32(x: torch.Tensor):
    small = (x * 0.01).float() + 1000
    meter = VarianceUnexplained(x.shape[1])
    for part in small.split(50):
        meter.update(part, part.mean(0).expand_as(part) * 0 + small.double().mean(0))
    assert meter.value() == pytest.approx(1, rel=1e-6)


def test_fvu_without_rows_is_nan():
    assert math.isnan(VarianceUnexplained(3).value())


def test_l0_counts_positive_values_only():
    assert l0(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])) == 1.5


def test_dead_share():
    assert dead_share(torch.tensor([0, 3, 0, 1])) == 0.5


def test_ce_recovered():
    assert ce_recovered(3.0, 3.0, 5.0) == 1
    assert ce_recovered(3.0, 5.0, 5.0) == 0
    assert ce_recovered(3.0, 3.5, 5.0) == 0.75
    assert math.isnan(ce_recovered(3.0, 3.5, 3.0))


def test_bootstrap_interval_covers_the_ratio_and_shrinks_to_it_without_spread():
    rng = np.random.default_rng(0)
    weights = rng.uniform(1, 2, 40)
    low, high = bootstrap_ratio(weights * 0.3, weights)
    assert low == pytest.approx(0.3) and high == pytest.approx(0.3)
    values = weights * rng.normal(0.3, 0.1, 40)
    low, high = bootstrap_ratio(values, weights)
    assert low < values.sum() / weights.sum() < high
