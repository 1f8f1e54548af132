"""Training: learns, is deterministic, resumes bit for bit, keeps latents alive, refuses what is not finite."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saeql.sae.architectures import build
from saeql.sae.checkpoint import CheckpointError, checkpoints
from saeql.sae.config import DictionaryConfig, TrainConfig
from saeql.sae.metrics import fvu
from saeql.sae.model import SparseAutoencoder
from saeql.sae.objective import auxk_loss, loss_terms
from saeql.sae.stream import ActivationBatch, Cursor
from saeql.sae.trainer import Places, Trainer, TrainingError, learning_rate_share

D_IN, D_SAE, K = 24, 64, 4
CONFIG = TrainConfig(
    num_steps=120, batch_tokens=64, lr=1e-2, warmup_steps=5, init_tokens=256, dead_after_tokens=640,
    log_every_steps=10, checkpoint_every_steps=50, matmul_dtype="float32",
)  # fmt: skip


class PlantedSource:
    """Sparse mixtures of fixed directions, far from the origin; the batch is a function of its number."""

    widths = {"here": D_IN}  # noqa: RUF012

    def __init__(self, poison_at: int | None = None):
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=generator), dim=1)
        self.poison_at = poison_at

    def rows(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 + number)
        chosen = torch.randint(0, 40, (64, 3), generator=generator)
        weights = torch.rand(64, 3, generator=generator) + 0.5
        return 7 + 3 * torch.einsum("nk,nkd->nd", weights, self.directions[chosen])

    def batches(self, cursor: Cursor | None = None) -> Iterator[ActivationBatch]:
        number = cursor.offset if cursor else 0
        while True:
            acts = self.rows(number)
            if number == self.poison_at:
                acts[3, 2] = float("nan")
            number += 1
            empty = torch.zeros(64, dtype=torch.int32)
            yield ActivationBatch(acts, empty, empty, empty, empty, Cursor(0, 0, number))


def trained(folder: Path | None = None, *, config: TrainConfig = CONFIG, seed: int = 0, **options) -> Trainer:
    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN, seed=seed)
    trainer = Trainer(config, {"a": dictionary}, PlantedSource(), folder=folder, **options)
    trainer.fit()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.learners[0].dictionary.state_dict().items()}


def test_it_learns_planted_directions_and_works_on_raw_rows():
    trainer = trained(config=replace(CONFIG, num_steps=600))
    trainer.finish()
    dictionary, rows = trainer.learners[0].dictionary, PlantedSource().rows(10_000)
    with torch.no_grad():
        assert fvu(rows, dictionary(rows)) < 0.15
        cosine = PlantedSource().directions @ dictionary.W_dec.t()
    assert (cosine.max(1).values > 0.9).float().mean() > 0.7
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_the_same_seed_twice_gives_identical_weights_and_another_seed_others():
    first, second, other = weights(trained()), weights(trained()), weights(trained(seed=1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["W_dec"], other["W_dec"])


def test_resume_is_bit_identical(tmp_path: Path):
    whole = trained(tmp_path / "whole")
    first = trained(tmp_path / "cut", config=replace(CONFIG, checkpoint_every_steps=50))
    del first
    # what a run killed after step 100 leaves behind
    for late in checkpoints(tmp_path / "cut"):
        if late.name > "step-00000100":
            for file in late.iterdir():
                file.unlink()
            late.rmdir()
    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN, seed=99)
    trainer = Trainer(CONFIG, {"a": dictionary}, PlantedSource(), folder=tmp_path / "cut")
    assert trainer.resume() and trainer.step == 100
    trainer.fit()
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize(("keep", "steps"), [(1, [120]), (2, [90, 120]), (9, [30, 60, 90, 120])])
def test_only_the_last_checkpoints_are_kept(keep: int, steps: list[int], tmp_path: Path):
    (tmp_path / "step-00000030.tmp.17").mkdir()  # of a writer that was killed
    trained(tmp_path, config=replace(CONFIG, checkpoint_every_steps=30, keep_checkpoints=keep))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:08d}" for step in steps]


def test_asked_to_stop_it_leaves_a_checkpoint_and_goes_on_to_the_same_weights_and_lines(tmp_path: Path):
    lines: list[dict] = []
    expected = weights(trained(on_log=lines.append))
    dictionary, found = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN, seed=0), []
    stopping = Trainer(
        CONFIG, {"a": dictionary}, PlantedSource(), folder=tmp_path, on_log=found.append,
        should_stop=lambda: stopping.step == 57,
    )  # fmt: skip
    stopping.fit()
    assert stopping.stopped and [p.name for p in checkpoints(tmp_path)] == ["step-00000050", "step-00000057"]
    rest = Trainer(CONFIG, {"a": dictionary}, PlantedSource(), folder=tmp_path, on_log=found.append)
    assert rest.resume() and rest.step == 57
    rest.fit()
    assert not rest.stopped and all(torch.equal(value, expected[name]) for name, value in weights(rest).items())
    for line in (*lines, *found):
        line.pop("tokens_per_second")
    assert found == lines  # the sums of the line that was cut in two went on too
    best = min(lines, key=lambda line: line["fvu"])
    assert rest.best == {"a": {"fvu": best["fvu"], "step": best["step"]}}


def test_a_checkpoint_of_another_origin_is_refused_with_both_values(tmp_path: Path):
    trained(tmp_path, belongs_to={"model.revision": "main", "layers": [3, 4]})
    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)

    def resume(**belongs_to: object) -> bool:
        origin = {"model.revision": "main", "layers": [3, 4], **belongs_to}
        return Trainer(CONFIG, {"a": dictionary}, PlantedSource(), folder=tmp_path, belongs_to=origin).resume()

    assert resume()
    with pytest.raises(CheckpointError, match=r"with model\.revision = main, this run asks for v2"):
        resume(**{"model.revision": "v2"})
    with pytest.raises(CheckpointError, match=r"with layers = \[3, 4\], this run asks for \[3\]"):
        resume(layers=[3])


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path):
    trained(tmp_path)
    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)
    other = Trainer(replace(CONFIG, lr=2e-2), {"a": dictionary}, PlantedSource(), folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"lr = 0.01, this run asks for 0.02"):
        other.resume()
    file = checkpoints(tmp_path)[-1] / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its hash"):
        Trainer(CONFIG, {"a": dictionary}, PlantedSource(), folder=tmp_path).resume()


def test_metrics_are_logged_and_describe_the_training():
    lines: list[dict] = []
    trained(on_log=lines.append)
    assert [line["step"] for line in lines] == list(range(10, 121, 10))
    assert lines[-1]["fvu"] < lines[0]["fvu"] < 1.5
    assert 0 < lines[-1]["l0"] <= K
    assert set(lines[0]) >= {"tokens", "dead_share", "lr", "auxk_loss", "tokens_per_second"}


def test_a_poisoned_batch_is_skipped_counted_and_reaches_nothing():
    clean = Trainer(CONFIG, {"a": build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)}, PlantedSource())
    clean.fit()
    lines: list[dict] = []
    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)
    trainer = Trainer(CONFIG, {"a": dictionary}, PlantedSource(poison_at=119), on_log=lines.append)
    trainer.fit()
    learner = trainer.learners[0]
    assert learner.skipped == 1 and learner.steps == CONFIG.num_steps - 1
    assert lines[-1]["skipped_batches"] == 1
    assert all(torch.isfinite(t).all() for t in learner.tensors().values())
    before = {name: t.clone() for name, t in learner.tensors().items()}
    learner.step(torch.full((64, D_IN), float("nan")), 1.0, 1.0, None)
    assert all(torch.equal(t, before[name]) for name, t in learner.tensors().items())


def test_too_many_poisoned_batches_end_the_training():
    class Poisoned(PlantedSource):
        def rows(self, number: int) -> torch.Tensor:
            return super().rows(number) * (float("inf") if number > 20 and number % 3 == 0 else 1.0)

    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)
    with pytest.raises(TrainingError, match=r"a: 2 of 25 batches were not finite, more than train\.max_skipped_share"):
        Trainer(CONFIG, {"a": dictionary}, Poisoned()).fit()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e-2}, {"ema_decay": 0.9}], ids=["plain", "clip", "average"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_training_without_autograd_is_that_with_it(architecture: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    config = replace(CONFIG, num_steps=40, dead_after_tokens=256, **options)
    results = []
    for selects in (True, False):
        dictionary = build(DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K), D_IN)
        with torch.no_grad():
            dictionary.b_enc[:9] = -1e3  # dead for good, so that the auxiliary loss runs
        monkeypatch.setattr(type(dictionary), "selects", selects)
        lines = []
        trainer = Trainer(config, {"a": dictionary}, PlantedSource(), on_log=lines.append)
        trainer.fit()
        trainer.finish()
        results.append((weights(trainer), lines))
    assert results[0][1][-1]["auxk_loss"] > 0
    for one, other in zip(results[0][1], results[1][1], strict=True):
        for key in ("fvu", "l0", "dead_share", "auxk_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-3), key
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(tensor, results[1][0][name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("selects", [True, False])
def test_clipping_is_exact(selects: bool, monkeypatch: pytest.MonkeyPatch):
    """After one step the first moment is (1 - beta1) of the clipped gradient; the decoder's is projected as well."""
    moments = []
    for limit in (None, 1e-3):
        dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)
        monkeypatch.setattr(type(dictionary), "selects", selects)
        trainer = Trainer(replace(CONFIG, num_steps=1, max_grad_norm=limit), {"a": dictionary}, PlantedSource())
        trainer.fit()
        moments.append({name: moment.first for name, moment in trainer.learners[0].moments.items()})
    shares = [float(moments[1][name].norm() / moments[0][name].norm()) for name in moments[0]]
    assert shares == pytest.approx([shares[0]] * 4, rel=1e-4) and shares[0] < 0.1
    norms = [float(moments[1][name].norm()) / 0.1 for name in ("W_enc", "b_enc", "b_dec")]
    assert 0.3e-3 < sum(n * n for n in norms) ** 0.5 <= 1e-3


