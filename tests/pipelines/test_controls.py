"""Every control lets what is right pass, and names what is wrong: leaks, judges that judge nothing, shuffled labels."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from saeql.pipelines.config import RunConfig
from saeql.pipelines.explainers.base import Candidate
from saeql.pipelines.explainers.predicates import PredicateExplainer
from saeql.pipelines.label import label_rows, labels_of
from saeql.pipelines.label_config import LabelConfig
from saeql.pipelines.predicates import Token, TokenClass, TokenSet
from saeql.pipelines.receipts import label_permutation
from saeql.pipelines.receipts.activation_range import ActivationRange
from saeql.pipelines.receipts.control import Labelled, ReceiptError
from saeql.pipelines.receipts.held_out import HeldOut
from saeql.pipelines.receipts.label_permutation import LabelPermutation
from saeql.pipelines.receipts.label_scorer import LabelScorer
from saeql.pipelines.receipts.metric_tests import MetricTests
from saeql.pipelines.receipts.negative_ladder import NegativeLadder
from saeql.pipelines.receipts.receipt import Receipt
from saeql.pipelines.receipts.registry import controls
from saeql.pipelines.receipts.sampler import SampleConfig, Sampler
from saeql.pipelines.receipts.scorer_health import ScorerHealth
from saeql.pipelines.receipts.split_hygiene import SplitHygiene
from saeql.pipelines.receipts.statistics import auroc
from saeql.pipelines.receipts.thresholds import THRESHOLDS
from saeql.pipelines.receipts.token_baseline import TokenBaseline
from saeql.pipelines.receipts.token_table import TokenTable, token_auroc, token_r2
from saeql.pipelines.receipts.true_null import TrueNull, null_rows
from saeql.pipelines.run import Run
from saeql.pipelines.split_rows import read_feature_rows

sys.path.insert(0, str(Path(__file__).parent))
import synthetic_evidence as synthetic

CONFIG = LabelConfig()


def planted(split: str, ids: np.ndarray, acts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The twenty features of random rows fire on one token each instead; the last of them strongly, else on numbers."""
    texts = synthetic._lexicon()[0]
    acts = acts.copy()
    for place, feature in enumerate(synthetic.RANDOM):
        on = ids == texts.index(f" {synthetic._FILLER[place]}")
        acts[:, :, feature] = on * rng.uniform(3, 8, ids.shape)
        acts[:, 0, feature] = 0
    numbers = np.isin(ids, [i for i, t in enumerate(texts) if t.isdigit()])
    acts[:, 1:, TOP_ONLY] += (numbers * rng.uniform(2.2, 2.8, ids.shape))[:, 1:]
    return acts


TOP_ONLY = synthetic.RANDOM[-1]
TOP_TOKEN = f" {synthetic._FILLER[len(synthetic.RANDOM) - 1]}"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Labelled:
    folder = tmp_path_factory.mktemp("controls")
    evidence = synthetic.build(folder / "evidence", change=planted)
    run = Run(folder, RunConfig())
    rows = read_feature_rows(evidence, synthetic.DICTIONARY, active_fraction=CONFIG.active_fraction)
    scorer, held_out = LabelScorer.of(run), HeldOut.of_evidence(rows, evidence, CONFIG)
    made = label_rows(rows, CONFIG, explainers=[PredicateExplainer(CONFIG)], scorer=scorer, held_out=held_out)
    examples = held_out.sample("test", range(rows.num_features))
    return Labelled(run, rows, labels_of(made), examples, "fast", scorer, held_out)


class Constant:
    """A judge that always says the same."""

    name: ClassVar[str] = "constant"

    def __init__(self, answer: float):
        self.answer = answer

    def score(self, labels, rows, split):
        return [np.full(len(own), self.answer) for own in rows]


def with_changes(labelled: Labelled, **changes) -> Labelled:
    return replace(labelled, **changes)


def of_features(receipts: Sequence[Receipt], control: str) -> dict[Any, Any]:
    return {r.feature: r for r in receipts if r.control == control and r.feature is not None}


def of_run(receipts: Sequence[Receipt], control: str) -> Any:
    (found,) = [r for r in receipts if r.control == control and r.feature is None]
    return found


# --- C0 --------------------------------------------------------------------------------------------------------------


