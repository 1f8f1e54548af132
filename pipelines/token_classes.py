"""What a predicate can know about a token: its text, its word, its stem, its classes; and windows of such tokens.

A `Vocabulary` holds the distinct token TEXTS of a run (several token ids may share one text, e.g. broken UTF-8 pieces)
and the tables that turn a question about text into one lookup a row. A `RowTable` is windows over a vocabulary.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import snowballstemmer

if TYPE_CHECKING:
    from .part_of_speech import Parts, Tagger


def word_of(text: str) -> str:
    """The token's word: stripped and case-folded; "" where it has neither letter nor digit."""
    word = text.strip().casefold()
    return word if any(c.isalnum() for c in word) else ""


def _letters(text: str, test: Callable[[str], bool]) -> bool:
    stripped = text.strip()
    return stripped.isalpha() and test(stripped)


def _only(characters: str) -> Callable[[str], bool]:
    allowed = set(characters)
    return lambda text: bool(text.strip()) and set(text.strip()) <= allowed


def _is_punctuation(text: str) -> bool:
    stripped = text.strip()
    return bool(stripped) and all(unicodedata.category(c)[0] in "PS" for c in stripped)


_YEAR = re.compile(r"\s*(1\d|20)\d\d\s*")
_NUMBER = re.compile(r"\s*\d+([.,]\d+)*\s*")
_SPECIAL = re.compile(r"\s*<(\|[^<>|]+\||/?s|pad|unk)>\s*")

#: Class name -> (the class in words, its test of a token's text). Narrow classes stand before the wide ones.
TOKEN_CLASSES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "year": ("a year-like number", lambda t: _YEAR.fullmatch(t) is not None),
    "number": ("a number", lambda t: _NUMBER.fullmatch(t) is not None),
    "capitalised": (
        "a capitalised word",
        lambda t: _letters(t, lambda s: s[0].isupper() and (s[1:].islower() or not s[1:])),
    ),
    "upper": ("a word in ALL CAPS", lambda t: _letters(t, lambda s: len(s) > 1 and s.isupper())),
    "lower": ("a lower-case word", lambda t: _letters(t, str.islower)),
    "comma": ("a comma", _only(",")),
    "full_stop": ("a full stop", _only(".")),
    "sentence_mark": ("a question or exclamation mark", _only("?!")),
    "colon": ("a colon or semicolon", _only(":;")),
    "quote": ("a quotation mark", _only("\"'`\u201c\u201d\u2018\u2019\u201e\u00ab\u00bb")),
    "opening_bracket": ("an opening bracket", _only("([{")),
    "closing_bracket": ("a closing bracket", _only(")]}")),
    "dash": ("a dash", _only("-\u2013\u2014\u2015")),
    "newline": ("a line break", lambda t: t.isspace() and "\n" in t),
    "space": ("blank space", lambda t: t.isspace() and "\n" not in t),
    "special": ("a special token", lambda t: _SPECIAL.fullmatch(t) is not None),
    "word": ("a word", lambda t: t.strip().isalpha()),
    "digit": ("a token with a digit", lambda t: any(c.isdigit() for c in t)),
    "punctuation": ("punctuation", _is_punctuation),
}

#: Classes no two of which hold one token: the classes that pair with a neighbour.
DISJOINT_CLASSES = tuple(n for n in TOKEN_CLASSES if n not in ("year", "word", "digit", "punctuation"))


