"""Executable predicates over a row (one position of one window): what a label claims is what its predicate computes.

    token " bank"            Token(" bank")                      lexical
    word "river" (any case)  Word("river")                       lexical
    words with stem "walk"   Stems(("walk",))                    lexical
    words ending in -ing     Affix("suffix", "ing")              lexical
    a number                 TokenClass("number")                structural
    the token after " the"   Neighbour(-1, Token(" the"))        structural
    token "," after a number Both(Token(","), Neighbour(-1, TokenClass("number")))  structural
    n-gram " United" " States"   NGrams(((" United", " States"),))   structural

The *word* of a token is its text, stripped and case-folded; a token is often only a piece of what a reader calls a
word.
`predicate.to_json()` and `Predicate.from_json(text)` are inverse to each other.
"""

import json
import unicodedata
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from .ngram_trie import NgramTrie, Pattern, check_pattern
from .token_classes import TOKEN_CLASSES, RowTable, Vocabulary


def quoted(text: str) -> str:
    """Token text in double quotes; control, format (bidi) and unassigned characters escaped as in JSON."""
    readable = json.dumps(text, ensure_ascii=False)
    return "".join(json.dumps(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in readable)


def _check_texts(value: object, what: str) -> None:
    if not (isinstance(value, tuple) and value and all(isinstance(v, str) and v for v in value)):
        raise ValueError(f"{what} must be a non-empty list of texts, not {value!r}")
    if len(set(value)) != len(value):
        raise ValueError(f"{what} names a text twice: {value!r}")


class Predicate:
    """Base of all predicates: frozen dataclasses, hashable, equal where their JSON is equal."""

    name: ClassVar[str]
    kind: ClassVar[str] = "lexical"  # of labels: 'lexical' | 'structural'

    def rows(self, windows: RowTable) -> np.ndarray:
        """[W, T] bool: the rows on which the predicate holds; never behind the end of a short window."""
        raise NotImplementedError

    def describe(self) -> str:
        """The label a reader sees."""
        raise NotImplementedError

    @property
    def complexity(self) -> float:
        """Of two predicates that predict equally well the one with the lower value is taken."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: {"type": name, field: value, ...}."""
        out: dict[str, Any] = {"type": self.name}
        for f in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, f.name)
            out[f.name] = value.to_dict() if isinstance(value, Predicate) else value
        return out

    def to_json(self) -> str:
        """Compact JSON, what labels store in column `predicate`."""
        return json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Predicate":
        """Inverse of `to_json`. Raises ValueError where the text is not a predicate this version can run."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a predicate must be JSON: {error}") from error
        return _from_dict(data)


def _from_dict(data: object) -> Predicate:
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise ValueError(f"a predicate must be an object with a 'type', not {data!r}")
    made = PREDICATES.get(data["type"])
    if made is None:
        raise ValueError(f"unknown predicate type {data['type']!r}; known: {', '.join(PREDICATES)}")
    wanted = {f.name for f in fields(made)}  # type: ignore[arg-type]
    given = set(data) - {"type"}
    if wanted != given:
        raise ValueError(f"predicate {data['type']!r} takes {sorted(wanted)}, not {sorted(given)}")
    values = {key: _from_dict(v) if isinstance(v, dict) else _tuples(v) for key, v in data.items() if key != "type"}
    return made(**values)


def _tuples(value: object) -> object:
    """JSON's lists as tuples, at any depth."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class TokenPredicate(Predicate):
    """A predicate that reads the row's own token only."""

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        """[V] bool over `vocabulary.texts`."""
        raise NotImplementedError

    def rows(self, windows: RowTable) -> np.ndarray:
        # [V + 1], so that index -1 (no token) reads False.
        return np.append(self.tokens(windows.vocabulary), False)[windows.tokens]

    @property
    def noun(self) -> str:
        """How the token reads after 'after': 'after " the"', 'after a number'."""
        return self.describe()


@dataclass(frozen=True)
class Token(TokenPredicate):
    """The token's text is exactly `text`, leading space included."""

    name: ClassVar[str] = "token"
    text: str

    def __post_init__(self):
        _check_texts((self.text,), "token text")

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        out = np.zeros(len(vocabulary), bool)
        if self.text in vocabulary.index:
            out[vocabulary.index[self.text]] = True
        return out

    def describe(self) -> str:
        return f"token {quoted(self.text)}"

    @property
    def noun(self) -> str:
        return quoted(self.text)

    @property
    def complexity(self) -> float:
        return 1.0


@dataclass(frozen=True)
class TokenSet(TokenPredicate):
    """The token's text is one of `texts`."""

    name: ClassVar[str] = "token_set"
    texts: tuple[str, ...]

    def __post_init__(self):
        _check_texts(self.texts, "token texts")

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        out = np.zeros(len(vocabulary), bool)
        out[[vocabulary.index[t] for t in self.texts if t in vocabulary.index]] = True
        return out

    def describe(self) -> str:
        return "one of " + ", ".join(quoted(t) for t in self.texts)

    @property
    def complexity(self) -> float:
        return 2.0 + 0.1 * len(self.texts)


