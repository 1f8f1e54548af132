"""Every architecture in every form: gradients against naive dense autograd in float64, folding, files, learning."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from saeql.kernels import entries
from saeql.sae.architectures import ARCHITECTURES, build
from saeql.sae.architectures.batchtopk import BatchTopKAutoencoder
from saeql.sae.config import FORMS, DictionaryConfig, TrainConfig
from saeql.sae.files import load_dictionary, save_dictionary
from saeql.sae.model import SparseAutoencoder
from saeql.sae.objective import loss_terms
from saeql.sae.stream import ActivationBatch, Cursor
from saeql.sae.trainer import Trainer

D_IN, D_OUT, D_SAE, K, N = 12, 9, 40, 4, 23
CASES = list(product(ARCHITECTURES, FORMS))
IDS = [f"{a}-{f}" for a, f in CASES]


def made(architecture: str, form: str, **options) -> SparseAutoencoder:
    """A dictionary away from its start, so that no gradient is zero by symmetry."""
    config = DictionaryConfig(architecture=architecture, form=form, d_sae=D_SAE, k=K, bandwidth=0.5, **options)
    d_out = D_IN if form in ("autoencoder", "crosscoder") else D_OUT
    dictionary = build(config, D_IN, d_out, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return dictionary


def data(dictionary: SparseAutoencoder) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D_IN, generator=generator)
    return x, x if dictionary.reads_what_it_writes else torch.randn(N, D_OUT, generator=generator)


class Rectangle(torch.autograd.Function):
    """Naive JumpReLU estimators in float64: mode "value" gives pre * H(pre - t), mode "step" gives H(pre - t)."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, mode):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.mode = bandwidth, mode
        return (pre > threshold) * (pre if mode == "value" else torch.ones_like(pre))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        scale = threshold if ctx.mode == "value" else torch.ones_like(threshold)
        to_pre = (pre > threshold) * grad if ctx.mode == "value" else None
        return to_pre, -(scale * kernel * grad).sum(0), None, None