@dataclass(frozen=True)
class CodeTable:
    """One text property of every token: `names[codes[i]]` is token i's value, and code -1 says that it has none."""

    names: list[str]
    codes: np.ndarray  # [V] int32
    index: dict[str, int]

    @classmethod
    def of(cls, values: Sequence[str]) -> "CodeTable":
        """Codes in sorted order of the distinct non-empty `values` (one a token)."""
        names = sorted({v for v in values if v})
        index = {name: i for i, name in enumerate(names)}
        return cls(names, np.array([index.get(v, -1) for v in values], np.int32), index)

    @cached_property
    def _by_code(self) -> tuple[np.ndarray, np.ndarray]:
        """([V] tokens by code, ascending; [C + 1] where each code's end; those without a value come first)."""
        return np.argsort(self.codes, kind="stable"), np.cumsum(np.bincount(self.codes + 1, minlength=len(self.names)))

    def members(self, names: Sequence[str]) -> np.ndarray:
        """[n] tokens, ascending, whose value is one of `names`; unknown names hold for no token."""
        order, ends = self._by_code
        codes = [self.index[n] for n in names if n in self.index]
        own = [order[ends[c] : ends[c + 1]] for c in codes]
        return np.zeros(0, np.int64) if not own else own[0] if len(own) == 1 else np.sort(np.concatenate(own))


class Vocabulary:
    """Distinct token texts in sorted order, `V` of them. `token_ids` [N], `texts` [N]: rows of the vocabulary table.

    Raises ValueError where a token id is given twice with different texts.
    """

    def __init__(self, token_ids: Sequence[int], texts: Sequence[str]):
        by_id = dict(zip(token_ids, texts, strict=True))
        if any(by_id[i] != t for i, t in zip(token_ids, texts, strict=True)):
            raise ValueError("the vocabulary gives two texts for one token id")
        self.texts: list[str] = sorted(set(texts))
        self.index: dict[str, int] = {t: i for i, t in enumerate(self.texts)}
        self._ids = np.array(sorted(by_id), np.int64)
        self._text_of_id = np.array([self.index[by_id[int(i)]] for i in self._ids], np.int32)
        self.words = [word_of(t) for t in self.texts]
        self.classes: dict[str, np.ndarray] = {  # name -> [V] bool
            name: np.array([test(t) for t in self.texts], bool) for name, (_, test) in TOKEN_CLASSES.items()
        }
        self.starts_bare = np.array([t[:1].isalpha() for t in self.texts], bool)  # [V] first character is a letter
        self.starts_alpha = np.array([t.lstrip()[:1].isalpha() for t in self.texts], bool)
        self.ends_alpha = np.array([t[-1:].isalpha() for t in self.texts], bool)
        self._tables: dict[tuple[str, int], CodeTable] = {}

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def from_table(cls, vocabulary: pa.Table) -> "Vocabulary":
        """From the evidence table `vocabulary` (columns token_id, token)."""
        return cls(vocabulary["token_id"].to_pylist(), vocabulary["token"].to_pylist())

    def lookup(self, token_ids: np.ndarray) -> np.ndarray:
        """Token ids of any shape -> indices into `texts`, int32. Raises ValueError at an id the vocabulary lacks."""
        if token_ids.size == 0:
            return np.zeros(token_ids.shape, np.int32)
        if len(self._ids) == 0:
            raise ValueError("the vocabulary is empty but windows hold tokens")
        at = np.minimum(np.searchsorted(self._ids, token_ids), len(self._ids) - 1)
        if (self._ids[at] != token_ids).any():
            raise ValueError(f"token id {int(token_ids[self._ids[at] != token_ids][0])} is not in the vocabulary")
        return self._text_of_id[at]

    def table(self, property_name: str, length: int = 0) -> CodeTable:
        """Codes of 'word', 'stem', or the first/last `length` letters of the word ('prefix'/'suffix'). Made once."""
        key = (property_name, length)
        if key not in self._tables:
            self._tables[key] = CodeTable.of(self._values(property_name, length))
        return self._tables[key]

    def _values(self, property_name: str, length: int) -> list[str]:
        if property_name == "word":
            return self.words
        if property_name == "stem":
            names = sorted({w for w in self.words if w.isalpha()})
            stems = dict(zip(names, snowballstemmer.stemmer("english").stemWords(names), strict=True))
            return [stems.get(w, "") for w in self.words]
        assert property_name in ("prefix", "suffix") and length > 0, (property_name, length)
        cut = slice(None, length) if property_name == "prefix" else slice(-length, None)
        return [w[cut] if len(w) >= length and w.isalpha() else "" for w in self.words]


