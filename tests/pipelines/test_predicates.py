"""Predicates: each against a plain reading of the text, JSON both ways, labels that say what is computed."""

import numpy as np
import pyarrow as pa
import pytest

from saeql.pipelines.predicates import (
    Affix,
    Both,
    Either,
    Neighbour,
    Not,
    Piece,
    Position,
    Predicate,
    Recent,
    Stems,
    Token,
    TokenClass,
    TokenSet,
    Word,
)
from saeql.pipelines.token_classes import DISJOINT_CLASSES, TOKEN_CLASSES, RowTable, Vocabulary

WINDOWS = [
    ["<|endoftext|>", " The", " old", " bank", " was", " walk", "ing", ",", " 1987", ",", " in", " Walk", "s", "."],
    ["the", " BANK", "\n", "running", " walked", " (", "3.5", " %", ")", " Bank", "!"],
]

CASES: list[tuple[Predicate, str, str, list[str]]] = [
    (Token(" bank"), 'token " bank"', "lexical", [" bank"]),
    (Word("bank"), 'word "bank" (any case)', "lexical", [" bank", " BANK", " Bank"]),
    (TokenSet((" in", ".")), 'one of " in", "."', "lexical", [" in", "."]),
    (Stems(("walk",)), 'words with stem "walk"', "lexical", [" walk", " Walk", " walked"]),
    (
        Stems(("walk", "run")),
        'words with one of the stems "walk", "run"',
        "lexical",
        [" walk", " Walk", "running", " walked"],
    ),
    (Affix("suffix", "ing"), "words ending in -ing", "lexical", ["ing", "running"]),
    (Affix("prefix", "wal"), "words starting with wal-", "lexical", [" walk", " Walk", " walked"]),
    (TokenClass("number"), "a number", "structural", [" 1987", "3.5"]),
    (TokenClass("year"), "a year-like number", "structural", [" 1987"]),
    (TokenClass("capitalised"), "a capitalised word", "structural", [" The", " Walk", " Bank"]),
    (TokenClass("upper"), "a word in ALL CAPS", "structural", [" BANK"]),
    (TokenClass("comma"), "a comma", "structural", [",", ","]),
    (TokenClass("newline"), "a line break", "structural", ["\n"]),
    (TokenClass("special"), "a special token", "structural", ["<|endoftext|>"]),
    (TokenClass("punctuation"), "punctuation", "structural", [",", ",", ".", " (", " %", ")", "!"]),
    (Piece("continues"), "a later piece of a word", "structural", ["ing", "s"]),
    (Position(2), "the first 2 tokens of a window", "structural", ["<|endoftext|>", " The", "the", " BANK"]),
    (Neighbour(-1, Word("the")), 'the token after word "the" (any case)', "structural", [" old", " BANK"]),
    (Neighbour(1, Token(",")), 'the token before ","', "structural", ["ing", " 1987"]),
    (Neighbour(-1, TokenClass("number")), "the token after a number", "structural", [",", " %"]),
    (Both(Token(","), Neighbour(-1, TokenClass("number"))), 'token "," after a number', "structural", [","]),
    (Both(Token(" bank"), Neighbour(-1, Token(" old"))), 'token " bank" after " old"', "structural", [" bank"]),
    (
        Either(Token(" bank"), Neighbour(-1, Token(" ("))),
        'token " bank"; or the token after " ("',
        "structural",
        [" bank", "3.5"],
    ),
    (Neighbour(-2, Token(" old")), 'the second token after " old"', "structural", [" was"]),
    (Neighbour(-4, TokenClass("comma")), "the fourth token after a comma", "structural", [" Walk", "."]),
    (
        Both(Token(","), Neighbour(-2, TokenSet((" walk", ",")))),
        'token "," two tokens after one of " walk", ","',
        "structural",
        [",", ","],
    ),
    (
        Both(Word("bank"), Not(Neighbour(-1, TokenSet((" old", "the"))))),
        'word "bank" (any case) not after one of " old", "the"',
        "structural",
        [" Bank"],
    ),
    (
        Recent(Stems(("walk",)), 3),
        'words with stem "walk" among the last 3 tokens',
        "structural",
        [" walk", "ing", ",", " Walk", "s", ".", " walked", " (", "3.5"],
    ),
    (
        Both(TokenClass("comma"), Recent(Token(" walk"), 3)),
        'a comma with token " walk" among the last 3 tokens',
        "structural",
        [","],
    ),
    (
        Both(TokenClass("comma"), Not(Recent(Token(" walk"), 3))),
        'a comma without token " walk" among the last 3 tokens',
        "structural",
        [","],
    ),
    (
        Both(TokenClass("word"), Position(2)),
        "a word, only where also the first 2 tokens of a window",
        "structural",
        [" The", "the", " BANK"],
    ),
    (
        Both(Affix("suffix", "ing"), Affix("prefix", "run")),
        "words ending in -ing, only where also words starting with run-",
        "lexical",
        ["running"],
    ),
]