def test_clean_splits_pass(labelled):
    documents, near, examples = SplitHygiene().check(labelled)
    assert (documents.verdict, documents.value, documents.n) == ("passed", 0, 100)
    assert (near.verdict, near.value) == ("passed", 0.0)
    assert examples.verdict == "passed" and examples.n > 1000


def test_examples_from_train_end_the_run(labelled):
    """A sampler that draws from train, and says that it is test."""
    train = replace(labelled.rows.train, split="test", weak=labelled.rows.train.active.where(np.zeros(0, int)))
    leaking = Sampler(train, SampleConfig()).sample([0, 1, 2])
    with pytest.raises(ReceiptError, match="examples of feature 0 hold a row that is not of the test split"):
        SplitHygiene().check(with_changes(labelled, examples=leaking))
    behind = np.arange(len(train.windows.tokens)) >= len(labelled.rows.test.windows.tokens)
    leaking = Sampler(train, SampleConfig(), left_out=behind).sample([0, 1, 2])  # rows that test has too, by number
    with pytest.raises(ReceiptError, match=r"C0 split hygiene: examples of feature 0 .*taken from train"):
        SplitHygiene().check(with_changes(labelled, examples=leaking))
    # windows that nearly repeat train are left out, so that a sampler that leaves them out finds nothing there
    assert HeldOut(replace(labelled.rows, test=train), SampleConfig()).sample("test", [0, 1, 2]) == {}
    calibration = labelled.source.sample("calibration", [5])
    with pytest.raises(ReceiptError, match="of split 'calibration', not of test"):
        SplitHygiene().check(with_changes(labelled, examples=calibration))


def test_a_negative_that_fires_ends_the_run(labelled):
    e = labelled.examples[3]
    wrong = replace(e, negatives={**e.negatives, "N0": labelled.rows.test.active.by_feature()[3][:2]})
    with pytest.raises(ReceiptError, match="feature 3: a negative of rung N0 is a row on which the feature fires"):
        SplitHygiene().check(with_changes(labelled, examples={3: wrong}))


def test_a_document_in_two_splits_ends_the_run(tmp_path):
    evidence = synthetic.build(tmp_path / "evidence")
    documents = evidence.read("documents").to_pylist()
    for number, row in enumerate(documents):
        row["sha256"] = f"hash {number}"
    documents[99]["sha256"] = documents[0]["sha256"]
    evidence.write("documents", pa.Table.from_pylist(documents, schema=evidence.read("documents").schema))
    from saeql.pipelines.receipts.split_hygiene import check_documents

    with pytest.raises(ReceiptError, match=r"document 99 .*is in the splits train and test"):
        check_documents(evidence)
    documents[99]["sha256"] = "another"
    evidence.write("documents", pa.Table.from_pylist(documents, schema=evidence.read("documents").schema))
    assert check_documents(evidence) == 100
    windows = evidence.read("windows").to_pylist()
    windows[-1]["document_ids"][-1] = 0
    evidence.write("windows", pa.Table.from_pylist(windows, schema=evidence.read("windows").schema))
    with pytest.raises(ReceiptError, match="windows of train and of test hold document 0"):
        check_documents(evidence)


def test_near_copies_of_train_are_left_out_and_their_share_is_said(labelled):
    rows = labelled.rows
    tokens = rows.test.windows.tokens.copy()
    tokens[:9] = rows.train.windows.tokens[3:12]
    tokens[:9, 40] = tokens[:9, 41]  # not letter by letter
    changed = replace(
        rows, test=replace(rows.test, windows=type(rows.test.windows)(rows.test.windows.vocabulary, tokens))
    )
    held_out = HeldOut(changed, SampleConfig())
    examples = held_out.sample("test", range(changed.num_features))
    assert min(e.active.min() for e in examples.values()) >= 9 * synthetic.CONTEXT
    near = SplitHygiene().check(with_changes(labelled, rows=changed, examples=examples, held_out=held_out))[1]
    assert near.value == pytest.approx(9 / near.n)
    with pytest.raises(ReceiptError, match="nearly repeats train"):
        SplitHygiene().check(with_changes(labelled, rows=changed, held_out=held_out))


# --- C1, C2 ----------------------------------------------------------------------------------------------------------


