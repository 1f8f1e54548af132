"""What readers and embedders are shown of a row: whole words, bounded, and never across a border."""

import numpy as np
import pytest

from saeql.pipelines.receipts.row_text import VIEWS, marked_words, near_words, surroundings
from saeql.pipelines.token_classes import RowTable

EOS = "<|endoftext|>"
FIRST = [EOS, "The", " cou", "rt", " of", " app", "eal", ",", " on", " ", "1", "9", "8", "4", "\n", "\n", "He"]
FIRST += [" said", ' "']
SECOND = ["end", ".", EOS, " New", " text", " that", " begins"]


@pytest.fixture(scope="module")
def windows() -> RowTable:
    return RowTable.from_texts([FIRST, SECOND])


def rows(*positions: int, window: int = 0) -> np.ndarray:
    return np.array(positions) + window * len(FIRST)


def test_pieces_are_joined_to_the_word_that_they_belong_to(windows):
    assert marked_words(windows, rows(2, 3, 5, 6, 7)) == ["court", "court", "appeal", "appeal", ","]
    assert marked_words(windows, rows(10, 13, 16, 18)) == ["1984", "1984", "He", '"']
    assert marked_words(windows, rows(9, 14)) == ["blank space", "line break"]
    assert marked_words(windows, rows(0, 1)) == [EOS, "The"]


def test_near_words_are_counted_as_words(windows):
    assert near_words(windows, rows(3), words=1) == ["The court of"]
    assert near_words(windows, rows(6), words=2) == ["court of appeal, on 1984"]
    assert near_words(windows, rows(7), words=1) == ["appeal, on"]  # a comma has a word on either side
    assert near_words(windows, rows(11), words=1, marks=("<<", ">>")) == ["on <<1984>> He"]


def test_surroundings_end_at_whole_words(windows):
    assert surroundings(windows, rows(5), tokens=5) == ["court of appeal,"]
    assert surroundings(windows, rows(17), tokens=9, marks=("[", "]")) == ['1984 He [said] "']
    assert surroundings(windows, rows(14), tokens=3, marks=("[", "]")) == ["1984 [line break]"]


def test_no_text_crosses_a_special_token(windows):
    assert surroundings(windows, rows(0, window=1)) == ["end."]
    assert surroundings(windows, rows(3, window=1)) == ["New text that begins"]
    assert near_words(windows, rows(0, 4, window=1), words=9) == ["end.", "New text that begins"]
    assert near_words(windows, rows(2, window=1)) == [EOS]
    assert surroundings(windows, rows(18)).count(EOS) == 0


def test_views_are_bounded_and_nested(windows):
    everything = np.flatnonzero(windows.valid.ravel())
    texts = {name: view(windows, everything) for name, view in VIEWS.items()}
    for wide, near, word in zip(texts["window"], texts["near"], texts["word"], strict=True):
        assert word in near and near.strip("., ") in wide
    assert [view(windows, rows()) for view in VIEWS.values()] == [[], [], []]
    long = RowTable.from_texts([[" a"] * 200])
    assert max(len(t.split()) for t in surroundings(long, np.arange(200))) == 29
    assert {len(t.split()) for t in near_words(long, np.arange(3, 197))} == {7}


def test_chunks_do_not_show(windows, monkeypatch):
    everything = np.flatnonzero(windows.valid.ravel())
    whole = {name: view(windows, everything) for name, view in VIEWS.items()}
    monkeypatch.setattr("saeql.pipelines.receipts.row_text._CHUNK", 4)
    assert {name: view(windows, everything) for name, view in VIEWS.items()} == whole
