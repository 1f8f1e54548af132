"""Closed forms that every metric must meet exactly, and intervals against a bootstrap done row by row."""

import math

import numpy as np
import pytest
import torch

from saeql.kernels.autograd import SparseLatents
from saeql.sae.metrics import (
    Bootstrap,
    DocumentGroups,
    RowMetrics,
    TokenLosses,
    dead_share,
    fvu,
    ratio,
    recovered,
    splice_estimates,
)

D, D_SAE, N = 12, 30, 3000


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(500, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5


def rows(seed: int = 0, n: int = N) -> dict[str, torch.Tensor]:
    """Rows of 40 documents that differ from each other, their reconstruction, latents, and which rows are kept."""
    g = torch.Generator().manual_seed(seed)
    documents = torch.randint(0, 40, (n,), generator=g).sort().values
    y = torch.randn(n, D, generator=g) * (1 + documents[:, None] / 20) + 5
    kept = torch.rand(n, generator=g) > 0.05
    y[~kept] *= 50
    y_hat = y + torch.randn(n, D, generator=g) * 0.3
    # latents 0 .. 19 at random, 20 .. 23 each in one document only, the others never
    indices = torch.stack([torch.randperm(20, generator=g)[:4] for _ in range(n)])
    values = torch.rand(n, 4, generator=g) * (torch.rand(n, 4, generator=g) > 0.3)
    for n_latent, document in enumerate((3, 9, 17, 30), 20):
        indices[documents == document, 0] = n_latent
    return {"y": y, "y_hat": y_hat, "indices": indices, "values": values, "documents": documents, "kept": kept}


def metered(data: dict[str, torch.Tensor], batch: int, parts: dict[str, slice] | None = None) -> RowMetrics:
    meter = RowMetrics(D, D_SAE, parts=parts)
    for start in range(0, len(data["y"]), batch):
        part = {name: value[start : start + batch] for name, value in data.items()}
        latents = SparseLatents(part["values"], part["indices"], D_SAE)
        meter.update(part["y"], part["y_hat"], latents, part["documents"], part["kept"])
    return meter


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


def test_fvu_without_rows_or_variance_is_nan():
    assert math.isnan(fvu(torch.zeros(0, 3), torch.zeros(0, 3)))
    assert math.isnan(fvu(torch.ones(4, 3), torch.ones(4, 3)))


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_no_number_depends_on_the_batch_size(batch: int):
    data = rows()
    whole, cut = metered(data, N), metered(data, batch)
    expected, found = whole.estimates(num_draws=300), cut.estimates(num_draws=300)
    assert found.keys() == expected.keys()
    for name, estimate in expected.items():
        assert found[name].n == estimate.n
        for field in ("value", "low", "high"):
            assert getattr(found[name], field) == pytest.approx(getattr(estimate, field), rel=1e-9), (name, field)
    pairs = zip(cut.density_histogram(num_draws=300), whole.density_histogram(num_draws=300), strict=True)
    assert all(mine == theirs for mine, theirs in pairs)


def test_metrics_of_kept_and_of_all_rows_are_those_of_a_direct_computation():
    data = rows()
    found = metered(data, 256).estimates(num_draws=50)
    for suffix, of in (("", data["kept"]), ("_all_rows", torch.ones(N, dtype=torch.bool))):
        y, y_hat, values = data["y"][of].double(), data["y_hat"][of].double(), data["values"][of]
        fired = data["indices"][of][values > 0].unique()
        expected = {
            "fvu": fvu(y, y_hat),
            "cosine": float(torch.cosine_similarity(y, y_hat, dim=1).mean()),
            "reconstruction_bias": float(y_hat.square().sum(1).mean() / (y * y_hat).sum(1).mean()),
            "l0": float((values > 0).sum(1).double().mean()),
            "dead_share": 1 - len(fired) / D_SAE,
        }
        for name, value in expected.items():
            assert found[name + suffix].value == pytest.approx(value, rel=1e-9), name
        assert found[f"fvu{suffix}"].n == int(of.sum()) and found[f"dead_share{suffix}"].n == D_SAE
    assert found["fvu_all_rows"].value < found["fvu"].value / 5  # the rows left out own the variance


def test_parts_have_an_fvu_of_their_own():
    data, kept = rows(), rows()["kept"]
    found = metered(data, 500, {"first": slice(0, 5), "second": slice(5, D)}).estimates(num_draws=50)
    for name, at in (("first", slice(0, 5)), ("second", slice(5, D))):
        assert found[f"fvu@{name}"].value == pytest.approx(fvu(data["y"][kept][:, at], data["y_hat"][kept][:, at]))
        assert found[f"fvu_all_rows@{name}"].value == pytest.approx(fvu(data["y"][:, at], data["y_hat"][:, at]))


def test_float32_rows_keep_their_digits_under_a_large_offset():
    data = rows()
    data["y"] = (data["y"] * 0.01).clamp(-1, 1) + 1000
    data["y_hat"] = data["y"].double().mean(0).expand(N, D)
    data["kept"][:] = True
    assert metered(data, 50).estimates(num_draws=50)["fvu"].value == pytest.approx(1, rel=1e-6)


def test_fvu_interval_is_that_of_drawing_documents_row_by_row():
    """The mean and the variance of the denominator are those of the drawn documents."""
    data = rows()
    found = metered(data, 400).estimates(num_draws=400, seed=5)["fvu"]
    kept, documents = data["kept"], data["documents"]
    weights = Bootstrap(40, 400, 5).weights
    direct = []
    for drawn in weights[:400]:
        times = torch.from_numpy(drawn).long()[documents[kept]]
        direct.append(fvu(data["y"][kept].repeat_interleave(times, 0), data["y_hat"][kept].repeat_interleave(times, 0)))
    low, high = np.quantile(direct, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))


