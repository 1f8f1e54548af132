"""The labeller on planted features: names what fires for a reason, abstains on what does not, and never reads ahead."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from saeql.pipelines.explainers.base import Candidate
from saeql.pipelines.label import label_dictionary, write_labels
from saeql.pipelines.label_candidates import CandidateLimits, propose
from saeql.pipelines.label_config import LabelConfig
from saeql.pipelines.predicate_scores import auroc_of_counts, interval_of_counts
from saeql.pipelines.predicates import (
    Affix,
    Both,
    Either,
    Neighbour,
    Not,
    Predicate,
    Recent,
    Stems,
    Token,
    TokenClass,
    TokenSet,
)
from saeql.pipelines.receipts.token_baseline import is_about_the_token
from saeql.pipelines.split_rows import ActiveRows
from saeql.pipelines.token_classes import RowTable
from saeql.store.evidence import Evidence, EvidenceError
from saeql.store.records import LABELS

sys.path.insert(0, str(Path(__file__).parent))
import synthetic_evidence as synthetic

CONFIG = LabelConfig()
SCORES = ("auroc", "auroc_low", "auroc_high", "precision", "recall", "f1", "calibration_f1")

EXPECTED = {
    "token": Token(" river"),
    "stem": Stems(("walk",)),
    "suffix": Affix("suffix", "ing"),
    "number": TokenClass("number"),
    "after the": Neighbour(-1, Token(" the")),
    "capitalised": TokenClass("capitalised"),
    "pair": Both(Token(" bank"), Neighbour(-1, Token(" river"))),
    "comma after number": Both(Token(","), Neighbour(-1, TokenClass("number"))),
}


def labels_of(evidence: Evidence, config: LabelConfig = CONFIG) -> list[dict]:
    return label_dictionary(evidence, dictionary=synthetic.DICTIONARY, config=config).to_pylist()


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Evidence:
    return synthetic.build(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def labels(planted) -> list[dict]:
    return labels_of(planted)


def test_one_row_a_feature_in_the_schema_of_the_store(planted):
    table = label_dictionary(planted, dictionary=synthetic.DICTIONARY, config=CONFIG)
    assert table.schema.equals(LABELS)
    assert table["feature"].to_pylist() == list(range(synthetic.NUM_FEATURES))


@pytest.mark.parametrize("name", EXPECTED)
def test_planted_features_are_named(labels, name):
    row = labels[synthetic.feature(name)]
    assert Predicate.from_json(row["predicate"]) == EXPECTED[name]
    assert row["label"] == EXPECTED[name].describe() and row["kind"] == EXPECTED[name].kind
    assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
    # 3 % of the plant's rows are silent, 0.05 % of the others fire.
    assert row["auroc"] > 0.97 and row["precision"] > 0.93 and row["recall"] > 0.93


def test_a_set_of_tokens_is_named(labels):
    predicate = Predicate.from_json(labels[synthetic.feature("set")]["predicate"])
    assert isinstance(predicate, TokenSet)
    assert set(predicate.texts) == {" man", " year", ";", " day"}


def test_random_and_dead_features_stay_unexplained(labels):
    for feature in (*synthetic.RANDOM, synthetic.DEAD):
        row = labels[feature]
        assert (row["label"], row["kind"], row["predicate"]) == ("unexplained", "none", None)
        assert all(row[name] is None for name in SCORES)
        assert (row["n_active"] > 0) == (feature != synthetic.DEAD)


def test_shuffled_positions_leave_nothing_to_explain(tmp_path):
    evidence = synthetic.build(tmp_path, change=lambda split, ids, acts, rng: synthetic.shuffled(rng, acts))
    assert {row["label"] for row in labels_of(evidence)} == {"unexplained"}
    # With the thresholds off, what is still "named" must be worthless on test.
    loose = labels_of(evidence, LabelConfig(min_f1=0.0, min_lift=0.0, min_hits=1))
    auroc = [row["auroc"] for row in loose if row["auroc"] is not None]
    assert len(auroc) > 20
    assert abs(np.mean(auroc) - 0.5) < 0.02
    covered = [r["auroc_low"] <= 0.5 <= r["auroc_high"] for r in loose if r["auroc_low"] is not None]
    assert np.mean(covered) > 0.85


def _break_on_test(split, ids, acts, rng):
    return synthetic.shuffled(rng, acts) if split == "test" else acts


def test_test_activations_change_scores_and_nothing_else(tmp_path, labels):
    broken = labels_of(synthetic.build(tmp_path, change=_break_on_test))
    for before, after in zip(labels, broken, strict=True):
        for name in ("label", "kind", "predicate", "calibration_f1", "n_active"):
            assert before[name] == after[name]
    for name in EXPECTED:
        row = broken[synthetic.feature(name)]
        assert abs(row["auroc"] - 0.5) < 0.06, name  # a label that fails on test shows it
        assert row["f1"] < 0.2


def test_a_label_without_active_test_rows_is_taken_back(tmp_path):
    def silence(split, ids, acts, rng):
        return acts * (0 if split == "test" else 1)

    for row in labels_of(synthetic.build(tmp_path, change=silence)):
        assert (row["label"], row["n_active"]) == ("unexplained", 0)
        assert all(row[name] is None for name in SCORES)
        assert row["n_inactive"] > 0


def test_the_threshold_of_active_comes_from_train(tmp_path, labels):
    # Stronger activations on calibration and test only: the same tau, so the same rows are active.
    def louder(split, ids, acts, rng):
        return np.where(acts > 3, acts * (1 if split == "train" else 10), acts)

    louder_labels = labels_of(synthetic.build(tmp_path, change=louder))
    for feature in range(len(synthetic.PLANTS)):
        assert louder_labels[feature] == labels[feature]


def test_scores_are_those_of_the_stored_predicate(planted, labels):
    """Recompute one row's scores from the files with nothing but the predicate's JSON."""
    row = labels[synthetic.feature("suffix")]
    texts = dict(zip(*(planted.read("vocabulary")[c].to_pylist() for c in ("token_id", "token")), strict=True))
    table = planted.read("windows", split="test")
    windows = [[texts[i] for i in ids] for ids in table["token_ids"].to_pylist()]
    rows = Predicate.from_json(row["predicate"]).rows(RowTable.from_texts(windows))
    peak, active = 0.0, np.zeros_like(rows)
    first = min(table["window_id"].to_pylist())
    for split in ("train", "test"):
        for r in planted.read("activations", split=split).to_pylist():
            if r["feature"] == row["feature"]:
                if split == "train":
                    peak = max(peak, r["activation"])
                elif r["activation"] > CONFIG.active_fraction * peak:
                    active[r["window_id"] - first, r["position"]] = True
    rows, active = rows[:, 1:], active[:, 1:]
    tpr, fpr = rows[active].mean(), rows[~active].mean()
    assert row["auroc"] == pytest.approx((tpr + 1 - fpr) / 2, abs=1e-6)
    assert row["recall"] == pytest.approx(tpr, abs=1e-6)
    assert row["precision"] == pytest.approx(active[rows].mean(), abs=1e-6)
    assert (row["n_active"], row["n_inactive"]) == (active.sum(), (~active).sum())


def test_two_runs_are_equal_and_progress_reaches_its_end(planted, labels):
    seen: list[tuple[int, int]] = []
    again = label_dictionary(
        planted,
        dictionary=synthetic.DICTIONARY,
        config=CONFIG,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert again.to_pylist() == labels
    assert seen and seen[-1][0] == seen[-1][1]


def test_write_labels_writes_what_it_returns(planted, labels):
    table = write_labels(planted, dictionaries=[synthetic.DICTIONARY], config=CONFIG)
    assert planted.read("labels").to_pylist() == table.to_pylist() == labels


def test_unknown_dictionaries_and_broken_evidence_are_refused(planted, tmp_path):
    with pytest.raises(EvidenceError, match="planted"):
        label_dictionary(planted, dictionary="other", config=CONFIG)
    evidence = synthetic.build(tmp_path)
    evidence.write("activations", evidence.read("activations", split="test"), part="test-again")
    with pytest.raises(EvidenceError, match="twice"):
        labels_of(evidence)
    evidence.path("activations", "test-again").unlink()
    evidence.write("windows", evidence.read("windows").slice(1))
    with pytest.raises(EvidenceError, match="window"):
        labels_of(evidence)


def test_config_refuses_nonsense():
    with pytest.raises(ValueError, match="active_fraction"):
        LabelConfig(active_fraction=1.0)
    with pytest.raises(ValueError, match="num_bootstrap"):
        LabelConfig(num_bootstrap=0)
    with pytest.raises(ValueError, match="max_set_size"):
        LabelConfig(max_set_size=1)


def test_auroc_in_closed_form():
    counts = np.array([[5, 0, 0, 95], [0, 0, 5, 95], [5, 95, 0, 0], [3, 10, 2, 85], [0, 3, 0, 97]], float)
    expected = [1.0, 0.5, 0.5, (0.6 + 85 / 95) / 2, np.nan]
    np.testing.assert_allclose(auroc_of_counts(counts), expected)


def test_the_interval_is_over_documents():
    rng = np.random.default_rng(0)
    tp = np.where(rng.random(40) < 0.8, 10, 0)  # documents differ far more than rows do
    spread = np.stack([tp, np.full(40, 5), 10 - tp, np.full(40, 85)], axis=1).astype(float)
    one_document = np.zeros_like(spread)
    one_document[0], one_document[1:, 3] = [8, 5, 2, 85], 100
    low, high = interval_of_counts(np.stack([spread, one_document]), LabelConfig(num_bootstrap=2000))
    tpr = tp / 10
    half_width = 1.96 * tpr.std() / np.sqrt(40) / 2  # the false positive rate does not vary here
    centre = (tpr.mean() + 85 / 90) / 2
    assert low[0] == pytest.approx(centre - half_width, abs=0.012)
    assert high[0] == pytest.approx(centre + half_width, abs=0.012)
    assert np.isnan(low[1]) and np.isnan(high[1])


def test_a_label_that_never_holds_is_not_surely_below_chance():
    counts = np.tile(np.array([0.0, 3, 4, 93]), (1, 10, 1))  # no hit on 40 active rows
    low, high = interval_of_counts(counts, CONFIG)
    assert low[0] == pytest.approx(93 / 96 / 2) and high[0] > 0.5


def test_a_class_of_neighbours_is_counted_over_tokens_however_rare():
    rng = np.random.default_rng(4)
    kinds = rng.integers(0, 3, (40, 12))
    texts = [[(f" {30000 + 12 * w + i}", " the", " run")[k] for i, k in enumerate(row)] for w, row in enumerate(kinds)]
    windows = RowTable.from_texts(texts)  # every number stands there once
    after = np.zeros(kinds.shape, bool)
    after[:, 1:] = kinds[:, :-1] == 0
    eligible = (np.arange(12) > 0)[None].repeat(40, 0).ravel()
    rows = np.flatnonzero(after.ravel()).astype(np.int32)
    active = ActiveRows(np.zeros(len(rows), np.int32), rows, np.ones(len(rows), np.float32), 1)
    limits = CandidateLimits(min_hits=3, min_lift=1.5, min_f1=0.5, max_candidates=10, max_set_size=4)
    assert propose(windows, active, eligible, limits)[0][0] == Neighbour(-1, TokenClass("number"))


def test_counted_candidates_agree_with_executed_predicates():
    """F1 by counting equals F1 by running the predicate: every candidate of random data reaches the stated minimum."""
    rng = np.random.default_rng(3)
    texts = [" the", " run", " running", ",", " 5", "ing", " Paris", "\n"]
    windows = RowTable.from_texts([[texts[i] for i in row] for row in rng.integers(0, len(texts), (30, 11))])
    eligible = (np.arange(11) > 0)[None].repeat(30, 0).ravel()
    rows = [np.flatnonzero(eligible & (rng.random(330) < p)) for p in (0.1, 0.3, 0.6)]
    features = np.repeat(np.arange(3), [len(r) for r in rows]).astype(np.int32)
    active = ActiveRows(features, np.concatenate(rows).astype(np.int32), np.ones(len(features), np.float32), 3)
    limits = CandidateLimits(min_hits=2, min_lift=0.0, min_f1=0.1, max_candidates=1000, max_set_size=4)
    proposed = propose(windows, active, eligible, limits)
    assert min(len(p) for p in proposed) > 20
    for own, candidates in zip(rows, proposed, strict=True):
        f1 = []
        for predicate in candidates:
            holds = predicate.rows(windows).ravel() & eligible
            assert holds[own].sum() >= 2, predicate
            f1.append(2 * holds[own].sum() / (len(own) + holds.sum()))
        assert min(f1) >= 0.1
        exact = [f for f, p in zip(f1, candidates, strict=True) if not isinstance(p, Recent)]
        assert len(exact) < len(f1) and exact == sorted(exact, reverse=True)


def test_a_token_with_its_context_is_about_the_token():
    token, after = Token(" bank"), Neighbour(-1, Token(" river"))
    about = [token, Both(token, after), Both(token, Not(after)), Both(after, token), Either(token, TokenSet((" a",)))]
    beside = [after, Recent(Stems(("war",)), 4), Either(token, after), Not(token)]
    named = [Candidate(p.describe(), p.kind, "predicates", p) for p in (*about, *beside)]
    assert [is_about_the_token(label) for label in named] == [True] * len(about) + [False] * len(beside)


def test_context_is_named_where_the_token_alone_says_half(tmp_path):
    """Features of " the" by its neighbours, by what is not there, by a word before; and two things at once."""
    evidence = synthetic.build(tmp_path, change=_context_features)
    table = label_dictionary(evidence, dictionary=synthetic.DICTIONARY, config=CONFIG).to_pylist()
    texts = [table[feature]["label"] for feature in range(4)]
    assert texts[0].startswith('token " the" after one of "') and "not" not in texts[0], texts
    assert set(_texts(table[0], "second", "of")) == {" and", " of", " to"}
    assert texts[1].startswith('token " the" not after one of "'), texts
    assert set(_texts(table[1], "second", "of", "of")) <= set(_NEVER_AFTER)
    assert texts[2] == 'words with stem "walk" among the last 4 tokens', texts
    predicate = Predicate.from_json(table[3]["predicate"])
    assert isinstance(predicate, Either), texts
    assert {predicate.first, predicate.second} == {Token(" river"), Neighbour(-1, Token(" bank"))}
    assert all(row["f1"] > 0.9 for row in table[:4])


def _texts(row: dict, *path: str) -> list[str]:
    data = json.loads(row["predicate"])
    for key in path:
        data = data[key]
    return data["texts"]


_NEVER_AFTER = [" river", " bank", ",", ".", ";", *(str(n) for n in (3, 7, 12, 40, 99, 250, 1880, 1914, 1999, 2004))]


def _context_features(split, ids, acts, rng):
    texts = np.array(synthetic._lexicon()[0])[ids]
    before = np.concatenate([np.full((len(texts), 1), ""), texts[:, :-1]], axis=1)
    walks = np.char.startswith(np.char.strip(texts), "walk")
    recent = np.any([np.pad(walks, ((0, 0), (step, 0)))[:, : walks.shape[1]] for step in range(4)], axis=0)
    the = texts == " the"
    features: list[np.ndarray] = [
        the & np.isin(before, [" and", " of", " to"]),
        the & ~np.isin(before, _NEVER_AFTER),
        recent,
        (texts == " river") | (before == " bank"),
    ]
    for feature, fires in enumerate(features):
        fires[:, 0] = False
        acts[:, :, feature] = fires * rng.uniform(3, 8, fires.shape)
    return acts