def test_metrics_are_checked_and_a_wrong_one_ends_the_run(labelled):
    (receipt,) = MetricTests().check(labelled)
    assert receipt.verdict == "passed" and receipt.n == len(MetricTests().checks) >= 12
    y = np.random.default_rng(0).normal(size=500) + 3
    part = y + np.random.default_rng(1).normal(size=500) * 0.3

    def uncentred() -> float:  # what a mean of 3 does to an explained variance about E[x^2]
        return float(((y - part) ** 2).mean() / (y**2).mean())

    right = float(((y - part) ** 2).mean() / y.var())
    with pytest.raises(ReceiptError, match="C1 metric self-tests: fvu after a shift"):
        MetricTests([("fvu after a shift", uncentred, right)]).check(labelled)
    with pytest.raises(ReceiptError, match="nan"):
        MetricTests([("AUROC of ties", lambda: float("nan"), 0.5)]).check(labelled)


def test_the_null_keeps_everything_but_the_places(labelled):
    rows = null_rows(labelled.rows, CONFIG)
    assert rows.num_features == synthetic.DEAD
    for split in ("train", "calibration", "test"):
        before, after = labelled.rows.of(split), rows.of(split)
        np.testing.assert_array_equal(after.active.counts, before.active.counts[: synthetic.DEAD])
        np.testing.assert_array_equal(np.sort(after.active.values), np.sort(before.active.values))
        assert after.eligible[after.active.rows].all()
        keys = after.active.features.astype(np.int64) * after.windows.tokens.size + after.active.rows
        assert (np.diff(keys) > 0).all()
        shared = np.intersect1d(after.active.by_feature()[3], before.active.by_feature()[3])
        assert len(shared) < 0.3 * len(before.active.by_feature()[3])


NULLS = ("labelled share", "mean", "significant")


def test_labels_of_nothing_score_half(labelled):
    receipts = TrueNull.of(labelled.run).check(labelled)
    share, mean, significant = (
        of_run(receipts, f"C2 true null {x}") for x in ("labelled share", "mean", "significant")
    )
    assert share.value == 0 and share.n == synthetic.DEAD
    assert mean.n > 20 and abs(mean.value - 0.5) < 0.05
    assert significant.value < 0.2
    assert {r.verdict for r in (share, mean, significant)} == {"reported"}  # 29 features are too few to judge by


# --- C3 --------------------------------------------------------------------------------------------------------------


def test_right_labels_beat_those_of_other_features(labelled):
    # "a number; or a token" fits numbers as well as "a number" does: one rival is too many for so few labels.
    labels = {f: label for f, label in labelled.labels.items() if f != TOP_ONLY}
    receipts = LabelPermutation().check(with_changes(labelled, labels=labels))
    found = of_features(receipts, "C3 label permutation")
    assert set(found) == set(labels)
    assert len(found) >= 28
    for feature in (synthetic.feature("token"), synthetic.feature("number"), *synthetic.RANDOM[:10]):
        assert found[feature].verdict == "passed"
        assert found[feature].value == pytest.approx(1 / (1 + found[feature].n))
    share = of_run(receipts, "C3 label permutation share")
    assert share.value == pytest.approx(sum(r.verdict == "passed" for r in found.values()) / synthetic.DEAD)


def test_shuffled_labels_fail(labelled):
    features = sorted(labelled.labels)
    moved = {f: labelled.labels[features[(i + 7) % len(features)]] for i, f in enumerate(features)}
    receipts = LabelPermutation().check(with_changes(labelled, labels=moved))
    verdicts = [r.verdict for r in of_features(receipts, "C3 label permutation").values()]
    assert verdicts.count("failed") >= len(verdicts) - 2
    ladder = of_features(NegativeLadder().check(with_changes(labelled, labels=moved)), "C4 negative ladder N1")
    assert np.median([r.value for r in ladder.values()]) == pytest.approx(0.5, abs=0.05)


def test_p_is_that_of_its_formula(labelled):
    feature = synthetic.feature("suffix")
    receipt = of_features(LabelPermutation().check(labelled), "C3 label permutation")[feature]
    e, test = labelled.examples[feature], labelled.rows.test

    def fit(label: Candidate) -> float:
        assert label.predicate is not None
        holds = label.predicate.rows(test.windows).ravel().astype(float)
        return auroc(holds[e.active], holds[e.negatives["N1"]])

    own = labelled.labels[feature]
    others = [fit(label) for f, label in labelled.labels.items() if f != feature and label.label != own.label]
    assert receipt.n == len(others)
    assert receipt.value == pytest.approx((1 + sum(o >= fit(own) for o in others)) / (1 + len(others)))
    assert receipt.detail["auroc"] == pytest.approx(fit(own))