def test_a_ratio_is_drawn_jointly():
    """Numerator and denominator in proportion leave no spread, however much both vary."""
    sizes = np.random.default_rng(0).uniform(1, 20, 60)
    estimate = Bootstrap(60).estimate(ratio(sizes * 0.3, sizes), 60)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((0.3, 0.3, 0.3))


def test_95_of_100_intervals_cover_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        count = rng.integers(20, 60, 80).astype(float)
        total = rng.normal(0.4, 0.2, 80) * count  # documents differ by themselves, not only their tokens
        estimate = Bootstrap(80, 400, int(rng.integers(1 << 30))).estimate(ratio(total, count), 0)
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98


def test_one_document_has_no_interval():
    data = rows()
    data["documents"][:] = 4
    meter = metered(data, 500)
    assert all(e.low is None and e.high is None for e in meter.estimates(num_draws=50).values())
    assert all(e.low is None for *_, e in meter.density_histogram(num_draws=50))


def test_nothing_seen_is_nan_without_an_interval():
    meter = RowMetrics(D, D_SAE)
    found = meter.estimates(num_draws=50)
    assert math.isnan(found["fvu"].value) and math.isnan(found["l0"].value) and found["fvu"].low is None
    assert found["dead_share"].value == 1 and meter.density_histogram() == []


def test_many_documents_share_groups_in_order_of_appearance():
    groups = DocumentGroups(num_groups=4)
    assert groups.of(np.array([[9, 9], [2, 7]])).tolist() == [[0, 0], [1, 2]]
    assert groups.of(np.array([2, 100, 50, 9, 51])).tolist() == [1, 3, 0, 0, 1]
    assert len(groups) == 4


def test_the_interval_of_dead_share_is_around_its_value_and_knows_rare_latents():
    """Latents of a single document each come and go with that document; draws alone would be far too high."""
    meter = metered(rows(), 500)
    dead = meter.estimates(num_draws=2000)["dead_share"]
    assert dead.value == pytest.approx(6 / D_SAE)
    assert dead.low is not None and dead.high is not None
    assert dead.low < dead.value < dead.high and dead.high - dead.low < 4 / D_SAE
    steady = rows()
    steady["indices"] = torch.arange(4).expand(N, 4).contiguous()
    steady["values"] = torch.ones(N, 4)
    dead = metered(steady, 500).estimates(num_draws=200)["dead_share"]
    assert (dead.low, dead.value, dead.high) == pytest.approx((26 / D_SAE,) * 3)


def test_density_histogram_counts_every_living_latent_once():
    data = rows()
    kept = data["kept"]
    histogram = metered(data, 333).density_histogram(num_draws=100)
    fired = data["indices"][kept][data["values"][kept] > 0]
    density = torch.bincount(fired, minlength=D_SAE).double() / int(kept.sum())
    for low, high, share in histogram:
        expected = int(((density >= low) & (density < high)).sum())
        assert share.value == pytest.approx(expected / D_SAE) and share.n == D_SAE
        assert share.low is not None and share.high is not None and 0 <= share.low <= share.value <= share.high <= 1
    assert sum(share.value for *_, share in histogram) == pytest.approx(float((density > 0).double().mean()))
    assert histogram[-1][1] == 1


def test_a_latent_that_always_fires_is_in_the_last_bin():
    data = rows()
    data["indices"], data["values"] = torch.zeros(N, 1, dtype=torch.long), torch.ones(N, 1)
    assert metered(data, 500).density_histogram(num_draws=50)[-1][2].value == pytest.approx(1 / D_SAE)


def test_dead_share():
    assert dead_share(torch.tensor([0, 3, 0, 1])) == 0.5


def test_recovered():
    found = recovered(np.array([3.0, 3, 3, 3]), np.array([3.0, 5, 3.5, 3.5]), np.array([5.0, 5, 5, 3]))
    assert found[:3].tolist() == [1, 0, 0.75] and math.isnan(found[3])


def test_splice_estimates_of_known_losses():
    count = np.array([10, 30])
    model = TokenLosses(3.0 * count, 0.0 * count, count)
    spliced = TokenLosses(3.5 * count, 0.4 * count, count)
    ablated = {
        "mean": TokenLosses(5.0 * count, 2.0 * count, count),
        "zero": TokenLosses(8.0 * count, 4.0 * count, count),
    }
    found = splice_estimates(model, spliced, ablated, Bootstrap(2, 100))
    expected = {
        "ce_spliced": 3.5, "ce_mean": 5, "ce_zero": 8, "ce_increase": 0.5, "ce_recovered": 0.75,
        "ce_recovered_zero": 0.9, "kl": 0.4, "kl_mean": 2, "kl_zero": 4, "kl_recovered": 0.8, "kl_recovered_zero": 0.9,
    }  # fmt: skip
    assert {name: pytest.approx(e.value) for name, e in found.items()} == expected
    assert all((e.low, e.high) == pytest.approx((e.value, e.value)) and e.n == 40 for e in found.values())