@dataclass(frozen=True)
class Word(TokenPredicate):
    """The token's word (stripped, case-folded) is `word`."""

    name: ClassVar[str] = "word"
    word: str

    def __post_init__(self):
        _check_texts((self.word,), "word")
        if self.word != self.word.strip().casefold():
            raise ValueError(f"word must be stripped and case-folded, not {self.word!r}")

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        return vocabulary.table("word").mask((self.word,))

    def describe(self) -> str:
        return f"word {quoted(self.word)} (any case)"

    @property
    def complexity(self) -> float:
        return 1.1


@dataclass(frozen=True)
class Stems(TokenPredicate):
    """The Snowball (English) stem of the token's word is one of `stems`."""

    name: ClassVar[str] = "stems"
    stems: tuple[str, ...]

    def __post_init__(self):
        _check_texts(self.stems, "stems")

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        return vocabulary.table("stem").mask(self.stems)

    def describe(self) -> str:
        listed = ", ".join(quoted(s) for s in self.stems)
        return f"words with stem {listed}" if len(self.stems) == 1 else f"words with one of the stems {listed}"

    @property
    def complexity(self) -> float:
        return 1.2 if len(self.stems) == 1 else 2.05 + 0.1 * len(self.stems)


@dataclass(frozen=True)
class Affix(TokenPredicate):
    """The token's word is all letters and begins ('prefix') or ends ('suffix') with `letters`."""

    name: ClassVar[str] = "affix"
    where: str
    letters: str

    def __post_init__(self):
        if self.where not in ("prefix", "suffix"):
            raise ValueError(f"an affix is a 'prefix' or a 'suffix', not {self.where!r}")
        _check_texts((self.letters,), "affix letters")

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        return vocabulary.table(self.where, len(self.letters)).mask((self.letters,))

    def describe(self) -> str:
        return f"words starting with {self.letters}-" if self.where == "prefix" else f"words ending in -{self.letters}"

    @property
    def complexity(self) -> float:
        return 1.3


@dataclass(frozen=True)
class TokenClass(TokenPredicate):
    """The token is of one class of `token_classes.TOKEN_CLASSES` (case, digits, punctuation, white space)."""

    name: ClassVar[str] = "class"
    kind: ClassVar[str] = "structural"
    token_class: str

    def __post_init__(self):
        if not isinstance(self.token_class, str) or self.token_class not in TOKEN_CLASSES:
            raise ValueError(f"unknown token class {self.token_class!r}; known: {', '.join(TOKEN_CLASSES)}")

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        return vocabulary.classes[self.token_class]

    def describe(self) -> str:
        return TOKEN_CLASSES[self.token_class][0]

    @property
    def complexity(self) -> float:
        return 1.05 + 0.001 * list(TOKEN_CLASSES).index(self.token_class)  # narrow classes first


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


@dataclass(frozen=True)
class Neighbour(Predicate):
    """`of` holds for the previous (`offset` -1) or next (+1) token of the window."""

    name: ClassVar[str] = "neighbour"
    kind: ClassVar[str] = "structural"
    offset: int
    of: TokenPredicate

    def __post_init__(self):
        if type(self.offset) is not int or self.offset not in (-1, 1):
            raise ValueError(f"a neighbour is at offset -1 or 1, not {self.offset!r}")
        if not isinstance(self.of, TokenPredicate):
            raise ValueError(f"a neighbour is described by a predicate of one token, not {self.of!r}")

    def rows(self, windows: RowTable) -> np.ndarray:
        return windows.neighbour(self.of.rows(windows), self.offset)

    def describe(self) -> str:
        return f"the token {self.relation}"

    @property
    def relation(self) -> str:
        """'after " the"', 'before a number'."""
        return f"{'after' if self.offset < 0 else 'before'} {self.of.noun}"

    @property
    def complexity(self) -> float:
        return 1.4


@dataclass(frozen=True)
class Both(Predicate):
    """`first` and `second` hold; neither is itself a conjunction."""

    name: ClassVar[str] = "both"
    first: Predicate
    second: Predicate

    def __post_init__(self):
        for part in (self.first, self.second):
            if not isinstance(part, Predicate) or isinstance(part, Both):
                raise ValueError(f"a conjunction takes two predicates that are not conjunctions, not {part!r}")

    @property
    def kind(self) -> str:  # type: ignore[override]  # depends on the parts
        return "lexical" if {self.first.kind, self.second.kind} == {"lexical"} else "structural"

    def rows(self, windows: RowTable) -> np.ndarray:
        return self.first.rows(windows) & self.second.rows(windows)

    def describe(self) -> str:
        if isinstance(self.second, Neighbour):
            return f"{self.first.describe()} {self.second.relation}"
        return f"{self.first.describe()}, only where also {self.second.describe()}"

    @property
    def complexity(self) -> float:
        return 0.75 * (self.first.complexity + self.second.complexity)


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


#: JSON type name -> class.
PREDICATES: dict[str, type[Predicate]] = {
    p.name: p for p in (Token, TokenSet, Word, Stems, Affix, TokenClass, Piece, Position, Neighbour, Both, NGrams)
}