def naive_loss(d: SparseAutoencoder, p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss written down densely from the papers, with plain autograd."""
    config = d.config
    centred = x - p["b_dec"] if d.reads_what_it_writes else x
    pre = centred @ p["W_enc"].t() + p["b_enc"]
    skip = x @ p["W_skip"].t() if "W_skip" in p else 0
    lam, root = d.sparsity_coefficient, D_IN**0.5
    by_row = config.architecture == "topk" or (
        config.architecture == "matryoshka" and config.matryoshka_selection == "topk"
    )
    if by_row:
        mask = torch.zeros_like(pre).scatter_(1, pre.topk(K, 1).indices, 1.0)
        z = pre.relu() * mask
    elif config.architecture in ("batchtopk", "matryoshka"):
        kept = pre.relu().flatten().topk(N * K).indices
        z = pre.relu() * torch.zeros(N * D_SAE, dtype=pre.dtype).index_fill_(0, kept, 1.0).view(N, D_SAE)
    elif config.architecture == "jumprelu":
        threshold = p["log_threshold"].exp()
        z = Rectangle.apply(pre, threshold, config.bandwidth, "value")
    elif config.architecture == "gated":
        z = (pre > 0) * (p["r_mag"].exp() * (pre - p["b_enc"]) + p["b_mag"]).relu()
    else:
        z = pre.relu()

    def error(latents: torch.Tensor) -> torch.Tensor:
        return (y - latents @ p["W_dec"] - p["b_dec"] - skip).square().mean()

    if config.architecture == "matryoshka":
        widths = [round(s * D_SAE) for s in config.matryoshka_shares]
        inside = torch.arange(D_SAE)
        return torch.stack([error(z * (inside < width)) for width in widths]).mean()
    loss = error(z)
    if config.architecture == "relu":
        penalties = {
            "l1": z,
            "tanh": z.tanh(),
            "p_norm": torch.where(z > 0, z.clamp_min(1e-6) ** config.p, torch.zeros_like(z)),
        }
        loss = loss + lam * penalties[config.sparsity_penalty].sum(1).mean() / root
    elif config.architecture == "gated":
        frozen = pre.relu() @ p["W_dec"].detach() + p["b_dec"].detach()
        frozen = frozen + (x @ p["W_skip"].detach().t() if "W_skip" in p else 0)
        loss = loss + lam * pre.relu().sum(1).mean() / root + (y - frozen).square().mean()
    elif config.architecture == "jumprelu":
        l0 = Rectangle.apply(pre, p["log_threshold"].exp(), config.bandwidth, "step").sum(1).mean()
        penalty = l0 / D_IN if config.target_l0 is None else (l0 / config.target_l0 - 1).square()
        loss = loss + lam * penalty
    return loss


OPTIONS = {
    "relu": [{}, {"sparsity_penalty": "tanh"}, {"sparsity_penalty": "p_norm", "p": 0.6}],
    "jumprelu": [{}, {"target_l0": 5.0}],
    "matryoshka": [{}, {"matryoshka_selection": "topk"}],
}
ROUTES = {"relu": (0.0, 1.0), "gated": (0.0, 1.0), "jumprelu": (0.0, 1.0)}  # dense matmuls only, entries only
VARIANTS = [(a, f, o, r) for a, f in CASES for o in OPTIONS.get(a, [{}]) for r in ROUTES.get(a, (None,))]


def variant_id(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(map(str, value.values()))
    return {0.0: "dense", 1.0: "entries", None: ""}.get(value, str(value))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("architecture", "form", "options", "sparse_share"), VARIANTS, ids=variant_id)
def test_loss_and_gradients_are_those_of_dense_autograd(
    architecture: str, form: str, options: dict, sparse_share: float | None, monkeypatch: pytest.MonkeyPatch
):
    if sparse_share is not None:
        monkeypatch.setitem(entries.SPARSE_SHARE, "cpu", sparse_share)
    dictionary = made(architecture, form, **options)
    x, y = data(dictionary)
    terms, outcome = loss_terms(dictionary, x, y, None, auxk_coefficient=0.0)
    terms.total.backward()
    parameters = {name: p.detach().double().requires_grad_() for name, p in dictionary.named_parameters()}
    expected = naive_loss(dictionary, parameters, x.double(), y.double())
    expected.backward()
    assert float(terms.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in dictionary.named_parameters():
        theirs = parameters[name].grad
        if theirs is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        error = (parameter.grad.double() - theirs).norm() / theirs.norm().clamp_min(1e-12)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    assert outcome.num_active > 0 and outcome.fired.max() < D_SAE


@pytest.mark.parametrize(("architecture", "form"), CASES, ids=IDS)
@torch.no_grad()
def test_folding_makes_it_work_on_raw_activations(architecture: str, form: str):
    dictionary = made(architecture, form)
    x, y = data(dictionary)
    loss_terms(dictionary, x, y, None, auxk_coefficient=0.0)  # gives batchtopk its threshold
    if isinstance(dictionary, BatchTopKAutoencoder):
        dictionary.threshold.mul_(0.99)  # away from the value that it was read from
    scaled = dictionary(x)
    generator = torch.Generator().manual_seed(5)
    x_mean, x_scale = torch.randn(D_IN, generator=generator) * 3, torch.full((D_IN,), 0.25)
    if form == "crosscoder":  # two hook points, each with its own scale
        x_scale[: D_IN // 2] = 4.0
    same = dictionary.reads_what_it_writes
    y_mean = x_mean if same else torch.randn(D_OUT, generator=generator)
    y_scale = x_scale if same else torch.full((D_OUT,), 2.5)
    dictionary.fold_scaling(x_mean, x_scale, y_mean, y_scale)
    torch.testing.assert_close(dictionary(x / x_scale + x_mean), scaled / y_scale + y_mean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("architecture", "form"), CASES, ids=IDS)
@torch.no_grad()
def test_files_keep_it_exactly(architecture: str, form: str, tmp_path: Path):
    dictionary = made(architecture, form)
    x, y = data(dictionary)
    loss_terms(dictionary, x, y, None, auxk_coefficient=0.0)
    loaded = load_dictionary(save_dictionary(dictionary, tmp_path))
    assert type(loaded) is type(dictionary) and loaded.config == dictionary.config
    torch.testing.assert_close(loaded(x), dictionary(x), rtol=1e-5, atol=1e-5)
    assert loaded.d_out == dictionary.d_out


@torch.no_grad()
def test_batchtopk_threshold_gives_about_k_at_inference():
    dictionary = made("batchtopk", "autoencoder")
    generator = torch.Generator().manual_seed(7)
    for _ in range(50):
        x = torch.randn(256, D_IN, generator=generator)
        loss_terms(dictionary, x, x, None, auxk_coefficient=0.0)
    latents = dictionary.encode(torch.randn(2000, D_IN, generator=generator))
    assert float((latents.values > 0).sum(1).double().mean()) == pytest.approx(K, rel=0.1)


class _Rows:
    """Endless mixtures of 200 directions, some of them rare."""

    def __init__(self):
        self.widths = {"rows": 32}
        self.generator = torch.Generator().manual_seed(11)
        self.directions = torch.nn.functional.normalize(torch.randn(200, 32, generator=self.generator), dim=1)

    def draw(self, rows: int) -> torch.Tensor:
        prior = 1 / torch.arange(1, 201) ** 0.7
        chosen = torch.multinomial(prior, rows * 8, replacement=True, generator=self.generator).view(rows, 8)
        weights = torch.rand(rows, 8, generator=self.generator) + 0.5
        return torch.einsum("nk,nkd->nd", weights, self.directions[chosen])

    def batches(self, cursor: Cursor | None = None) -> Iterator[ActivationBatch]:
        while True:
            none = torch.zeros(512, dtype=torch.int32)
            yield ActivationBatch(self.draw(512), none, none, none, none.short(), Cursor())


@pytest.mark.parametrize("steps", [50, 350])
def test_the_threshold_follows_weights_that_learn(steps: int):
    dictionary = build(DictionaryConfig(architecture="batchtopk", d_sae=256, k=8), 32, seed=0)
    rows = _Rows()
    trainer = Trainer(TrainConfig(num_steps=steps, batch_tokens=512, init_tokens=1024), {"a": dictionary}, rows)
    trainer.fit()
    dictionary = trainer.finish()["a"]
    latents = dictionary.encode(rows.draw(4000))
    assert float((latents.values > 0).sum(1).double().mean()) == pytest.approx(8, rel=0.05)


def planted(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(20, D_IN * 2, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(100 + seed)
    chosen = torch.randint(0, 20, (rows, 2), generator=generator)
    weights = torch.rand(rows, 2, generator=generator) + 0.5
    x = torch.einsum("nk,nkd->nd", weights, directions[chosen])
    return x / x.std()


LEARNING: dict[str, dict[str, Any]] = {
    "relu": {"sparsity_coefficient": 0.05},
    "gated": {"sparsity_coefficient": 0.05},
    "jumprelu": {"target_l0": 3.0},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_learns_planted_directions(architecture: str):
    from saeql.kernels.fused_adam import AdamStep, Moments, adam_rows

    config = DictionaryConfig(architecture=architecture, d_sae=32, k=2, **LEARNING.get(architecture, {}))
    if architecture == "jumprelu":
        config = replace(config, sparsity_coefficient=0.1, bandwidth=0.5)
    dictionary = build(config, D_IN * 2)
    moments = {name: Moments.like(p.data) for name, p in dictionary.named_parameters()}
    for step in range(1, 401):
        x = planted(256, step)
        terms, _ = loss_terms(dictionary, x, x, None, auxk_coefficient=0.0, sparsity_share=min(1.0, step / 100))
        dictionary.zero_grad()
        terms.total.backward()
        adam = AdamStep(step, 5e-3 if step < 300 else 1e-3)
        for name, p in dictionary.named_parameters():
            assert p.grad is not None
            unit = name == "W_dec"
            adam_rows(p.data, p.grad, moments[name], adam, project=unit, renormalize=unit)
    x = planted(1000, 1000)
    with torch.no_grad():
        unexplained = float((x - dictionary(x)).square().mean() / x.var())
        l0 = float((dictionary.encode(x).values > 0).sum(1).double().mean())
    assert unexplained < 0.3, (unexplained, l0)
    assert l0 < 8, (unexplained, l0)
