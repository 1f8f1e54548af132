"""Output labels: what is read off directions and what adding them does, against plain computations and plants."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeql.pipelines import Run, edit
from saeql.pipelines.explainers.base import Candidate
from saeql.pipelines.explainers.output import OutputConfig, OutputExplainer
from saeql.pipelines.lens_statistics import chance, coherence, frequent_tokens, lens_statistics
from saeql.pipelines.models import load_model
from saeql.pipelines.output_effects import WritePlace, direction_effects
from saeql.pipelines.output_labels import TokenTexts, raised_texts, raises_label
from saeql.pipelines.receipts.control import Labelled
from saeql.pipelines.receipts.intervention import InterventionConfig, OutputIntervention
from saeql.pipelines.split_rows import FeatureRows, read_feature_rows

FAMILIES = {
    "water": [" river", " bank", " water", " stone", " green"],
    "time": [" seven", " runs", " house", " walking"],
}


@pytest.mark.parametrize("texts", [[" of", " the"], ['"', ", ", "\n"], ["\u202e", "a\\", "é"]])
def test_a_label_gives_its_tokens_back(texts: list[str]):
    assert raised_texts(raises_label(texts)) == texts


@pytest.mark.parametrize("label", ['token " of"', "raises", 'raises " of', 'raises " of" " the"', "raises of"])
def test_another_label_is_refused(label: str):
    with pytest.raises(ValueError, match="not a label of tokens"):
        raised_texts(label)


def test_chance_counts_the_null_and_itself():
    assert chance(np.array([5.0, 2.0, 0.0]), np.array([1.0, 2.0, 3.0])).tolist() == [0.25, 0.75, 1.0]


def feature_rows(run: Run) -> FeatureRows:
    return read_feature_rows(run.evidence, run.spec.name, active_fraction=0.25)


def windows_of(run: Run, num: int) -> np.ndarray:
    return np.array(run.evidence.read("windows", split="test")["token_ids"].to_pylist()[:num], np.int32)[:, :12]


@pytest.mark.parametrize("hook_point", ["resid_post.1", "mlp_out.1", "resid_pre.0"])
def test_effects_are_those_of_a_plain_forward_pass(hook_point: str, tiny_run: Path):
    lm = Run.open(tiny_run).language_model
    place = WritePlace(lm, {hook_point: 32}, {hook_point: 0.7})
    windows, directions, sets = windows_of(Run.open(tiny_run), 5), place.random_directions(3, 1), [[5], [7, 9, 11]]
    found = direction_effects(place, directions, windows, sets, strength=0.5, num_risen=4, batch_windows=2)
    ids = torch.from_numpy(windows).long()
    with torch.no_grad():
        before = lm.model(ids).logits[:, 1:].log_softmax(-1)
        for i, direction in enumerate(directions):
            offset = 0.5 * 0.7 * direction / direction.norm()
            with edit(lm.model, hook_point, lambda acts, offset=offset: acts + offset):
                after = lm.model(ids).logits[:, 1:].log_softmax(-1)
            for s, tokens in enumerate(sets):
                moved = after[..., tokens].exp().sum(-1).log() - before[..., tokens].exp().sum(-1).log()
                np.testing.assert_allclose(found.shifts[i, s], moved.mean(1), atol=2e-5)
            kl = (before.exp() * (before - after)).sum(-1).mean(1)
            np.testing.assert_allclose(found.kl[i], kl, atol=2e-5)
            rise = (after.exp() - before.exp()).mean((0, 1)).topk(4)
            assert found.risen[i].tolist() == rise.indices.tolist()
            np.testing.assert_allclose(found.rise[i], rise.values, atol=1e-6)


def test_a_crosscoder_adds_each_part_at_its_place(tiny_run: Path):
    lm = Run.open(tiny_run).language_model
    norms = {"mlp_out.0": 2.0, "resid_post.1": 3.0}
    place = WritePlace(lm, dict.fromkeys(norms, 32), norms)
    offsets = place.offsets(torch.arange(64).float(), 0.5)
    for start, (name, norm) in zip((0, 32), norms.items(), strict=True):
        part = torch.arange(start, start + 32).float()
        torch.testing.assert_close(offsets[name], 0.5 * norm * part / part.norm())
    found = direction_effects(
        place, torch.arange(64).float()[None], windows_of(Run.open(tiny_run), 2), [], strength=0.5
    )
    assert found.shifts.shape == (1, 0, 2) and (found.kl > 0).all()


def test_windows_without_a_prediction_are_refused(tiny_run: Path):
    place = WritePlace(Run.open(tiny_run).language_model, {"resid_post.1": 32}, {"resid_post.1": 1.0})
    with pytest.raises(ValueError, match=r"T of at least 2"):
        direction_effects(place, torch.ones(1, 32), np.ones((2, 1), np.int32), [], strength=1.0)


def test_lens_statistics_are_the_textbooks(tiny_run: Path):
    lm = Run.open(tiny_run).language_model
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    among = np.setdiff1d(np.arange(200), [50, 51])
    found = lens_statistics(directions, lm, 4, among)
    with torch.no_grad():
        logits = lm.model.lm_head(lm.model.model.norm(directions)).double().numpy()
        rows = lm.model.get_input_embeddings().weight.double().numpy()
    rows = rows - rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for i, row in enumerate(logits[:, among]):
        p = np.exp(row) / np.exp(row).sum()
        assert found.entropy[i] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
        assert found.kurtosis[i] == pytest.approx(((row - row.mean()) ** 4).mean() / row.var() ** 2, rel=1e-4)
        top = among[np.argsort(-row)[:4]]
        assert found.top[i].tolist() == top.tolist()
        pairs = [rows[a] @ rows[b] for n, a in enumerate(top) for b in top[:n]]
        near = [np.sort(rows[among] @ rows[t])[::-1][1:11].mean() for t in top]
        assert found.coherence[i] == pytest.approx(np.mean(pairs) - np.mean(near), abs=1e-5)
    same, other = coherence(lm, np.array([[7, 7], [7, 9]]), among)
    assert same > other
    with pytest.raises(ValueError, match="lists of 4 tokens cannot be drawn from the 3"):
        lens_statistics(directions, lm, 4, among[:3])
    assert frequent_tokens(np.array([[5, 7, 5], [9, -1, 7]]), 2).tolist() == [5, 7]


# --- planted families of tokens --------------------------------------------------------------------------------------


@pytest.fixture
def planted(token_run: Path) -> tuple[Run, dict[str, int], dict[str, list[int]]]:
    """A run on a model in which words of a family share embedding and logits; a feature writes the logits of each.

    Returns the run, the feature of each family and the ids of the family's words.
    """
    run = Run.open(token_run)
    lm, dictionary = run.language_model, run.dictionary()
    ids = {
        name: [lm.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in own] for name, own in FAMILIES.items()
    }
    features = {"water": 2, "time": 5}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(8)  # so that a random direction meets other tokens too
        for name, own in ids.items():
            shared = torch.nn.functional.normalize(torch.randn(2, 32, generator=generator), dim=1)
            lm.model.get_input_embeddings().weight[own] += 0.4 * shared[0]
            lm.model.get_output_embeddings().weight[own] += 1.0 * shared[1]
            dictionary.W_dec[features[name]] = shared[1]
    run.dictionary = lambda: dictionary  # type: ignore[method-assign]
    return run, features, ids


def test_both_lists_name_the_planted_family(planted):
    run, features, ids = planted
    config = OutputConfig(list_tokens=4, label_tokens=4, random_directions=64, change_windows=4, change_tokens=12)
    lists = OutputExplainer(run, config).lists(feature_rows(run), list(features.values()))
    for name, feature in features.items():
        change, lens = lists[feature]
        assert (change.explainer, lens.explainer) == ("output-change", "output-lens")
        assert set(lens.tokens.tolist()) <= set(ids[name]) and set(change.tokens.tolist()) <= set(ids[name])
        assert lens.chance <= 2 / 65 and change.chance <= 2 / 33
    proposed = OutputExplainer(run, config).propose(feature_rows(run), [features["time"], 30])
    (first, *_) = proposed[features["time"]]
    assert first.kind == "output" and set(raised_texts(first.label)) <= set(FAMILIES["time"])
    assert 30 not in proposed, "a direction of one token of a random model has no coherent list"


def test_a_label_is_tested_on_words_that_it_was_not_read_from(planted):
    run, _, ids = planted
    texts = TokenTexts(run.language_model)
    own, read = ids["water"][:2], ids["water"][2:3]
    every = np.arange(len(texts.texts))
    found = texts.related(own, read, 2, every)
    assert {texts.texts[i] for i in found} == {" stone", " green"}
    assert texts.words[ids["water"][0]] not in {texts.words[i] for i in texts.related(own, read, 30, every)}
    assert texts.related(own, read, 2, np.array([ids["time"][0]])) == [ids["time"][0]]


def test_only_what_moves_the_meaning_passes(planted):
    run, features, _ = planted
    rows = feature_rows(run)
    water, wrong = Candidate(raises_label([" river", " bank"]), "output", "output-lens"), features["time"]
    labels = {features["water"]: water, wrong: water}
    config = InterventionConfig(
        max_features=2, windows=6, window_tokens=12, related_tokens=2, num_bootstrap=200, strength=1.0
    )
    run.config = replace(run.config, output_labels=OutputConfig(list_tokens=2, label_tokens=2, random_directions=16))
    whole, *receipts = OutputIntervention(run, config).check(Labelled(run, rows, labels, {}, "full"))
    by_feature = {r.feature: r for r in receipts}
    right = by_feature[features["water"]]
    assert right.verdict == "passed" and right.value is not None and right.value > 3 and right.n == 6 * 11
    assert right.low is not None and right.high is not None and right.low <= right.value <= right.high
    assert set(right.detail["tokens"]) <= {" water", " stone", " green"} and right.detail["shift"] > 0.2
    assert right.detail["lens"]["coherence_p"] < 0.5
    assert by_feature[wrong].verdict == "failed" and (by_feature[wrong].value or 0) < 3
    assert whole.feature is None and whole.value == 0.5 and whole.verdict == "reported"


def test_without_output_labels_the_lens_is_asked(planted):
    run, features, _ = planted
    run.config = replace(
        run.config,
        output_labels=OutputConfig(list_tokens=3, label_tokens=3, random_directions=64),
        intervention=InterventionConfig(max_features=3, windows=2, window_tokens=8, num_bootstrap=50),
    )
    receipts = OutputIntervention.of(run).check(Labelled(run, feature_rows(run), {}, {}, "full"))
    assert {features["water"], features["time"]} & {r.feature for r in receipts}
    assert all(r.detail["label"].startswith("raises ") for r in receipts if r.feature is not None)


def test_an_encoder_has_no_output(token_run: Path, tiny_encoder: Path):
    from saeql.pipelines import ModelConfig

    run = Run.open(token_run)
    run.language_model = load_model(ModelConfig(name=str(tiny_encoder), hook_point="resid_pre.0", dtype="float32"))
    for made in (OutputExplainer.of(run).lists, OutputIntervention.of(run).check):
        with pytest.raises(ValueError, match="is an encoder: it predicts no next token"):
            if made.__name__ == "lists":
                made(feature_rows(run), [1])  # type: ignore[call-arg]
            else:
                made(Labelled(run, feature_rows(run), {}, {}, "full"))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (OutputConfig, {"label_tokens": 20}, "output_labels.list_tokens"),
        (OutputConfig, {"change_tokens": 1}, "output_labels.change_tokens"),
        (InterventionConfig, {"random_directions": 1}, "intervention.random_directions"),
        (InterventionConfig, {"windows": 0}, "intervention.windows"),
    ],
)
def test_wrong_settings_are_named(make, keys, message):
    with pytest.raises(ValueError, match=message):
        make(**keys)