def test_moments_in_bfloat16_take_half_and_learn_the_same(tmp_path: Path):
    full, half = (trained(tmp_path / d, config=replace(CONFIG, moments_dtype=d)) for d in ("float32", "bfloat16"))
    assert half.learners[0].moments["W_enc"].first.dtype == torch.bfloat16
    x = PlantedSource().rows(5000)
    errors = []
    for trainer in (full, half):
        trainer.finish()
        errors.append(float(fvu(x, trainer.learners[0].dictionary(x).detach())))
    assert errors[1] < errors[0] + 0.05
    again = Trainer(replace(CONFIG, moments_dtype="bfloat16"), {"a": build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)},
                    PlantedSource(), folder=tmp_path / "bfloat16")  # fmt: skip
    assert again.resume() and torch.equal(
        again.learners[0].moments["W_dec"].second, half.learners[0].moments["W_dec"].second
    )


def test_weight_average_is_that_of_the_steps():
    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)
    config = replace(CONFIG, ema_decay=0.9, num_steps=30)
    seen = [dictionary.b_enc.detach().clone()]
    trainer = Trainer(
        config, {"a": dictionary}, PlantedSource(), on_step=lambda n: seen.append(dictionary.b_enc.detach().clone())
    )
    trainer.fit()
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.9 * expected + 0.1 * value
    trainer.learners[0].take_average()
    torch.testing.assert_close(dictionary.b_enc.detach(), expected)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_several_dictionaries_learn_from_one_stream_as_they_would_alone():
    def fresh(k: int) -> SparseAutoencoder:
        return build(DictionaryConfig(d_sae=D_SAE, k=k), D_IN, seed=k)

    together = Trainer(CONFIG, {"two": fresh(2), "six": fresh(6)}, PlantedSource())
    together.fit()
    for learner, k in zip(together.learners, (2, 6), strict=True):
        alone = Trainer(CONFIG, {"a": fresh(k)}, PlantedSource())
        alone.fit()
        theirs = alone.learners[0].dictionary.state_dict()
        assert all(torch.equal(v, theirs[n]) for n, v in learner.dictionary.state_dict().items())


