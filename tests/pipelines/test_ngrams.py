"""N-grams: the trie against brute force, planted causes found, real runs explained from train rows alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeql.pipelines import ModelConfig, Run, capture, load_model
from saeql.pipelines.explainers.ngrams import NGramExplainer, NGramsConfig, _Causes, _Examples, _greedy
from saeql.pipelines.feature_values import FeatureValues
from saeql.pipelines.ngram_trie import NgramTrie, TokenIndex, trimmed
from saeql.pipelines.predicates import NGrams, Predicate
from saeql.pipelines.split_rows import FeatureRows, read_feature_rows, read_token_ids
from saeql.pipelines.token_classes import RowTable
from saeql.sae.architectures import build
from saeql.sae.config import DictionaryConfig

WINDOWS = [
    ["<s>", " in", " the", " United", " States", ",", " the", " old", " States"],
    ["<s>", " United", " the", " States", " the"],
]


def brute_force(patterns, windows: list[list[str]]) -> set[tuple[int, int]]:
    """(window, position) of every row that one of the patterns ends on, read off the texts."""
    found = set()
    for w, texts in enumerate(windows):
        for p in range(len(texts)):
            for pattern in patterns:
                context = texts[max(0, p + 1 - len(pattern)) : p + 1]
                if len(context) == len(pattern) and all(a in (None, b) for a, b in zip(pattern, context, strict=True)):
                    found.add((w, p))
    return found


def test_a_trie_holds_where_its_patterns_end():
    rng = np.random.default_rng(0)
    texts = [" a", " b", " c", "."]
    windows = [[texts[i] for i in rng.integers(0, 4, rng.integers(1, 12))] for _ in range(40)]
    table = RowTable.from_texts(windows)
    for _ in range(60):
        drawn = [rng.integers(0, 5, rng.integers(1, 5)) for _ in range(rng.integers(1, 6))]
        patterns = {trimmed([[*texts, None][i] for i in one]) for one in drawn} - {()}
        if not patterns:
            continue
        held = NgramTrie(patterns).rows(table)
        assert {(int(w), int(p)) for w, p in np.argwhere(held)} == brute_force(patterns, windows)
        by_index = NgramTrie(patterns).matches(table, TokenIndex(table))
        assert np.array_equal(by_index, np.flatnonzero(held.ravel()))


@pytest.mark.parametrize(
    ("patterns", "label", "kind", "holds"),
    [
        (((" United", " States"),), 'n-gram " United" " States"', "structural", [(0, 4)]),
        (((" the", None),), 'n-gram " the" *', "structural", [(0, 3), (0, 7), (1, 3)]),
        (((" the", None, " States"),), 'n-gram " the" * " States"', "structural", [(0, 4), (0, 8)]),
        (((" old",), (",",)), 'n-grams " old" | ","', "lexical", [(0, 5), (0, 7)]),
        (((" unseen", " States"), (" in",)), 'n-grams " unseen" " States" | " in"', "structural", [(0, 1)]),
        (tuple((f"{i}",) for i in range(8)), 'n-grams "0" | "1" | "2" | "3" | "4" | "5" or 2 more', "lexical", []),
    ],
)
def test_n_grams_as_a_predicate(patterns, label, kind, holds):
    predicate = NGrams(patterns)
    assert [(int(w), int(p)) for w, p in np.argwhere(predicate.rows(RowTable.from_texts(WINDOWS)))] == holds
    assert (predicate.describe(), predicate.kind) == (label, kind)
    again = Predicate.from_json(predicate.to_json())
    assert again == predicate and hash(again) == hash(predicate) and again.to_json() == predicate.to_json()
    assert predicate.complexity > NGrams(patterns[:1]).complexity or len(patterns) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type":"ngrams","patterns":[]}', "non-empty list of patterns"),
        ('{"type":"ngrams","patterns":[[]]}', "non-empty list of token texts"),
        ('{"type":"ngrams","patterns":[["a",3]]}', "non-empty list of token texts"),
        ('{"type":"ngrams","patterns":[[null,"a"]]}', "must not begin with a wildcard"),
        ('{"type":"ngrams","patterns":[["a"],["a"]]}', "name a pattern twice"),
    ],
)
def test_what_is_no_pattern_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        Predicate.from_json(text)


class _Rule:
    """Activations by a rule on the text, in place of a model: what caused them is known."""

    def __init__(self, rules):
        self.rules = rules

    def read(self, sequences, features, positions=None):
        return np.array([self.rules[f](s.tolist()) for s, f in zip(sequences, features, strict=True)], np.float32)


def test_planted_causes_are_found():
    """Feature 0 fires on token 7, 1 on 5 after 4, 2 two tokens after 9 whatever stands there, 3 on the 12th token."""
    rules = [
        lambda s: 4.0 * (s[-1] == 7),
        lambda s: 4.0 * (s[-2:] == [4, 5]) + 1.0 * (s[-1] == 5),
        lambda s: 3.0 * (len(s) > 3 and s[-3] == 9),
        lambda s: 3.0 * (len(s) >= 12),
    ]
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 12, (50, 16)).astype(np.int32)
    ids[:, 0] = 0
    cells = [(w, p) for w in range(50) for p in range(3, 16)]
    places = [(f, w, p) for f, rule in enumerate(rules) for w, p in cells if rule(ids[w, : p + 1].tolist()) > 2]
    features = np.array([f for f, _, _ in places])
    rows = np.array([w * 16 + p for _, w, p in places])
    values = np.array([rules[f](ids[w, : p + 1].tolist()) for f, w, p in places], np.float32)
    table = RowTable.from_texts([[f"t{i}" for i in row] for row in ids.tolist()])
    train = type("Train", (), {"windows": table})()
    config = NGramsConfig(max_context=8, replacements=3)
    found = _Causes(_Rule(rules), ids, config).patterns(train, _Examples(features, rows, values), None)  # pyright: ignore
    assert found == {0: [("t7",)], 1: [("t4", "t5")], 2: [("t9", None, None)]}


def test_the_union_with_the_best_f1_is_taken():
    active = np.zeros(100, bool)
    active[:20] = True
    pool = [
        (("a",), np.arange(12)),
        (("b",), np.arange(8, 16)),
        (("c",), np.arange(10, 90)),
        (("d",), np.arange(16, 19)),
    ]
    room = np.zeros(100, bool)
    assert list(_greedy(pool, active, room, 20, 10)) == [("a",), ("b",), ("d",)]
    assert list(_greedy(pool, active, room, 20, 2)) == [("a",), ("b",)]
    assert not room.any()


# --- on real models --------------------------------------------------------------------------------------------------


def test_values_are_those_of_one_sequence_at_a_time(tiny_run: Path):
    run, rng = Run.open(tiny_run), np.random.default_rng(0)
    lm, dictionary = run.language_model, run.dictionary()
    sequences = [rng.integers(3, 40, n).astype(np.int32) for n in (3, 9, 3, 5, 9)]
    sequences.append(sequences[1])
    expected = []
    with torch.no_grad(), capture(lm.model, ["resid_post.1"]) as reader:
        for sequence in sequences:
            rows = reader.run(torch.from_numpy(sequence).long()[None])["resid_post.1"][0].float()
            latents = dictionary.encode(rows)
            dense = torch.zeros(len(rows), dictionary.d_sae).scatter_(1, latents.indices.long(), latents.values)
            expected.append(dense.numpy())
    features = np.array([int(e[-1].argmax()) for e in expected])
    with FeatureValues.of(run, batch_tokens=16) as values:
        last = values.read(sequences, features)
        first = values.read(sequences, features, np.ones(len(sequences), np.int64))
        assert values.num_tokens == 2 * (3 + 9 + 3 + 5 + 9)  # the repeated one is run once
    np.testing.assert_allclose(last, [e[-1, f] for e, f in zip(expected, features, strict=True)], rtol=1e-4)
    np.testing.assert_allclose(first, [e[1, f] for e, f in zip(expected, features, strict=True)], rtol=1e-4, atol=1e-6)
    assert (last > 0).all()


def test_a_crosscoder_reads_its_places_side_by_side(tiny_run: Path):
    lm, reads = Run.open(tiny_run).language_model, ["mlp_out.1", "resid_post.0"]
    dictionary = build(DictionaryConfig(architecture="topk", form="crosscoder", d_sae=64, k=6), 64, 64, seed=1)
    ids = np.array([1, 7, 9, 12], np.int32)
    with torch.no_grad(), capture(lm.model, reads) as reader:
        acts = reader.run(torch.from_numpy(ids).long()[None])
        latents = dictionary.encode(torch.cat([acts[name][0, -1:] for name in reads], dim=-1).float())
    with FeatureValues(lm, dictionary, reads, 64) as values:
        found = values.read([ids] * 6, latents.indices[0].numpy())
    np.testing.assert_allclose(found, latents.values[0].detach(), rtol=1e-4)


def feature_rows(run: Run) -> FeatureRows:
    return read_feature_rows(run.evidence, run.spec.name, active_fraction=0.25)


def test_features_of_one_token_are_explained_by_it(token_run: Path):
    run = Run.open(token_run)
    rows, texts = feature_rows(run), run.language_model.token_texts(list(range(3, 45)))
    alive = [f for f in range(42) if rows.train.active.counts[f] > 0]
    assert len(alive) > 30
    explainer = NGramExplainer(run, NGramsConfig(examples=4))
    found = explainer.propose(rows, alive)
    assert {f: [c.predicate for c in own] for f, own in found.items()} == {f: [NGrams(((texts[f],),))] for f in alive}
    assert all(c.kind == "lexical" and c.explainer == "ngrams" for own in found.values() for c in own)
    assert explainer.num_tokens == 2 * len(alive)  # every token was run once, behind the window's first


def test_proposals_read_train_rows_only_and_hold_on_them(tiny_run: Path):
    run = Run.open(tiny_run)
    rows, steps = feature_rows(run), []
    features = [int(f) for f in np.argsort(-rows.train.active.counts)[:12]]
    config = NGramsConfig(examples=4, max_context=4)
    found = NGramExplainer(run, config).propose(rows, features, lambda done, total: steps.append((done, total)))
    poisoned = replace(rows, calibration=None, test=None)  # pyright: ignore[reportArgumentType]
    assert NGramExplainer(run, config).propose(poisoned, features) == found
    assert found and steps[-1] == (5, 5)
    for feature, own in found.items():
        mine = rows.train.active.by_feature()[feature]
        for candidate in own:
            assert candidate.predicate is not None
            assert candidate.label == candidate.predicate.describe()
            assert candidate.predicate.rows(rows.train.windows).ravel()[mine].any()


def test_token_ids_are_those_of_the_split(tiny_run: Path):
    run = Run.open(tiny_run)
    rows = feature_rows(run)
    ids, texts = read_token_ids(run.evidence, rows.test), rows.test.windows.vocabulary.texts
    assert ids.shape == rows.test.windows.tokens.shape
    shown = run.language_model.token_texts(ids[0].tolist())
    assert shown == [texts[t] for t in rows.test.windows.tokens[0]]


def test_an_encoder_is_refused(token_run: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run.open(token_run)
    encoder = load_model(ModelConfig(name=str(tiny_encoder), hook_point="resid_pre.0", dtype="float32"))
    encoder.identity = run.language_model.identity  # as if the run had been made on it
    monkeypatch.setattr(run, "reading_model", lambda: encoder)
    with pytest.raises(ValueError, match=r"is an encoder, which reads what follows too"):
        NGramExplainer.of(run).propose(feature_rows(run), [3])


@pytest.mark.parametrize(("key", "value"), [("examples", 0), ("keep", 0.0), ("min_salience", 1.5), ("max_context", 0)])
def test_wrong_settings_are_named(key: str, value: Any):
    with pytest.raises(ValueError, match=f"ngrams.{key} must be"):
        NGramsConfig(**{key: value})
