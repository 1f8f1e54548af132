"""Dead latents of relu and gated come alive again, their optimizer state with them, and a resume repeats the draw."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saeql.sae.architectures import build
from saeql.sae.config import ConfigError, DictionaryConfig, TrainConfig
from saeql.sae.stream import ActivationBatch, Cursor
from saeql.sae.trainer import Trainer

D_IN, D_SAE, ROWS, EVERY = 24, 64, 64, 40
CONFIG = TrainConfig(
    num_steps=100, batch_tokens=ROWS, lr=5e-3, warmup_steps=5, init_tokens=256, dead_after_tokens=10 * ROWS,
    sparsity_warmup_steps=10, resample_every_steps=EVERY, log_every_steps=10, checkpoint_every_steps=30,
    decay_share=0.2, matmul_dtype="float32",
)  # fmt: skip


class Mixtures:
    """Sparse mixtures of fixed directions; the batch is a function of its number."""

    widths = {"here": D_IN}  # noqa: RUF012

    def batches(self, cursor: Cursor | None = None) -> Iterator[ActivationBatch]:
        directions = torch.nn.functional.normalize(
            torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0)), dim=1
        )
        number = cursor.offset if cursor else 0
        while True:
            generator = torch.Generator().manual_seed(1000 + number)
            chosen = torch.randint(0, 40, (ROWS, 3), generator=generator)
            weights = torch.rand(ROWS, 3, generator=generator) + 0.5
            number += 1
            empty = torch.zeros(ROWS, dtype=torch.int32)
            acts = 5 + torch.einsum("nk,nkd->nd", weights, directions[chosen])
            yield ActivationBatch(acts, empty, empty, empty, empty, Cursor(0, 0, number))


def trainer(architecture: str = "relu", config: TrainConfig = CONFIG, folder: Path | None = None, **options) -> Trainer:
    dictionary = build(DictionaryConfig(architecture=architecture, d_sae=D_SAE, sparsity_coefficient=0.05), D_IN)
    with torch.no_grad():  # the first ten cannot fire, and nothing reaches them
        dictionary.b_enc[:10] = -100
    return Trainer(config, {"a": dictionary}, Mixtures(), folder=folder, **options)


@pytest.mark.parametrize("architecture", ["relu", "gated"])
@pytest.mark.parametrize("ema_decay", [None, 0.9], ids=["last", "averaged"])
def test_dead_latents_come_alive_and_the_loss_does_not_explode(architecture: str, ema_decay: float | None):
    lines: list[dict] = []
    made = trainer(architecture, replace(CONFIG, ema_decay=ema_decay), on_log=lines.append)
    learner, dictionary = made.learners[0], made.learners[0].dictionary
    made.config = replace(made.config, num_steps=EVERY - 1)
    made.fit()
    assert bool((learner.idle_tokens[:10] >= CONFIG.dead_after_tokens).all())
    alive = (learner.idle_tokens < CONFIG.dead_after_tokens).nonzero()[:, 0]
    others = dictionary.W_dec[alive].clone()

    made.config = replace(made.config, num_steps=EVERY)
    made.fit()  # the step that resamples
    assert learner.resampled >= 10
    norms = dictionary.W_enc.detach().norm(dim=1)
    assert torch.allclose(norms[:10], norms[:10].mean(), rtol=1e-5)
    assert float(norms[:10].mean()) == pytest.approx(0.2 * float(norms[alive].mean()), rel=0.05)
    for name in ("W_enc", "W_dec", *dictionary.latent_biases):
        assert all(not moment[:10].any() for moment in learner.moments[name])
    for name in dictionary.latent_biases:
        assert not dictionary.get_parameter(name)[:10].any()
    if ema_decay:
        assert torch.equal(learner.averages["W_dec"][:10], dictionary.W_dec[:10])
    assert torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    assert float((dictionary.W_dec[alive] - others).detach().norm(dim=1).max()) < 0.2  # one ordinary step

    made.config = replace(made.config, num_steps=EVERY + 10)
    made.fit()
    assert bool((learner.idle_tokens[:10] < 10 * ROWS).any())  # fired since
    made.config = CONFIG
    made.fit()
    before = next(line["fvu"] for line in lines if line["step"] == 30)
    after = [line["fvu"] for line in lines if line["step"] > EVERY]
    assert max(after) < 1.5 * before and after[-1] < before
    assert lines[-1]["resampled"] == learner.resampled


def test_resume_across_a_resampling_step_is_bit_identical(tmp_path: Path):
    whole = trainer(folder=tmp_path / "whole")
    whole.fit()

    def stop(_: int) -> None:
        if cut.step == 35:  # after the checkpoint of step 30, before the step that resamples
            raise KeyboardInterrupt

    cut = trainer(folder=tmp_path / "cut", on_step=stop)
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    resumed = trainer(folder=tmp_path / "cut")
    assert resumed.resume() and resumed.step == 30
    resumed.fit()
    mine, theirs = resumed.learners[0], whole.learners[0]
    assert mine.resampled == theirs.resampled > 0
    expected = theirs.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in mine.tensors().items())


def test_nothing_is_resampled_while_the_learning_rate_decays_or_without_dead_latents():
    late = trainer(config=replace(CONFIG, decay_share=0.7))
    late.fit()
    assert late.learners[0].resampled == 0
    never_dead = trainer(config=replace(CONFIG, dead_after_tokens=10**9))
    never_dead.fit()
    assert never_dead.learners[0].resampled == 0


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_architectures_with_an_auxiliary_loss_refuse_it(architecture: str):
    with pytest.raises(ConfigError, match=rf"train\.resample_every_steps: {architecture} revives .* leave it at 0"):
        trainer(architecture)