# --- C4 --------------------------------------------------------------------------------------------------------------


def test_the_ladder_tells_a_token_from_its_context(labelled):
    receipts = NegativeLadder().check(labelled)
    pair, token = synthetic.feature("pair"), synthetic.RANDOM[0]
    headline, contextual = (of_features(receipts, f"C4 negative ladder {x}") for x in ("N1", "contextual"))
    for feature in (pair, token):
        assert headline[feature].verdict == "passed"
        assert headline[feature].value > 0.95
    # " bank" after " river" alone: other rows of " bank" are silent, and the label knows
    same = of_features(receipts, "C4 negative ladder N2")[pair]
    assert same.value > 0.9 and same.low > 0.5 and same.n >= 20
    assert contextual[pair].verdict == "failed" and contextual[pair].detail["lexical"]  # the token alone scores .98
    assert contextual[synthetic.feature("after the")].verdict == "passed"
    assert contextual[token].verdict == "reported" and contextual[token].detail["missing"]
    assert of_run(receipts, "C4 negative ladder N3 median").detail["missing"]
    assert of_run(receipts, "C4 negative ladder N1 median").value == pytest.approx(
        np.median([r.value for r in headline.values()])
    )


def test_a_label_of_the_token_gets_nothing_on_rows_of_the_same_token(labelled):
    pair = synthetic.feature("pair")
    label = Candidate('token " bank"', "lexical", "test", Token(" bank"))
    receipts = NegativeLadder().check(with_changes(labelled, labels={pair: label}))
    assert of_features(receipts, "C4 negative ladder N0")[pair].value > 0.9
    assert of_features(receipts, "C4 negative ladder N2")[pair].value == 0.5
    assert of_features(receipts, "C4 negative ladder contextual")[pair].verdict == "failed"
    # tokens in other shares than among the active rows must not pass for context
    after = synthetic.feature("after the")
    mixed = Candidate("some", "lexical", "test", TokenSet((" bank", " and", " of", " number")))
    receipts = NegativeLadder().check(with_changes(labelled, labels={after: mixed}))
    assert of_features(receipts, "C4 negative ladder N2")[after].value == 0.5


# --- C5 --------------------------------------------------------------------------------------------------------------


def test_the_token_table_is_that_of_its_definition(labelled):
    rows, table = labelled.rows, labelled.token_table
    tokens, train = rows.test.windows.tokens.ravel(), rows.train.windows.tokens.ravel()
    every = np.flatnonzero(rows.test.eligible)
    aurocs, r2 = token_auroc(table, rows.test), token_r2(table, rows.test)
    seen = np.bincount(train[rows.train.eligible], minlength=table.vocabulary)
    for feature in (0, 4, 6, TOP_ONLY):
        active, values = rows.train.active.by_feature()[feature], rows.train.active.values_by_feature()[feature]
        rate = len(active) / rows.train.num_rows
        chance = (np.bincount(train[active], minlength=table.vocabulary) + rate) / (seen + 1)
        np.testing.assert_allclose(table.predict(np.full(len(every), feature), tokens[every]), chance[tokens[every]])
        is_active = np.isin(every, rows.test.active.by_feature()[feature])
        expected = auroc(chance[tokens[every[is_active]]], chance[tokens[every[~is_active]]])
        assert aurocs[feature] == pytest.approx(expected, abs=1e-9)
        z = np.zeros(tokens.size)
        z[rows.test.active.by_feature()[feature]] = rows.test.active.values_by_feature()[feature]
        mean = (np.bincount(train[active], values, table.vocabulary) + values.sum() / rows.train.num_rows) / (seen + 1)
        left = ((z[every] - mean[tokens[every]]) ** 2).sum() / ((z[every] - z[every].mean()) ** 2).sum()
        assert r2[feature] == pytest.approx(1 - left, abs=1e-6)
    assert np.isnan(aurocs[synthetic.DEAD])


def test_the_pair_table_is_that_of_its_definition(labelled):
    rows, table, feature = labelled.rows, labelled.token_table, synthetic.feature("pair")
    train, test = rows.train.windows.tokens, rows.test.windows.tokens
    is_active = np.zeros(train.size, bool)
    is_active[rows.train.active.by_feature()[feature]] = True
    some = np.flatnonzero(rows.test.eligible)[::97]
    found = table.predict_pairs(np.full(len(some), feature), some, rows.test)
    for row, value in zip(some, found, strict=True):
        window, position = divmod(int(row), test.shape[1])
        same = (train[:, 1:] == test[window, position]) & (train[:, :-1] == test[window, position - 1])
        hits = (same & is_active.reshape(train.shape)[:, 1:]).sum()
        token = table.predict(np.array([feature]), test[window, position : position + 1].astype(np.int64))[0]
        assert value == pytest.approx((hits + token) / (same.sum() + 1))


