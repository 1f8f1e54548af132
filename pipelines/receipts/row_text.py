"""The text of a row as a reader, an embedder or a language model is given it: its word, near words, surroundings.

    window  up to 29 tokens around the row, begun and ended at whole words
    near    the row's word with the 3 words before and after it
    word    the whole word that the row's token belongs to, its pieces joined

Special tokens (BOS, separators) are borders that no text crosses, and are never part of one. All white space reads as
one space. `marks` are put around the row's word: ("<<", ">>") makes "heard by the <<court>> of appeal".
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..token_classes import RowTable

Marks = tuple[str, str]
#: Text of a row that is a line break or blank space alone.
LINE_BREAK, BLANK = "line break", "blank space"
_CHUNK = 4096  # rows at a time


def marked_words(windows: RowTable, rows: np.ndarray) -> list[str]:
    """The word of each row [n], row = window * T + position: "Wednesday", "1984", '"', "line break"."""
    return _texts(windows, rows, lambda layout, at: (layout.starts[at], layout.ends[at]), None)


def near_words(windows: RowTable, rows: np.ndarray, *, words: int = 3, marks: Marks | None = None) -> list[str]:
    """Each row's word with `words` words on either side, and the punctuation between them."""

    def span(layout: "_Layout", at: tuple) -> tuple[np.ndarray, np.ndarray]:
        count, window = layout.word_count, at[0]
        inside = layout.borders[window] == layout.borders[at][:, None]
        first = count[at] - words + np.where(layout.is_word[at], 0, 1)  # a comma stands behind its last word before
        inside &= (count[window] >= first[:, None]) & (count[window] <= count[at][:, None] + words)
        last = inside.shape[1] - 1 - inside[:, ::-1].argmax(axis=1)
        return np.minimum(inside.argmax(axis=1), layout.starts[at]), np.maximum(last, layout.ends[at])

    return _texts(windows, rows, span, marks)


def surroundings(windows: RowTable, rows: np.ndarray, *, tokens: int = 29, marks: Marks | None = None) -> list[str]:
    """About `tokens` tokens with each row in the middle, as far as window and special tokens allow."""

    def span(layout: "_Layout", at: tuple) -> tuple[np.ndarray, np.ndarray]:
        window, position = at
        inside = layout.borders[window] == layout.borders[at][:, None]
        inside &= np.abs(np.arange(inside.shape[1]) - position[:, None]) <= tokens // 2
        last = inside.shape[1] - 1 - inside[:, ::-1].argmax(axis=1)
        return layout.starts[window, inside.argmax(axis=1)], layout.ends[window, last]

    return _texts(windows, rows, span, marks)


#: View -> the texts of rows in it; widest first.
VIEWS: dict[str, Callable[[RowTable, np.ndarray], list[str]]] = {
    "window": surroundings,
    "near": near_words,
    "word": marked_words,
}


@dataclass(frozen=True)
class Words:
    """The word that every token belongs to: `names[codes]`, code -1 behind the end of a window; arrays are [W, T]."""

    names: list[str]
    codes: np.ndarray  # int32
    starts: np.ndarray  # first position of the word
    ends: np.ndarray  # last position of the word
    bare: np.ndarray  # bool: the token begins without blank space

    @classmethod
    def of(cls, windows: RowTable) -> "Words":
        """Words of all windows."""
        layout, texts = _Layout.of(windows, windows.tokens), [t.strip() for t in windows.vocabulary.texts]
        index = {text: n for n, text in enumerate(dict.fromkeys(texts))}
        codes = np.append(np.array([index[t] for t in texts], np.int32), -1).astype(np.int32)[windows.tokens]
        in_pieces = (layout.starts < layout.ends) & (layout.starts == np.arange(codes.shape[1]))
        for w, start in np.argwhere(in_pieces).tolist():
            tokens = windows.tokens[w, start : layout.ends[w, start] + 1].tolist()
            word = "".join(windows.vocabulary.texts[t] for t in tokens).strip()
            codes[w, start : layout.ends[w, start] + 1] = index.setdefault(word, len(index))
        bare = np.array([*(not t[:1].isspace() for t in windows.vocabulary.texts), False], bool)[windows.tokens]
        return cls(list(index), codes, layout.starts, layout.ends, bare)


@dataclass(frozen=True)
class _Layout:
    """Words and borders of some windows, each array [W, T]."""

    starts: np.ndarray  # first position of the word (or mark, or blank) that the token belongs to
    ends: np.ndarray  # and its last
    is_word: np.ndarray  # it has a letter or digit
    word_count: np.ndarray  # words begun up to here
    borders: np.ndarray  # number of the stretch between special tokens; a special token is a stretch of its own

    @classmethod
    def of(cls, windows: RowTable, tokens: np.ndarray) -> "_Layout":
        v, width = windows.vocabulary, tokens.shape[1]
        joins_behind = np.array([t[-1:].isalnum() or t.endswith("\ufffd") for t in v.texts] + [False], bool)[tokens]
        joins_before = np.array([t[:1].isalnum() or t.startswith("\ufffd") for t in v.texts] + [False], bool)[tokens]
        continues = np.zeros(tokens.shape, bool)
        continues[:, 1:] = joins_before[:, 1:] & joins_behind[:, :-1]
        position = np.broadcast_to(np.arange(width), tokens.shape)
        starts = np.maximum.accumulate(np.where(continues, 0, position), axis=1)
        ends = np.minimum.accumulate(
            np.where(np.append(continues[:, 1:], np.zeros((len(tokens), 1), bool), axis=1), width, position)[:, ::-1],
            axis=1,
        )[:, ::-1]
        readable = np.array([w != "" for w in v.words] + [False], bool)
        special = np.append(v.classes["special"], True)[tokens]  # behind the end of a window too
        is_word = readable[tokens] & ~special
        begins = is_word & ~continues
        changes = special.copy()
        changes[:, 1:] |= special[:, :-1]
        return cls(starts, ends, is_word, np.cumsum(begins, axis=1), np.cumsum(changes, axis=1))


def _texts(windows: RowTable, rows: np.ndarray, span: Callable, marks: Marks | None) -> list[str]:
    out: list[str] = []
    texts = [*windows.vocabulary.texts, ""]
    for some in np.array_split(np.asarray(rows, np.int64), max(-(-len(rows) // _CHUNK), 1)):
        window, position = some // windows.tokens.shape[1], some % windows.tokens.shape[1]
        known, place = np.unique(window, return_inverse=True)
        tokens = windows.tokens[known]
        layout, at = _Layout.of(windows, tokens), (place, position)
        first, last = span(layout, at)
        for w, a, b, c, d in zip(place, first, layout.starts[at], layout.ends[at] + 1, last + 1, strict=True):
            pieces = [texts[t] for t in tokens[w, a:d].tolist()]
            out.append(_joined(pieces[: b - a], pieces[b - a : c - a], pieces[c - a :], marks))
    return out


def _joined(before: list[str], own: list[str], after: list[str], marks: Marks | None) -> str:
    word = "".join(own)
    if not word.strip():
        word = f" {LINE_BREAK if chr(10) in word else BLANK} "
    if marks is not None:
        bare = word.strip()
        word = word.replace(bare, f"{marks[0]}{bare}{marks[1]}", 1)
    return " ".join(f"{''.join(before)}{word}{''.join(after)}".split())
