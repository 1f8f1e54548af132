"""Frozen weights, starts from the activations, and thresholds that match firing rates."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saeql.sae.architectures import build
from saeql.sae.architectures.jumprelu import JumpReluAutoencoder
from saeql.sae.config import ConfigError, DictionaryConfig, TrainConfig
from saeql.sae.frozen import keep_near
from saeql.sae.learner import Learner
from saeql.sae.match_rates import match_rates
from saeql.sae.start_rows import start_rows
from saeql.sae.stream import ActivationBatch, Cursor
from saeql.sae.trainer import Trainer

ROWS = torch.randn(4096, 12, generator=torch.Generator().manual_seed(5)) @ torch.randn(
    12, 12, generator=torch.Generator().manual_seed(6)
)
SETTINGS = TrainConfig(num_steps=24, batch_tokens=64, init_tokens=256, dead_after_tokens=300, checkpoint_every_steps=12,
                       matmul_dtype="float32", warmup_steps=2)  # fmt: skip


class Rows:
    """`ROWS` again and again, in order."""

    widths = {"x": 12}  # noqa: RUF012

    def batches(self, cursor: Cursor | None = None) -> Iterator[ActivationBatch]:
        at = cursor.offset if cursor else 0
        while True:
            part = ROWS[torch.arange(at, at + 64) % len(ROWS)]
            at += 64
            where = torch.zeros(64, dtype=torch.int32)
            yield ActivationBatch(part, where, where, where, where, Cursor(0, 0, at))


def trainer(folder: Path | None = None, train: TrainConfig = SETTINGS, **keys) -> Trainer:
    config = DictionaryConfig(d_sae=24, k=4, **keys)
    return Trainer(train, {"d": build(config, 12, seed=1)}, Rows(), folder=folder, start_seeds={"d": 1})


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "gated", "jumprelu"])
@pytest.mark.parametrize(("freeze", "kept"), [("decoder", "W_dec"), ("encoder", "W_enc")])
def test_frozen_rows_keep_every_bit_and_all_else_learns(freeze: str, kept: str, architecture: str):
    made = trainer(freeze=freeze, architecture=architecture)
    learner = made.learners[0]
    assert kept not in learner.moments
    start = {name: p.detach().clone() for name, p in learner.dictionary.named_parameters()}
    made.fit()
    for name, p in learner.dictionary.named_parameters():
        assert torch.equal(p, start[name]) == (name == kept), name
    made.finish()
    saved = learner.dictionary.get_parameter(kept).detach()
    if kept == "W_dec":
        assert torch.equal(saved, start[kept])


@pytest.mark.parametrize("option", [{"max_grad_norm": 1e-3}, {"ema_decay": 0.9}, {"moments_dtype": "bfloat16"}])
def test_a_frozen_decoder_keeps_its_bits_under_every_option_of_training(option: dict):
    made = trainer(train=TrainConfig(**{**vars(SETTINGS), **option}), freeze="decoder")
    start = made.learners[0].dictionary.W_dec.detach().clone()
    made.fit()
    assert torch.equal(made.finish()["d"].W_dec, start)


def test_clipping_goes_by_what_learns():
    """A frozen weight's gradient is no part of the norm, so more is left for the others."""
    whole, frozen = (
        trainer(train=TrainConfig(**{**vars(SETTINGS), "max_grad_norm": 1e-4}), freeze=freeze)
        for freeze in ("none", "encoder")
    )
    steps = []
    for made in (whole, frozen):
        made._measure_input()
        assert made.scaling is not None
        made.train_step(made.scaling.apply(ROWS[:64]))
        steps.append(made.learners[0].moments["W_dec"].first.norm())
    assert float(steps[1]) > float(steps[0])


@pytest.mark.parametrize("freeze", ["decoder", "soft_decoder", "encoder"])
def test_a_frozen_training_resumes_bit_for_bit(freeze: str, tmp_path: Path):
    straight = trainer(freeze=freeze)
    straight.fit()
    first = trainer(tmp_path, freeze=freeze)
    first.should_stop = lambda: first.step == 12
    first.fit()
    assert first.stopped
    second = trainer(tmp_path, freeze=freeze)
    assert second.resume() and second.step == 12
    second.fit()
    for name, p in straight.learners[0].dictionary.named_parameters():
        assert torch.equal(p, second.learners[0].dictionary.get_parameter(name)), name


def test_a_soft_frozen_decoder_stays_in_its_cone():
    made = trainer(freeze="soft_decoder", train=TrainConfig(**{**vars(SETTINGS), "lr": 0.2}))
    start = made.learners[0].dictionary.W_dec.detach().clone()
    made.fit()
    rows = made.learners[0].dictionary.W_dec.detach()
    cosines = (rows * start).sum(1)
    assert float(cosines.min()) >= 0.8 - 1e-6 and float(cosines.min()) < 0.8 + 1e-6
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(24))