def test_a_feature_that_is_a_token_needs_a_label_that_says_so(labelled):
    token, after = synthetic.feature("token"), synthetic.feature("after the")
    found = of_features(TokenBaseline().check(labelled), "C5 token identity")
    assert len(found) == synthetic.DEAD
    assert found[token].value > 0.97 and found[token].verdict == "passed"
    assert found[after].value < 0.7 and found[after].verdict == "reported"
    wordy = Candidate("waters", "semantic", "test")
    receipts = TokenBaseline().check(with_changes(labelled, labels={token: wordy}, scorer=Constant(0.0)))
    assert of_features(receipts, "C5 token identity")[token].verdict == "failed"
    pairs = of_features(TokenBaseline().check(labelled), "C5 token identity bigram")
    assert pairs[after].detail["gain"] > 0.2
    assert abs(pairs[token].detail["gain"]) < 0.02


def test_a_table_without_activity_predicts_nothing(labelled):
    rows = labelled.rows
    none = rows.train.active.where(np.zeros(len(rows.train.active.rows), bool))
    table = TokenTable.of(replace(rows.train, active=none))
    assert token_auroc(table, rows.test)[0] == 0.5


# --- C14 -------------------------------------------------------------------------------------------------------------


def test_a_label_of_the_strongest_rows_only_is_named(labelled):
    label = Candidate("token", "lexical", "test", Token(TOP_TOKEN))
    whole = Candidate("number", "structural", "test", TokenClass("number"))
    labels = {TOP_ONLY: label, synthetic.feature("number"): whole}
    receipts = ActivationRange().check(with_changes(labelled, labels=labels))
    found = of_features(receipts, "C14 activation range")
    assert found[TOP_ONLY].verdict == "failed"
    assert found[TOP_ONLY].detail["top_only"]
    assert found[TOP_ONLY].detail["valid_from"] >= 2.6  # where numbers stop
    assert found[TOP_ONLY].n == len(labelled.rows.test.active.by_feature()[TOP_ONLY])
    assert found[synthetic.feature("number")].verdict == "passed"
    assert found[synthetic.feature("number")].detail["of_all_active"] == 1.0
    assert of_run(receipts, "C14 activation range top-only share").value == 0.5


# --- C15 -------------------------------------------------------------------------------------------------------------


def test_a_healthy_scorer_passes(labelled):
    receipts = ScorerHealth().check(labelled)
    named: dict[str, Any] = {r.control.removeprefix("C15 scorer health "): r for r in receipts}
    assert {r.verdict for r in receipts} <= {"passed", "reported"}
    assert named["missing answers"].value == 0
    assert abs(named["longest label"].value - 0.5) < 0.05


def test_other_draws_of_the_examples_rank_labels_alike_unless_the_scorer_guesses(labelled):
    class Noise:
        """Answers by lot."""

        name: ClassVar[str] = "noise"
        generator = np.random.default_rng(5)

        def score(self, labels, rows, split):
            return [self.generator.random(len(own)) for own in rows]

    steady = of_run(ScorerHealth().check(labelled), "C15 scorer health reseeds")
    assert steady.verdict == "passed" and steady.n == len(labelled.scores)
    assert len(steady.detail["pairs"]) == 3 and min(steady.detail["pairs"]) < 1  # the examples are other ones
    lots = of_run(ScorerHealth().check(with_changes(labelled, scorer=Noise())), "C15 scorer health reseeds")
    assert lots.value < 0.5 and lots.verdict == "failed"


def test_a_constant_judge_gets_no_credit_and_is_named(labelled):
    judged = with_changes(labelled, scorer=Constant(1.0))
    ladder = of_features(NegativeLadder().check(judged), "C4 negative ladder N1")
    assert {r.value for r in ladder.values()} == {0.5}
    assert {r.verdict for r in ladder.values()} == {"failed"}
    permuted = of_features(LabelPermutation().check(judged), "C3 label permutation")
    assert {r.value for r in permuted.values()} == {1.0}
    assert {r.verdict for r in permuted.values()} == {"failed"}
    constant = of_run(ScorerHealth().check(judged), "C15 scorer health constant answers")
    assert (constant.value, constant.verdict) == (1.0, "failed")