@pytest.mark.parametrize(("predicate", "label", "kind", "holds"), CASES, ids=[c[1] for c in CASES])
def test_holds_where_the_label_says(predicate, label, kind, holds):
    windows = RowTable.from_texts(WINDOWS)
    rows = predicate.rows(windows)
    assert rows.shape == windows.tokens.shape and rows.dtype == bool
    found = [WINDOWS[w][p] for w, p in np.argwhere(rows)]  # IndexError if it held behind the end of a window
    assert found == holds
    flat = np.random.default_rng(0).permutation(rows.size)
    np.testing.assert_array_equal(predicate.at(windows, flat), rows.ravel()[flat])
    np.testing.assert_array_equal(predicate.matches(windows), np.flatnonzero(rows))
    assert (predicate.describe(), predicate.kind) == (label, kind)
    again = Predicate.from_json(predicate.to_json())
    assert again == predicate and hash(again) == hash(predicate) and again.to_json() == predicate.to_json()


def test_starts_and_continues_share_the_pieces_of_words():
    windows = RowTable.from_texts(WINDOWS)
    starts, continues = Piece("starts").rows(windows), Piece("continues").rows(windows)
    assert not (starts & continues).any()
    words = TokenClass("word").rows(windows)
    assert ((starts | continues) == words).all()


def test_a_text_that_the_windows_lack_holds_nowhere():
    windows = RowTable.from_texts(WINDOWS)
    for predicate in (Token(" zebra"), Word("zebra"), TokenSet((" a", " b")), Stems(("zebra",)), Affix("suffix", "zz")):
        assert not predicate.rows(windows).any()


def test_disjoint_classes_are_disjoint_and_every_test_is_total():
    texts = ["", " ", "\n", " \n", "a", "A", " I", "AB", "aB", "é", "Ω", "漢", "7", " 1999", "1,000", "a1", ".", "...",
             "?!", ":", '"', "'s", " (", "[]", "-", "—", "€", "<|x|>", "</s>", "\u202e", "\x00", "\ufffd"]  # fmt: skip
    held = np.array([[TOKEN_CLASSES[name][1](t) for name in DISJOINT_CLASSES] for t in texts])
    assert held.sum(axis=1).max() == 1
    for t in texts:
        assert TOKEN_CLASSES["number"][1](t) or not TOKEN_CLASSES["year"][1](t)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "null",
        '{"text":" a"}',
        '{"type":"regex","pattern":".*"}',
        '{"type":"token"}',
        '{"type":"token","text":""}',
        '{"type":"token","text":3}',
        '{"type":"token","text":["a"]}',
        '{"type":"token","text":" a","more":1}',
        '{"type":"word","word":"Bank"}',
        '{"type":"token_set","texts":[]}',
        '{"type":"token_set","texts":["a","a"]}',
        '{"type":"class","token_class":"verb"}',
        '{"type":"class","token_class":[["a"]]}',
        '{"type":"affix","where":"infix","letters":"a"}',
        '{"type":"position","first_n":0}',
        '{"type":"position","first_n":true}',
        '{"type":"piece","part":"middle"}',
        '{"type":"neighbour","offset":-5,"of":{"type":"token","text":"a"}}',
        '{"type":"neighbour","offset":0,"of":{"type":"token","text":"a"}}',
        '{"type":"neighbour","offset":-1,"of":"a"}',
        '{"type":"recent","of":{"type":"token","text":"a"},"last":1}',
        '{"type":"recent","of":{"type":"token","text":"a"},"last":true}',
        '{"type":"recent","of":{"type":"piece","part":"starts"},"last":4}',
        '{"type":"not","of":{"type":"not","of":{"type":"token","text":"a"}}}',
        '{"type":"not","of":"a"}',
        '{"type":"either","first":{"type":"token","text":"a"},"second":"b"}',
        '{"type":"neighbour","offset":-1,"of":{"type":"position","first_n":3}}',
        '{"type":"both","first":{"type":"token","text":"a"},"second":"b"}',
        '{"type":"both","first":{"type":"token","text":"a"},"second":{"type":"both","first":{"type":"token","text":"a"},'
        '"second":{"type":"token","text":"b"}}}',
    ],
)
def test_unknown_predicates_are_refused(text):
    with pytest.raises(ValueError):
        Predicate.from_json(text)


