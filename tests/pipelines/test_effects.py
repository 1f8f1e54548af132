"""Steering effects: shifts and cost by hand, read-outs by hand, words that are disjoint, and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeql.pipelines import Run, edit
from saeql.pipelines.cli import main
from saeql.pipelines.output_effects import WritePlace, direction_effects, prefix_effects
from saeql.pipelines.output_labels import TokenTexts
from saeql.pipelines.split_rows import read_feature_rows, read_token_ids
from saeql.pipelines.steering.concept_words import ConceptError, concept_of_words, log_odds_z
from saeql.pipelines.steering.dose_response import (
    KL_BUDGET,
    Crossing,
    Curve,
    Documents,
    RandomCurves,
    area,
    points,
    read_out,
    trend,
)
from saeql.pipelines.steering.edits import SteerError
from saeql.pipelines.steering.effect_config import EffectConfig
from saeql.pipelines.steering.effect_results import COMPETITORS, SELF, EffectStudy
from saeql.pipelines.steering.effect_subjects import Ground
from saeql.pipelines.steering.effect_summary import summarise
from saeql.pipelines.steering.rival_directions import RivalDirections, lens_scores, own_lens_scores
from saeql.pipelines.steering.sampled_texts import distinct_2, losses_of, repeat_rate, scores, write_texts
from saeql.pipelines.steering.vectors import SteeringVector
from saeql.sae.config import ConfigError

HOOK = "resid_post.1"
QUICK = EffectConfig(
    strengths=(-0.5, 0.5, 1.0), random_directions=4, other_directions=2, tokens=64, window_tokens=8, choosing_tokens=32,
    other_concepts=4, prompts=2, prompt_tokens=4, new_tokens=4, num_bootstrap=50,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the tiny run, to write into."""
    folder = tmp_path_factory.mktemp("effects") / "run"
    shutil.copytree(tiny_run, folder)
    return Run.open(folder)


@pytest.fixture(scope="module")
def ground(run: Run) -> Ground:
    return Ground(run, QUICK)


@pytest.fixture(scope="module")
def features(ground: Ground) -> list[int]:
    """Some features that have a concept."""
    return list(ground.concepts)[:3]


@pytest.fixture(scope="module")
def study(run: Run, features: list[int]) -> EffectStudy:
    return run.effect(features, config=QUICK)


def windows_of(run: Run, num: int = 5) -> np.ndarray:
    return np.array(run.evidence.read("windows", split="test")["token_ids"].to_pylist()[:num], np.int32)[:, :12]


# --- what is measured ------------------------------------------------------------------------------------------------


def test_strength_zero_changes_nothing_at_all(run: Run):
    place = WritePlace(run.language_model, {HOOK: 32}, {HOOK: 0.7})
    found = direction_effects(place, place.random_directions(2, 0), windows_of(run), [[5], [7, 9]], strength=0.0)
    for values in (found.shifts, found.kl, found.ce):
        assert (values == 0).all()


def test_each_direction_has_its_strength_and_cost_by_hand(run: Run):
    lm, windows = run.language_model, windows_of(run)
    place = WritePlace(lm, {HOOK: 32}, {HOOK: 0.7})
    directions, strengths = place.random_directions(2, 1), [0.5, -2.0]
    found = direction_effects(place, directions, windows, [[5, 8]], strength=strengths, batch_windows=2)
    ids = torch.from_numpy(windows).long()
    with torch.no_grad():
        before = lm.model(ids).logits.log_softmax(-1)
        for i, direction in enumerate(directions):
            offset = strengths[i] * 0.7 * direction / direction.norm()
            with edit(lm.model, HOOK, lambda acts, offset=offset: acts + offset):
                after = lm.model(ids).logits.log_softmax(-1)
            own = after[:, 1:, [5, 8]].logsumexp(-1) - before[:, 1:, [5, 8]].logsumexp(-1)
            np.testing.assert_allclose(found.shifts[i, 0], own.mean(1), atol=2e-5)
            losses = [-p[:, 1:-1].gather(-1, ids[:, 2:, None])[..., 0].mean(1) for p in (before, after)]
            np.testing.assert_allclose(found.ce[i], losses[1] - losses[0], atol=2e-5)