def test_a_judge_that_does_not_answer_is_named_and_counts_as_wrong(labelled):
    judged = with_changes(labelled, scorer=Constant(float("nan")))
    missing = of_run(ScorerHealth().check(judged), "C15 scorer health missing answers")
    assert (missing.value, missing.verdict) == (1.0, "failed")
    assert {r.value for r in of_features(NegativeLadder().check(judged), "C4 negative ladder N1").values()} == {0.0}


def test_a_judge_that_likes_every_label_is_named_by_its_baselines(labelled):
    class Familiar:
        """Knows which rows are active, whatever the label says: it must fail on labels that say nothing."""

        name: ClassVar[str] = "familiar"

        def score(self, labels, rows, split):
            active = {f: set(own.tolist()) for f, own in enumerate(split.active.by_feature())}
            wanted = [max(active, key=lambda f: len(active[f] & set(own.tolist()))) for own in rows]
            return [np.isin(own, list(active[f])).astype(float) for own, f in zip(rows, wanted, strict=True)]

    words = {f: Candidate(c.label, "semantic", "test") for f, c in labelled.labels.items() if f < 12}
    receipts = ScorerHealth().check(with_changes(labelled, labels=words, scorer=Familiar()))
    named: dict[str, Any] = {r.control.removeprefix("C15 scorer health "): r for r in receipts}
    for baseline in ("empty label", 'label "text"', "longest label"):
        assert named[baseline].verdict == "failed"
        assert named[baseline].value > 0.9


# --- together --------------------------------------------------------------------------------------------------------


def test_tiers_run_the_controls_of_those_before():
    codes = {tier: [control.code for control in controls(tier)] for tier in ("fast", "full", "paper")}
    assert {"C0", "C1", "C3", "C4", "C5", "C14", "C15"} <= set(codes["fast"])
    assert "C2" not in codes["fast"] and "C2" in codes["full"]
    assert set(codes["full"]) <= set(codes["paper"])
    assert all(control.tier in ("fast", "full", "paper") and control.name for control in controls("paper"))
    with pytest.raises(ValueError, match="no tier 'fats': there is fast"):
        controls("fats")


def test_thresholds_cannot_move_without_their_hash():
    assert replace(THRESHOLDS, lexical_auroc=0.9).sha256 != THRESHOLDS.sha256
    receipt = THRESHOLDS.receipt("fast")
    assert receipt.detail["sha256"] == THRESHOLDS.sha256
    assert receipt.detail["thresholds"]["false_discovery_rate"] == 0.05


def test_a_costly_scorer_of_words_is_asked_about_fewer_labels(labelled):
    words = {f: Candidate(f"{c.label} {f}", "semantic", "test") for f, c in labelled.labels.items()}
    own = np.random.default_rng(0)

    class Noise:
        name: ClassVar[str] = "noise"

        def score(self, labels, rows, split):
            return [own.random(len(r)) for r in rows]

    for is_costly, most in ((False, len(words) - 1), (True, 5)):
        scorer = LabelScorer(Noise, is_costly=is_costly)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(label_permutation, "THRESHOLDS", replace(THRESHOLDS, costly_permutations=5))
            receipts = LabelPermutation().check(with_changes(labelled, labels=words, scorer=scorer))
        assert {r.n for r in of_features(receipts, "C3 label permutation").values()} == {most}


def test_words_are_compared_with_the_words_of_executable_labels_too(labelled):
    asked: list[Candidate] = []

    class Reader:
        name: ClassVar[str] = "reader"

        def score(self, labels, rows, split):
            asked.extend(labels)
            return [np.zeros(len(r)) for r in rows]

    word = synthetic.feature("number")
    labels = {**labelled.labels, word: Candidate("numbers", "semantic", "test")}
    receipts = LabelPermutation().check(with_changes(labelled, labels=labels, scorer=LabelScorer(Reader)))
    found = of_features(receipts, "C3 label permutation")
    assert found[word].n == len({c.label for c in labels.values()}) - 1
    assert found[synthetic.feature("token")].n == len(labels) - 2  # words cannot be executed
    assert {c.label for c in asked} == {c.label for c in labels.values()}
    assert all(c.predicate is None for c in asked)
