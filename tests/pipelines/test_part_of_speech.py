"""Labels that say what part of speech a token is, by spaCy pipelines that are trained here on a few sentences."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from saeql.pipelines.candidate_counts import CandidateLimits
from saeql.pipelines.label_candidates import propose
from saeql.pipelines.part_of_speech import PartOfSpeechError, Tagger
from saeql.pipelines.predicates import Both, PartOfSpeech, Predicate, Token
from saeql.pipelines.split_rows import ActiveRows
from saeql.pipelines.token_classes import RowTable

needs_spacy = pytest.mark.skipif(
    importlib.util.find_spec("spacy") is None, reason="spaCy is not installed: pip install spacy"
)
NOUNS, VERBS, NAMES = ("school", "town", "bed", "church"), ("run", "sing", "read", "sleep"), ("Anna", "Peter", "Maria")


def sentence(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Words and parts of 'Anna wants to sing .' or 'Anna walks to town .'."""
    name = str(rng.choice(NAMES)), "PROPN"
    if rng.random() < 0.5:
        return [name, ("wants", "VERB"), ("to", "PART"), (str(rng.choice(VERBS)), "VERB"), (".", "PUNCT")]
    return [name, ("walks", "VERB"), ("to", "ADP"), (str(rng.choice(NOUNS)), "NOUN"), (".", "PUNCT")]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A folder with a pipeline whose tagger has learned such sentences."""
    import spacy  # pyright: ignore[reportMissingImports]
    from spacy.training import Example  # pyright: ignore[reportMissingImports]

    rng, nlp = np.random.default_rng(0), spacy.blank("en")
    nlp.add_pipe("tagger")
    examples = []
    for _ in range(40):
        words, parts = zip(*sentence(rng), strict=True)
        examples.append(Example.from_dict(nlp.make_doc(" ".join(words)), {"words": list(words), "tags": list(parts)}))
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(12):
        nlp.update(examples, sgd=optimizer)
    folder = tmp_path_factory.mktemp("pipeline") / "parts"
    nlp.to_disk(folder)
    return folder


def windows(rng: np.random.Generator, num: int) -> tuple[RowTable, np.ndarray]:
    """Windows of four sentences, some words in two pieces, between special tokens; and the part of each token."""
    rows, parts = [], []
    for _ in range(num):
        tokens, own = ["<|endoftext|>"], [""]
        for word, part in (pair for _ in range(4) for pair in sentence(rng)):
            pieces = [" sch", "ool"] if word == "school" else [f" {word}"] if word != "." else ["."]
            tokens += pieces
            own += [part] * len(pieces)
        rows.append(tokens)
        parts.append(own)
    table = RowTable.from_texts(rows)
    told = np.full(table.tokens.shape, "", "U8")
    for line, own in zip(told, parts, strict=True):
        line[: len(own)] = own
    return table, told


@needs_spacy
def test_every_piece_of_a_word_has_the_part_that_the_pipeline_gives_it(pipeline: Path, tmp_path: Path, monkeypatch):
    table, told = windows(np.random.default_rng(1), 30)
    tagger = Tagger.load(str(pipeline), cache=tmp_path / "cache.sqlite")
    parts = tagger.parts(table)
    found = np.array([*parts.names, ""])[parts.codes]
    assert (found == told).all()
    again = Tagger.load(str(pipeline), cache=tmp_path / "cache.sqlite")
    monkeypatch.setattr(again.nlp, "pipe", lambda texts: iter(()) if not list(texts) else pytest.fail("tagged twice"))
    assert np.array_equal(again.parts(table).codes, parts.codes)


@needs_spacy
def test_a_feature_of_a_token_as_one_part_of_speech_gets_that_label(pipeline: Path, tmp_path: Path):
    table, told = windows(np.random.default_rng(2), 60)
    table.tagger = Tagger.load(str(pipeline), cache=tmp_path / "cache.sqlite")
    eligible = table.valid & (np.arange(table.tokens.shape[1]) > 0)
    wanted = [told == "PART", np.roll(told, -1, axis=1) == "NOUN"]
    rows = [np.flatnonzero(w & eligible) for w in wanted]
    features = np.repeat(np.arange(2), [len(r) for r in rows]).astype(np.int32)
    active = ActiveRows(features, np.concatenate(rows).astype(np.int32), np.ones(len(features), np.float32), 2)
    limits = CandidateLimits(min_hits=3, min_lift=2.0, min_f1=0.15, max_candidates=16, max_set_size=8)
    particle, before_noun = propose(table, active, eligible.ravel(), limits)
    assert Both(Token(" to"), PartOfSpeech("PART")) in particle and PartOfSpeech("PART") in particle
    assert PartOfSpeech("NOUN", 1) in before_noun
    for predicate in (PartOfSpeech("PART"), Both(Token(" to"), PartOfSpeech("PART"))):
        assert np.array_equal(predicate.matches(table), rows[0])
        assert predicate.at(table, rows[0]).all() and not predicate.at(table, np.setdiff1d(rows[1], rows[0])).any()
    assert np.array_equal(PartOfSpeech("NOUN", 1).matches(table), np.flatnonzero(wanted[1] & table.valid))


@needs_spacy
def test_pipelines_that_cannot_tag_are_refused_in_one_line(tmp_path: Path):
    import spacy  # pyright: ignore[reportMissingImports]

    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(PartOfSpeechError, match=r"has no tagger or morphologizer \(it has: nothing\)"):
        Tagger.load(str(tmp_path / "blank"))
    untrained = spacy.blank("en")
    untrained.add_pipe("tagger").add_label("NOUN")
    with pytest.raises(PartOfSpeechError, match=r"cannot tag|not trained"):
        Tagger(untrained, cache=tmp_path / "cache.sqlite")
    with pytest.raises(PartOfSpeechError, match=r"no spaCy pipeline 'en_nowhere_sm'.*pip install spacy"):
        Tagger.load("en_nowhere_sm")


def test_without_spacy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(
        PartOfSpeechError, match=r"label.part_of_speech = 'en_core_web_sm' needs spaCy: pip install spacy"
    ):
        Tagger.load("en_core_web_sm")
    assert Tagger.of("") is None


def test_the_predicate_reads_and_is_written_as_what_it_says():
    made = Both(Token(" to"), PartOfSpeech("PART"))
    assert made.describe() == 'token " to" as a particle' and made.kind == "structural"
    assert Both(Token(" to"), PartOfSpeech("VERB", 1)).describe() == 'token " to" before a verb'
    assert PartOfSpeech("NOUN").describe() == "a noun (part of speech)"
    assert PartOfSpeech("XYZ", -1).describe() == "the token after a token tagged XYZ"
    assert Predicate.from_json(made.to_json()) == made
    for part, offset in (("", 0), ("NOUN", 2), ("NOUN", True)):
        with pytest.raises(ValueError, match="part of speech"):
            PartOfSpeech(part, offset)
    with pytest.raises(PartOfSpeechError, match=r"set label\.part_of_speech"):
        made.matches(RowTable.from_texts([["a", " to"]]))