def test_a_prompt_stands_before_the_same_tokens(run: Run):
    lm, windows = run.language_model, windows_of(run, 3)
    found = prefix_effects(lm, [[9, 11]], windows, [[5]], batch_windows=2)
    has_bos = bool((windows[:, 0] == lm.bos_id).all())
    longer = [[*w[:has_bos], 9, 11, *w[has_bos:]] for w in windows.tolist()]
    with torch.no_grad():
        before = lm.model(torch.from_numpy(windows).long()).logits[:, 1:].log_softmax(-1)
        after = lm.model(torch.tensor(longer)).logits[:, 3:].log_softmax(-1)
    np.testing.assert_allclose(found.shifts[0, 0], (after - before)[..., 5].mean(1), atol=2e-5)
    np.testing.assert_allclose(found.kl[0], (before.exp() * (before - after)).sum(-1).mean(1), atol=2e-5)


# --- words -----------------------------------------------------------------------------------------------------------


def test_words_that_measure_never_chose(ground: Ground):
    assert len(ground.concepts) > 5
    words = ground.stems.codes
    for concept in ground.concepts.values():
        assert len(concept.measured_words) >= 3 and concept.choosing and concept.measured
        chosen, measured = ({int(words[i]) for i in ids} for ids in (concept.choosing, concept.measured))
        assert chosen.isdisjoint(measured)


def test_words_follow_the_feature(ground: Ground, features: list[int]):
    train = ground.rows.train
    ids = read_token_ids(ground.run.evidence, train)
    at = train.active.by_feature()[features[0]]
    following = {int(ids.ravel()[r + 1]) for r in at if (r + 1) % ids.shape[1]}
    concept = ground.concepts[features[0]]
    assert set(concept.measured) & following and set(concept.choosing) & following


def test_log_odds_are_zero_for_words_as_common_as_elsewhere():
    z = log_odds_z(np.array([10, 30, 0]), np.array([100.0, 100.0, 100.0]), 100, 1000.0)
    assert z[0] == pytest.approx(0, abs=1e-9) and z[1] > 3 and z[2] < -1.5


def test_given_words_are_dealt_out_by_stem(ground: Ground):
    concept = concept_of_words(ground.stems, ["river", "walking", "Rivers", "music"])
    assert concept.choosing_words == ("river", "music") and concept.measured_words == ("walking",)
    texts = TokenTexts(ground.place.lm).texts
    assert {texts[i] for i in concept.choosing} == {"river", " river", "music", " music"}
    alone = concept_of_words(ground.stems, ["bank"])
    assert alone.choosing == () and alone.measured_words == ("bank",)
    with pytest.raises(ConceptError, match="no token of this model is the word 'zebra'"):
        concept_of_words(ground.stems, ["river", "zebra"])


def test_contexts_of_rivals_avoid_the_measured_words(ground: Ground, features: list[int]):
    ids = read_token_ids(ground.run.evidence, ground.rows.calibration)
    made = RivalDirections(ground.run, ground.place, ground.rows, ids, 0)
    concept, active = ground.concepts[features[0]], ground.rows.calibration.active.by_feature()[features[0]]
    positive, negative = made.contexts(concept, features[0])
    assert len(positive) and len(negative) and set(positive) <= set(active) and set(negative).isdisjoint(active)
    flat, width = ids.ravel(), ids.shape[1]
    for rows in (positive, negative):
        assert not np.isin(flat[rows], concept.measured).any()
        assert not np.isin(flat[rows[rows % width < width - 1] + 1], concept.measured).any()
    common = made.common(3, 2)
    assert common.random.shape == (3, 32) and len(common.rows) == 2
    torch.testing.assert_close(common.pca[0], -common.pca[1])