class TwoPlaces(PlantedSource):
    """Two hook points side by side: the second is a rotation of the first, at another scale."""

    widths = {"in": D_IN, "out": 10}  # noqa: RUF012

    def rows(self, number: int) -> torch.Tensor:
        first = super().rows(number)
        turn = torch.randn(D_IN, 10, generator=torch.Generator().manual_seed(9)) / 5
        return torch.cat([first, 40 * (first @ turn).relu() + 3], 1)


@pytest.mark.parametrize(
    ("form", "reads", "writes", "limit"),
    [
        ("transcoder", ("in",), ("out",), 0.25),
        ("skip_transcoder", ("in",), ("out",), 0.2),
        ("crosscoder", ("in", "out"), ("in", "out"), 0.35),
    ],
)
def test_transcoders_and_crosscoders_learn_and_work_on_raw_rows(form: str, reads: tuple, writes: tuple, limit: float):
    widths = TwoPlaces.widths
    config = DictionaryConfig(d_sae=D_SAE, k=K, form=form)
    d_in, d_out = sum(widths[n] for n in reads), sum(widths[n] for n in writes)
    dictionary = build(config, d_in, d_out)
    places = {"a": Places(reads, writes)}
    trainer = Trainer(replace(CONFIG, num_steps=500), {"a": dictionary}, TwoPlaces(), places=places)
    trainer.fit()
    trainer.finish()
    rows = TwoPlaces().rows(10_000)
    x = rows[:, :d_in] if form != "crosscoder" else rows
    y = rows[:, D_IN:] if form != "crosscoder" else rows
    with torch.no_grad():
        y_hat = dictionary(x)
    for start, stop in [(0, y.shape[1])] if form != "crosscoder" else [(0, D_IN), (D_IN, D_IN + 10)]:
        assert fvu(y[:, start:stop], y_hat[:, start:stop]) < limit