def test_vocabulary_maps_ids_and_refuses_what_it_does_not_know():
    vocabulary = Vocabulary([7, 3, 9], [" b", " a", " a"])
    assert vocabulary.texts == [" a", " b"]
    assert vocabulary.lookup(np.array([[3, 7], [9, 9]])).tolist() == [[0, 1], [0, 0]]
    with pytest.raises(ValueError, match="token id 4"):
        vocabulary.lookup(np.array([3, 4]))
    with pytest.raises(ValueError, match="two texts"):
        Vocabulary([1, 1], ["a", "b"])


def test_short_windows_are_padded_and_the_padding_holds_nothing():
    vocabulary = Vocabulary([1, 2], ["a", "b"])
    windows = RowTable.from_windows(vocabulary, pa.chunked_array([pa.array([[1, 2, 1], [2]], pa.list_(pa.int32()))]))
    assert windows.tokens.tolist() == [[0, 1, 0], [1, -1, -1]]
    assert Position(9).rows(windows).tolist() == [[True] * 3, [True, False, False]]
    assert Neighbour(-1, Token("b")).rows(windows).tolist() == [[False, False, True], [False] * 3]


def test_labels_escape_what_would_disturb_a_terminal():
    assert Token("\u202e\n\x1b").describe() == r'token "\u202e\n\u001b"'
    assert Token(" é漢").describe() == 'token " é漢"'


def test_recent_tokens_end_with_their_document_and_with_their_window():
    windows = RowTable.from_texts([["war", "a", "<|endoftext|>", "b", "war", "c"], ["d", "war"]])
    assert Recent(Token("war"), 4).rows(windows).tolist() == [
        [True, True, False, False, True, True],
        [False, True, False, False, False, False],
    ]
    at_the_end = Both(TokenSet(("a", "b", "c", "d")), Not(Recent(Token("war"), 4))).rows(windows)
    assert at_the_end.tolist() == [[False, False, False, True, False, False], [True] + [False] * 5]
    # A neighbour is looked for in the window alone: packed documents stand side by side in it.
    assert Neighbour(-4, Token("war")).rows(windows).tolist() == [[False] * 4 + [True, False], [False] * 6]


def test_a_label_costs_what_it_says():
    token, many = Token(" a"), TokenSet((" a", " b", " c"))
    assert Neighbour(-1, token).complexity < Neighbour(-1, many).complexity
    assert Neighbour(-1, token).complexity < Neighbour(-2, token).complexity
    assert token.complexity < Both(token, Neighbour(-1, token)).complexity
    assert Both(token, Neighbour(-1, token)).complexity < Both(token, Not(Neighbour(-1, token))).complexity