def test_lens_scores_are_standardised_logits(run: Run):
    lm, directions = run.language_model, torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    sets = [[5, 9], [7], []]
    with torch.no_grad():
        logits = lm.model.lm_head(lm.model.model.norm(directions)).double()
    found = lens_scores(directions, lm, sets)
    for i, row in enumerate(logits):
        for s, ids in enumerate(sets[:2]):
            assert found[i, s] == pytest.approx(float((row[ids].mean() - row.mean()) / row.std()), abs=1e-4)
    assert (found[:, 2] == 0).all()
    np.testing.assert_allclose(own_lens_scores(directions[:2], lm, sets[:2]), np.diag(found[:2, :2]), atol=1e-5)


# --- reading a curve -------------------------------------------------------------------------------------------------


def straight(slope: float = 4.0, num: int = 6) -> Curve:
    """Shift slope * strength and KL strength squared, the same in every window but for a tilt."""
    strengths = np.array([-0.4, 0.2, 0.4, 0.8])
    tilt = np.linspace(0.5, 1.5, num)
    own, kl = slope * strengths[:, None] * tilt, np.repeat(strengths[:, None] ** 2, num, axis=1)
    return Curve.of(strengths, own, own / 10, kl, kl / 2)


def test_the_read_out_is_interpolated_at_the_budget():
    documents = Documents(np.arange(6), 200, 0)
    read = read_out(straight(), documents, 60)
    alpha = KL_BUDGET**0.5
    assert read.reached and read.kl == KL_BUDGET and read.wrong_way == 0
    assert read.strength == pytest.approx(alpha) and read.own.value == pytest.approx(4 * alpha)
    assert read.others.value == pytest.approx(0.4 * alpha)
    assert read.own.low is not None and read.own.high is not None
    assert read.own.low < read.own.value < read.own.high and read.own.n == 60
    # between 0.4 and 0.8 the cost is read linearly: 0.16 / 2 to 0.64 / 2
    share = (alpha - 0.4) / 0.4
    assert read.ce.value == pytest.approx(0.08 + share * (0.32 - 0.08))


def test_a_budget_that_is_never_reached_says_so():
    weak = straight()
    weak = replace(weak, kl=weak.kl * 0.1)
    read = read_out(weak, Documents(np.arange(6), 50, 0), 6)
    assert not read.reached and read.strength == 0.8 and read.own.value == pytest.approx(3.2)
    assert read.kl == pytest.approx(0.064) and read.area is None
    assert np.isnan(Crossing.of(np.array([[0.0, 0.1, 0.2]]), KL_BUDGET).share).all()


def test_z_is_among_random_directions_of_the_same_strength():
    documents, curve = Documents(np.arange(6), 20, 0), straight()
    strengths = np.array([0.0, 0.2, 0.4, 0.8])
    slopes = np.array([-1.0, 0.0, 1.0])
    own = np.tile(slopes[None, :, None] * strengths, (21, 1, 1))
    kl = np.tile(strengths**2, (21, 3, 1))
    randoms = RandomCurves(strengths, own, kl)
    read = read_out(curve, documents, 6, randoms)
    assert read.z is not None and read.z.value == pytest.approx(4.0) and read.z_equal_kl == pytest.approx(4.0)
    found = points(curve, documents, 6, randoms)
    assert [p.strength for p in found] == [-0.4, 0.2, 0.4, 0.8]
    assert found[0].z is None and found[1].z == pytest.approx(4.0) and found[0].wrong_way == 1
    assert randoms.mean_at_budget() == pytest.approx(0, abs=1e-12)