def test_rows_that_left_their_cone_return_to_its_edge_the_way_they_went():
    start = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    rows = torch.tensor([[0.6, 0.8, 0], [0.6, 0.8, 0], [0, 0, -1.0]])
    before = rows.clone()
    keep_near(rows, start)
    torch.testing.assert_close(rows[0], torch.tensor([0.8, 0.6, 0]))
    assert torch.equal(rows[1], before[1])
    assert torch.isfinite(rows[2]).all()


def test_resampling_and_freezing_are_not_asked_for_together():
    config = DictionaryConfig(d_sae=24, k=4, architecture="relu", freeze="decoder")
    everything = slice(None)
    with pytest.raises(ConfigError, match=r"which dictionary\.freeze"):
        Learner("d", build(config, 12), TrainConfig(resample_every_steps=10), everything, everything)


def test_starts_have_the_directions_that_they_name():
    covariance = torch.cov(ROWS.T)
    drawn = start_rows("random_covariance", ROWS, 4000, seed=0)
    along = torch.linalg.eigh(covariance).eigenvectors[:, -1]
    isotropic = 1 / math.sqrt(12)
    assert float((drawn @ along).square().mean().sqrt()) > 1.5 * isotropic
    pca = start_rows("pca", ROWS, 6, seed=0)
    torch.testing.assert_close(pca[0], -pca[1])
    assert abs(float(pca[0] @ along)) == pytest.approx(1, abs=1e-4)
    spread = (ROWS @ pca.T).var(0)
    assert float(spread[0]) > float(spread[2]) > float(spread[4])
    for kind in ("neurons", "pca"):
        with pytest.raises(ConfigError, match="has 24 directions"):
            start_rows(kind, ROWS, 25, seed=0)
    assert not torch.equal(start_rows("neurons", ROWS, 24, seed=0), start_rows("neurons", ROWS, 24, seed=1))


@pytest.mark.parametrize("start", ["random_covariance", "neurons", "pca"])
def test_training_may_start_from_the_activations(start: str):
    made = trainer(start=start, freeze="decoder")
    made.fit()
    assert made.scaling is not None
    expected = start_rows(start, made.scaling.apply(ROWS[:256]), 24, seed=1)
    assert torch.equal(made.learners[0].dictionary.W_dec, expected)


def test_thresholds_give_the_rates_asked_for():
    config = DictionaryConfig(d_sae=60, k=4, architecture="jumprelu", freeze="all")
    dictionary = build(config, 12, seed=3)
    assert isinstance(dictionary, JumpReluAutoencoder)
    rows = ROWS**3  # heavy tails
    rates = torch.rand(60, generator=torch.Generator().manual_seed(0)) ** 6
    rates[:4] = torch.tensor([0.0, 1.0, 0.9, 1 / len(rows)])
    match_rates(dictionary, rates, lambda: rows.split(500), len(rows))
    with torch.no_grad():
        latents = dictionary.encode(rows)
    fired = torch.bincount(latents.indices[latents.values > 0], minlength=60)
    assert ((fired - rates * len(rows)).abs() <= 0.02 * rates * len(rows) + 1.5).all()
    assert fired[0] == 0


def test_equal_rows_do_not_keep_thresholds_from_being_found():
    config = DictionaryConfig(d_sae=24, k=4, architecture="jumprelu", freeze="all")
    dictionary = build(config, 12, seed=3)
    assert isinstance(dictionary, JumpReluAutoencoder)
    rows = ROWS[:8].repeat(100, 1)
    match_rates(dictionary, torch.full((24,), 0.3), lambda: rows.split(300), len(rows))
    with torch.no_grad():
        latents = dictionary.encode(rows)
    fired = torch.bincount(latents.indices[latents.values > 0], minlength=24)
    assert set(fired.tolist()) <= {200, 300}  # two or three of eight rows, never some copies of one


def test_a_dictionary_of_which_nothing_learns_takes_no_step():
    made = trainer(architecture="jumprelu", freeze="all")
    made.fit()
    assert made.step == 0 and made.learners[0].moments == {}


class Kept:
    """Work of a fit in memory; the process "dies" after every so many batches of a pass."""

    def __init__(self, every: int):
        self.every, self.state, self.batches = every, None, 0

    def load(self):
        return self.state

    def is_due(self) -> bool:
        self.batches += 1
        return self.batches % self.every == 0

    def save(self, state):
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        raise InterruptedError


@pytest.mark.parametrize("every", [1, 3, 7])
def test_an_interrupted_fit_of_thresholds_goes_on_to_the_same_bits(every: int):
    rows, rates, found, interruptions = ROWS**3, torch.linspace(0.002, 0.4, 24), {}, 0
    for name, work in (("whole", None), ("resumed", Kept(every))):
        dictionary = build(DictionaryConfig(architecture="jumprelu", d_sae=24, k=4, freeze="all"), 12, seed=1)
        assert isinstance(dictionary, JumpReluAutoencoder)
        for _ in range(500):
            try:
                match_rates(dictionary, rates, lambda: rows.split(250), len(rows), work)
                break
            except InterruptedError:
                interruptions += 1
        found[name] = {k: v.clone() for k, v in dictionary.state_dict().items()}
    assert interruptions > 2
    assert all(torch.equal(value, found["resumed"][key]) for key, value in found["whole"].items())