class RowTable:
    """Windows as vocabulary indices: `tokens` [W, T] int32, -1 behind the end of a short window."""

    def __init__(self, vocabulary: Vocabulary, tokens: np.ndarray):
        self.vocabulary = vocabulary
        self.tokens = tokens
        self.valid = tokens >= 0  # [W, T]
        self.tagger: Tagger | None = None  # what tells parts of speech, where a configuration names one

    @classmethod
    def from_texts(cls, windows: Sequence[Sequence[str]]) -> "RowTable":
        """From token texts, one list a window: the way to run a predicate on text that is in no evidence folder."""
        texts = sorted({t for w in windows for t in w})
        vocabulary = Vocabulary(range(len(texts)), texts)
        return cls(vocabulary, _padded([[vocabulary.index[t] for t in w] for w in windows]))

    @classmethod
    def from_windows(cls, vocabulary: Vocabulary, token_ids: pa.ChunkedArray) -> "RowTable":
        """From column `token_ids` of the evidence table `windows`."""
        return cls(vocabulary, pad_lists(token_ids, vocabulary.lookup))

    @cached_property
    def segments(self) -> np.ndarray:
        """[R] int32: rows of one document in one window have one number; a special token begins the next one."""
        begins = np.append(self.vocabulary.classes["special"], False)[self.tokens]
        begins[:, :1] = True
        return np.cumsum(begins.ravel(), dtype=np.int32)

    @cached_property
    def parts(self) -> "Parts":
        """Parts of speech of all rows. Raises PartOfSpeechError where nothing tells them."""
        if self.tagger is None:
            from .part_of_speech import PartOfSpeechError

            raise PartOfSpeechError("a label is about parts of speech: set label.part_of_speech, as when it was made")
        return self.tagger.parts(self)

    @cached_property
    def segment_ends(self) -> np.ndarray:
        """[S]: the row behind the last of every segment."""
        return np.cumsum(np.bincount(self.segments))

    @cached_property
    def _by_token(self) -> tuple[np.ndarray, np.ndarray]:
        """([R] rows by token, ascending; [V + 1] where each token's end; those of no token come first)."""
        flat = self.tokens.ravel()
        return np.argsort(flat, kind="stable"), np.cumsum(np.bincount(flat + 1, minlength=len(self.vocabulary) + 1))

    def rows_of(self, tokens: np.ndarray) -> np.ndarray:
        """[m] rows, ascending, whose token is one of `tokens`."""
        order, ends = self._by_token
        own = [order[ends[t] : ends[t + 1]] for t in tokens.tolist()]
        return np.zeros(0, np.int64) if not own else own[0] if len(own) == 1 else np.sort(np.concatenate(own))

    def neighbour(self, rows: np.ndarray, offset: int) -> np.ndarray:
        """[W, T] bool: `rows` read at position + offset (-1 previous, +1 next); False where there is no such token."""
        out = np.zeros_like(rows)
        if abs(offset) >= rows.shape[1]:
            return out
        if offset < 0:
            out[:, -offset:] = rows[:, :offset]
        else:
            out[:, :-offset] = rows[:, offset:]
        return out & self.valid


def _padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    width = max((len(x) for x in lists), default=0)
    return np.array([[*x, *[-1] * (width - len(x))] for x in lists], np.int32).reshape(len(lists), width)


def pad_lists(column: pa.ChunkedArray, convert: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> np.ndarray:
    """A list<int32> column as [W, T] int32, T the longest list, short ones padded with -1; `convert` maps values."""
    lengths = np.asarray(column.combine_chunks().value_lengths().to_numpy(zero_copy_only=False), np.int64)
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    out = np.full((len(lengths), int(lengths.max(initial=0))), -1, np.int32)
    out[np.arange(out.shape[1]) < lengths[:, None]] = convert(flat)
    return out