def test_area_and_trend_by_hand():
    kl, own = np.array([0.0, 0.16, 0.64]), np.array([0.0, 1.0, 2.0])
    at_half = 1 + (0.5**0.5 - 0.4) / 0.4
    assert area(kl, own) == pytest.approx(0.16 * 0.5 + 0.34 * (1 + at_half) / 2)
    line = trend(straight(), np.array([0, 0, 1, 1, 2, 2]))
    assert line.spearman == pytest.approx(1) and (line.num_down, line.num_documents) == (3, 3)
    assert line.sign_p == pytest.approx(1 / 8)
    upward = straight().upward
    assert trend(upward, np.zeros(6, int)).sign_p is None


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_by_hand(run: Run):
    assert distinct_2([1, 2, 1, 2, 1]) == 0.5 and repeat_rate([1, 2, 1, 3]) == pytest.approx(1 / 3)
    lm, prompts = run.language_model, [[1, 5, 9], [1, 8]]
    losses = losses_of(lm, prompts, [[7, 9], []])
    with torch.no_grad():
        log_probs = lm.model(torch.tensor([[1, 5, 9, 7, 9]])).logits[0].log_softmax(-1)
    assert losses[0] == pytest.approx(-float(log_probs[2, 7] + log_probs[3, 9]) / 2, abs=1e-5) and np.isnan(losses[1])
    found = scores([[7, 9], []], losses, {9})
    assert found.hit_rate == 0.5 and found.perplexity == pytest.approx(np.exp(losses[0])) and found.n == 2


def test_every_text_has_its_own_offset(run: Run):
    lm = run.language_model
    prompts, zero = [[1, 5, 9], [1, 8, 9, 11]], torch.zeros(2, 32)
    plain = write_texts(lm, prompts, {}, new_tokens=6, seed=0)
    assert write_texts(lm, prompts, {HOOK: zero}, new_tokens=6, seed=0) == plain
    row = lm.model.get_output_embeddings().weight[20].detach().float()
    pushed = zero.clone()
    pushed[1] = 400 * row / row.norm()
    own, moved = write_texts(lm, prompts, {HOOK: pushed}, new_tokens=6, seed=0)
    assert moved != plain[1] and len(own) <= 6


# --- whole studies ---------------------------------------------------------------------------------------------------


def test_a_study_has_every_method(study: EffectStudy, features: list[int]):
    assert [s.subject.feature for s in study.subjects] == features and study.n == 8 * 7
    for effect in study.subjects:
        assert set(effect.methods) == set(COMPETITORS) and set(effect.groups) == {
            "random", "random_covariance", "other_features"
        }  # fmt: skip
        assert effect.winner in COMPETITORS and effect.own.z is not None
        best = max(
            (m for m, e in effect.methods.items() if e.read.reached or e.read.kl <= KL_BUDGET),
            key=lambda m: effect.methods[m].read.own.value,
        )
        assert effect.winner == best
        assert (effect.lead.value >= 0) == (best == SELF)
        assert [p.strength for p in effect.methods[SELF].points] == list(QUICK.strengths)
    summary = summarise(study)
    assert sum(s.wins for s in summary.methods.values()) == len(features)
    assert ("the features do not win" in summary.verdict) == (summary.methods[SELF].wins < 1.5)


def test_many_features_are_chosen_by_output_score(run: Run):
    study = run.effect(top=5, config=replace(QUICK, full_curves=2, prompts=0, candidates=2))
    scores = [s.subject.score for s in study.subjects]
    assert study.is_chosen and len(scores) == 5 and scores == sorted(scores, key=lambda s: -(s or 0))
    for effect in study.subjects:  # rivals: one strength, and another where that was far from the budget
        rival = effect.methods["diff_mean"]
        assert len(rival.points) <= 2 and rival.texts is None
    again = run.effect(top=5, config=replace(QUICK, full_curves=2, prompts=0, candidates=2))
    assert [s.own.own.value for s in again.subjects] == [s.own.own.value for s in study.subjects]


