"""Predicates that read more than the row's own token: place, pieces, neighbours, the last tokens, n-grams; and, not."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .ngram_trie import NgramTrie, Pattern, check_pattern
from .part_predicates import PartOfSpeech
from .predicate_base import Predicate, TokenPredicate, quoted
from .token_classes import RowTable


@dataclass(frozen=True)
class Piece(Predicate):
    """A piece of a word: 'continues' = begins with a letter right behind a letter, 'starts' = any other."""

    name: ClassVar[str] = "piece"
    kind: ClassVar[str] = "structural"
    part: str

    def __post_init__(self):
        if self.part not in ("starts", "continues"):
            raise ValueError(f"a piece 'starts' or 'continues' a word, not {self.part!r}")

    def rows(self, windows: RowTable) -> np.ndarray:
        v = windows.vocabulary
        letter_before = windows.neighbour(np.append(v.ends_alpha, False)[windows.tokens], -1)
        continues = np.append(v.starts_bare, False)[windows.tokens] & letter_before
        if self.part == "continues":
            return continues
        return np.append(v.starts_alpha, False)[windows.tokens] & ~continues

    def describe(self) -> str:
        return "the first piece of a word" if self.part == "starts" else "a later piece of a word"

    @property
    def complexity(self) -> float:
        return 1.3


@dataclass(frozen=True)
class Position(Predicate):
    """The row is among the first `first_n` positions of its window."""

    name: ClassVar[str] = "position"
    kind: ClassVar[str] = "structural"
    first_n: int

    def __post_init__(self):
        if type(self.first_n) is not int or self.first_n < 1:
            raise ValueError(f"first_n must be a whole number of at least 1, not {self.first_n!r}")

    def rows(self, windows: RowTable) -> np.ndarray:
        return windows.valid & (np.arange(windows.tokens.shape[1]) < self.first_n)

    def describe(self) -> str:
        return f"the first {self.first_n} tokens of a window"

    @property
    def complexity(self) -> float:
        return 1.3


#: How many tokens away a neighbour may be, and the last tokens that `Recent` may look at.
MAX_OFFSET, MAX_RECENT = 4, 64
_TIMES = {2: ("second", "two tokens"), 3: ("third", "three tokens"), 4: ("fourth", "four tokens")}


@dataclass(frozen=True)
class Neighbour(Predicate):
    """`of` holds for the token `offset` places on in the window: -1 the previous one, 1 the next, up to four away."""

    name: ClassVar[str] = "neighbour"
    kind: ClassVar[str] = "structural"
    offset: int
    of: TokenPredicate

    def __post_init__(self):
        if type(self.offset) is not int or not 1 <= abs(self.offset) <= MAX_OFFSET:
            raise ValueError(f"a neighbour is at an offset from -{MAX_OFFSET} to {MAX_OFFSET}, not {self.offset!r}")
        if not isinstance(self.of, TokenPredicate):
            raise ValueError(f"a neighbour is described by a predicate of one token, not {self.of!r}")

    def rows(self, windows: RowTable) -> np.ndarray:
        return windows.neighbour(self.of.rows(windows), self.offset)

    def at(self, windows: RowTable, rows: np.ndarray) -> np.ndarray:
        width = windows.tokens.shape[1]
        place = rows % width + self.offset
        inside = (place >= 0) & (place < width) & windows.valid.ravel()[rows]
        inside[inside] = self.of.at(windows, rows[inside] + self.offset)
        return inside

    def matches(self, windows: RowTable) -> np.ndarray:
        width = windows.tokens.shape[1]
        beside = self.of.matches(windows)
        place = beside % width - self.offset
        rows = beside[(place >= 0) & (place < width)] - self.offset
        return rows[windows.valid.ravel()[rows]]

    def describe(self) -> str:
        place = f"{_TIMES[abs(self.offset)][0]} token" if abs(self.offset) > 1 else "token"
        return f"the {place} {self._side} {self.of.noun}"

    @property
    def _side(self) -> str:
        return "after" if self.offset < 0 else "before"

    @property
    def relation(self) -> str:
        """'after " the"', 'before a number', 'two tokens after " a"'."""
        away = f"{_TIMES[abs(self.offset)][1]} " if abs(self.offset) > 1 else ""
        return f"{away}{self._side} {self.of.noun}"

    @property
    def complexity(self) -> float:
        return 0.3 + 0.1 * abs(self.offset) + self.of.complexity


@dataclass(frozen=True)
class Recent(Predicate):
    """`of` holds for one of the `last` tokens of the document, the row's own included.

    A separator of documents (a special token) ends what is looked at, and so does the beginning of the window.
    """

    name: ClassVar[str] = "recent"
    kind: ClassVar[str] = "structural"
    of: TokenPredicate
    last: int

    def __post_init__(self):
        if not isinstance(self.of, TokenPredicate):
            raise ValueError(f"recent tokens are described by a predicate of one token, not {self.of!r}")
        if type(self.last) is not int or not 2 <= self.last <= MAX_RECENT:
            raise ValueError(f"recent tokens are the last 2 to {MAX_RECENT}, not {self.last!r}")

    def rows(self, windows: RowTable) -> np.ndarray:
        out = np.zeros(windows.tokens.size, bool)
        out[self.matches(windows)] = True
        return out.reshape(windows.tokens.shape)

    def matches(self, windows: RowTable) -> np.ndarray:
        sources = self.of.matches(windows)
        # what each holds on, up to the next one, the end of the document and `last` tokens
        ends = np.minimum(sources + self.last, windows.segment_ends[windows.segments[sources]])
        ends[:-1] = np.minimum(ends[:-1], sources[1:])
        lengths = ends - sources
        rows = np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(int(lengths.sum()))
        return rows[windows.valid.ravel()[rows]]

    def at(self, windows: RowTable, rows: np.ndarray) -> np.ndarray:
        segments, out = windows.segments, np.zeros(len(rows), bool)
        holds = np.append(self.of.tokens(windows.vocabulary), False)
        for step in range(self.last):
            sources = np.maximum(rows - step, 0)
            inside = (rows >= step) & (segments[sources] == segments[rows])
            out |= inside & holds[windows.tokens.ravel()[sources]]
        return out & windows.valid.ravel()[rows]

    def describe(self) -> str:
        return f"{self.of.describe()} among the last {self.last} tokens"

    @property
    def complexity(self) -> float:
        return 0.5 + self.of.complexity


@dataclass(frozen=True)
class Not(Predicate):
    """`of` does not hold; `of` is not itself made of others."""

    name: ClassVar[str] = "not"
    kind: ClassVar[str] = "structural"
    of: Predicate

    def __post_init__(self):
        if not isinstance(self.of, Predicate) or isinstance(self.of, (Both, Either, Not)):
            raise ValueError(f"a negation takes a predicate that is not made of others, not {self.of!r}")

    def rows(self, windows: RowTable) -> np.ndarray:
        return windows.valid & ~self.of.rows(windows)

    def at(self, windows: RowTable, rows: np.ndarray) -> np.ndarray:
        return windows.valid.ravel()[rows] & ~self.of.at(windows, rows)

    def describe(self) -> str:
        return f"anything but {self.of.describe()}"

    @property
    def complexity(self) -> float:
        return 0.2 + self.of.complexity


@dataclass(frozen=True)
class _Pair(Predicate):
    """Two predicates taken together: lexical where both are."""

    first: Predicate
    second: Predicate

    @property
    def kind(self) -> str:  # type: ignore[override]  # depends on the parts
        return "lexical" if {self.first.kind, self.second.kind} == {"lexical"} else "structural"


@dataclass(frozen=True)
class Both(_Pair):
    """`first` and `second` hold; neither is itself a conjunction or an alternative."""

    name: ClassVar[str] = "both"

    def __post_init__(self):
        for part in (self.first, self.second):
            if not isinstance(part, Predicate) or isinstance(part, (Both, Either)):
                raise ValueError(
                    f"a conjunction takes two predicates that are no conjunctions or alternatives, not {part!r}"
                )

    def rows(self, windows: RowTable) -> np.ndarray:
        return self.first.rows(windows) & self.second.rows(windows)

    def at(self, windows: RowTable, rows: np.ndarray) -> np.ndarray:
        out = self.first.at(windows, rows)
        out[out] = self.second.at(windows, rows[out])
        return out

    def matches(self, windows: RowTable) -> np.ndarray:
        rows = self.first.matches(windows)
        return rows[self.second.at(windows, rows)]

    def describe(self) -> str:
        first, second = self.first.describe(), self.second
        inner = second.of if isinstance(second, Not) else second
        if isinstance(inner, Neighbour | PartOfSpeech):
            return f"{first} {'not ' if second is not inner else ''}{inner.relation}"
        if isinstance(inner, Recent):
            return f"{first} {'without' if second is not inner else 'with'} {inner.describe()}"
        return f"{first}, only where also {second.describe()}"

    @property
    def complexity(self) -> float:
        return 0.75 * (self.first.complexity + self.second.complexity)


@dataclass(frozen=True)
class Either(_Pair):
    """`first` or `second` holds; neither is itself an alternative."""

    name: ClassVar[str] = "either"

    def __post_init__(self):
        for part in (self.first, self.second):
            if not isinstance(part, Predicate) or isinstance(part, Either):
                raise ValueError(f"an alternative takes two predicates that are not alternatives, not {part!r}")

    def rows(self, windows: RowTable) -> np.ndarray:
        return self.first.rows(windows) | self.second.rows(windows)

    def at(self, windows: RowTable, rows: np.ndarray) -> np.ndarray:
        out = ~self.first.at(windows, rows)
        out[out] = ~self.second.at(windows, rows[out])
        return ~out

    def matches(self, windows: RowTable) -> np.ndarray:
        return np.union1d(self.first.matches(windows), self.second.matches(windows))

    def describe(self) -> str:
        return f"{self.first.describe()}; or {self.second.describe()}"

    @property
    def complexity(self) -> float:
        return 0.2 + self.first.complexity + self.second.complexity


#: Patterns that a label spells out; `predicate` has all of them.
DESCRIBED_PATTERNS = 6


@dataclass(frozen=True)
class NGrams(Predicate):
    """One of the patterns ends on the row; a pattern is a list of token texts, null where any token may stand."""

    name: ClassVar[str] = "ngrams"
    patterns: tuple[Pattern, ...]

    def __post_init__(self):
        if not (isinstance(self.patterns, tuple) and self.patterns):
            raise ValueError(f"n-grams must be a non-empty list of patterns, not {self.patterns!r}")
        for pattern in self.patterns:
            check_pattern(pattern)
        if len(set(self.patterns)) != len(self.patterns):
            raise ValueError(f"n-grams name a pattern twice: {self.patterns!r}")

    @property
    def kind(self) -> str:  # type: ignore[override]  # depends on the patterns
        return "lexical" if all(len(p) == 1 for p in self.patterns) else "structural"

    def rows(self, windows: RowTable) -> np.ndarray:
        return NgramTrie(self.patterns).rows(windows)

    def describe(self) -> str:
        shown = [" ".join("*" if t is None else quoted(t) for t in p) for p in self.patterns[:DESCRIBED_PATTERNS]]
        rest = len(self.patterns) - len(shown)
        more = f" or {rest} more" if rest else ""
        return f"n-gram{'s' if len(self.patterns) > 1 else ''} {' | '.join(shown)}{more}"

    @property
    def complexity(self) -> float:
        return 2.0 + 0.1 * sum(len(p) for p in self.patterns)