def test_hook_points_that_are_not_in_the_stream_are_named():
    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)
    with pytest.raises(ValueError, match="hook point there is not in the stream, which has here"):
        Trainer(CONFIG, {"a": dictionary}, PlantedSource(), places={"a": Places(("there",), ("there",))})


def test_learning_rate_warms_up_and_decays_to_almost_zero():
    shares = [learning_rate_share(step, CONFIG) for step in range(CONFIG.num_steps)]
    assert shares[0] == pytest.approx(1 / 5) and shares[5] == 1 and shares[80] == 1
    assert shares[-1] == pytest.approx(1 / 36) and all(0 < s <= 1 for s in shares)


def dead_dictionary() -> tuple[SparseAutoencoder, torch.Tensor, torch.Tensor]:
    dictionary = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN)
    dead = torch.tensor([1, 5, 6, 20, 33])
    with torch.no_grad():
        dictionary.b_enc[dead] = -1e3
    return dictionary, dead, torch.randn(64, D_IN, generator=torch.Generator().manual_seed(3))


def test_auxiliary_loss_reaches_encoder_and_decoder_of_dead_latents_only():
    dictionary, dead, x = dead_dictionary()
    with torch.no_grad():
        dictionary.b_enc[dead] = 0.5  # dead by count, able to fire
    auxk_loss(dictionary, x, x.clone(), dead).backward()
    alive = torch.ones(D_SAE, dtype=torch.bool)
    alive[dead] = False
    for parameter in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc):
        assert parameter.grad is not None
        assert parameter.grad[dead].reshape(len(dead), -1).abs().sum(1).all()
        assert not parameter.grad[alive].any()


def test_objective_matches_dense_autograd():
    dictionary, dead, x = dead_dictionary()
    terms, outcome = loss_terms(dictionary, x, x, dead, auxk_coefficient=1 / 32)
    terms.total.backward()
    got = {name: p.grad.clone() for name, p in dictionary.named_parameters() if p.grad is not None}
    dense = {name: p.detach().double().requires_grad_() for name, p in dictionary.named_parameters()}
    pre = (x.double() - dense["b_dec"]) @ dense["W_enc"].t() + dense["b_enc"]
    values, indices = pre.topk(K, dim=1)
    acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
    x_hat = acts @ dense["W_dec"] + dense["b_dec"]
    error = (x.double() - x_hat).detach()
    torch.testing.assert_close((x - outcome.y_hat).detach().double(), error, rtol=1e-4, atol=1e-5)
    aux_pre = ((x.double() - dense["b_dec"]) @ dense["W_enc"].t() + dense["b_enc"])[:, dead]
    aux_hat = aux_pre.relu() @ dense["W_dec"][dead]  # k_aux = min(5, 12) = all five
    auxiliary = (error - aux_hat).square().sum() / error.square().sum()
    ((x.double() - x_hat).square().mean() + auxiliary / 32).backward()
    for name, value in got.items():
        expected = dense[name].grad
        assert expected is not None
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