def test_a_vector_needs_words(run: Run):
    rows = {HOOK: torch.randn(32, generator=torch.Generator().manual_seed(1))}
    vector = SteeringVector("calm", rows, {}, "m", run.language_model.identity.model_sha256)
    study = run.effect(vectors=[vector], words=["river", "bank", "music", "water"], config=QUICK)
    (effect,) = study.subjects
    assert effect.subject.feature is None and not study.has_own_words
    assert effect.subject.concept.measured_words == ("bank", "water")
    for wrong, message in [
        ({"vectors": [vector]}, "vector calm does not say what it is about"),
        ({"vectors": [replace(vector, rows={HOOK: rows[HOOK] * np.nan})], "words": ["bank"]}, "zero or not finite"),
        (
            {"vectors": [replace(vector, rows={"resid_post.0": rows[HOOK]})], "words": ["bank"]},
            r"at resid_post.1 \[32\]",
        ),
        ({"vectors": [replace(vector, model_sha256="x")], "words": ["bank"]}, "was made with m"),
        ({"words": ["bank"]}, "two or more"),
        ({}, "name what is measured"),
        ({"features": [96]}, "no feature 96: this dictionary has features 0 to 95"),
    ]:
        with pytest.raises(SteerError, match=message):
            run.effect(config=QUICK, **wrong)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strengths": (-0.1,)}, "strengths must be finite and one of them above 0"),
        ({"strengths": (float("nan"), 1.0)}, "strengths must be finite"),
        ({"random_directions": 1}, "random_directions must be at least 2"),
        ({"tokens": 8}, "tokens must be at least one window of 32"),
    ],
)
def test_wrong_settings_are_named(keys, message):
    with pytest.raises(ConfigError, match=message):
        EffectConfig(**keys)


def test_the_command_keeps_what_it_found(run: Run, features: list[int], capsys: pytest.CaptureFixture[str]):
    asked = ["effect", str(run.path), "--tokens", "64", "--random", "3", "--texts", "1", "--strengths=-0.5,0.5,1"]
    main([*asked, "--feature", str(features[0]), "--feature", str(features[1]), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [s["feature"] for s in printed["subjects"]] == features[:2]
    main([*asked, "--feature", str(features[1])])
    shown = capsys.readouterr().out
    assert "verdict: at KL 0.3" in shown and f"feature {features[1]}" in shown
    assert (run.path / "effects" / "effects.png").read_bytes()[:4] == b"\x89PNG"
    with run.store() as store:
        rows = store.sql("SELECT * FROM steering ORDER BY feature").to_pylist()
        assert [row["feature"] for row in rows] == features[:2], "each feature once, kept beside the other"
        doses = store.sql("SELECT * FROM steering_effects WHERE method = 'steered' AND NOT at_budget").to_pylist()
        assert sorted({row["strength"] for row in doses}) == [-0.5, 0.5, 1.0] and len(doses) == 6
        by_feature = {s["feature"]: s for s in printed["subjects"]}
        mine = by_feature[features[0]]["methods"]["steered"]["at_budget"]
        row = next(r for r in rows if r["feature"] == features[0])
        assert row["own_shift"] == pytest.approx(mine["own"]["value"], abs=1e-5)
        assert row["winner"] == by_feature[features[0]]["winner"]
    main(["show", str(run.path), str(features[0])])
    assert "steering z" in capsys.readouterr().out
    assert Run.open(run.path).verify().damage == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--feature", "9999"], "no feature 9999: this dictionary has features 0 to 95"),
        (["--feature", "1", "--words", "zebra,lion"], "no token of this model is the word 'zebra'"),
        (["--top", "2", "--strengths", "much"], "--strengths 'much': numbers with commas"),
        (["--where", "density > 2"], "no feature meets where 'density > 2'"),
        (["--top", "0"], "--top 0: at least 1 feature"),
        (["--feature", "1", "--strengths", "90"], "strength 90 is beyond 4"),
        (["--vector", "nowhere.safetensors"], "no steering vector at nowhere.safetensors"),
        ([], "name what is measured"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run: Run, argv, message, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["effect", str(run.path), *argv])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_new_training_forgets_the_effects(run: Run, study: EffectStudy):
    from saeql.pipelines.steering.effect_evidence import TABLE, remove_effects, save_effects

    with run.locked():
        save_effects(run, study)
    assert run.evidence.has(TABLE)
    remove_effects(run)
    assert not run.evidence.has(TABLE) and not run.evidence.path("receipts", "steering").exists()
    assert read_feature_rows(run.evidence, run.spec.name, active_fraction=0.25).num_features == 96
