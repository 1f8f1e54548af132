"""Predicates that read the row's own token: a text, a set, a word, stems, a beginning or ending, a class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .predicate_base import TokenPredicate, check_texts, quoted
from .token_classes import TOKEN_CLASSES, Vocabulary


def _ascending(vocabulary: Vocabulary, texts: Sequence[str]) -> np.ndarray:
    return np.array(sorted(vocabulary.index[t] for t in texts if t in vocabulary.index), np.int64)


@dataclass(frozen=True)
class Token(TokenPredicate):
    """The token's text is exactly `text`, leading space included."""

    name: ClassVar[str] = "token"
    text: str

    def __post_init__(self):
        check_texts((self.text,), "token text")

    def ids(self, vocabulary: Vocabulary) -> np.ndarray:
        return _ascending(vocabulary, (self.text,))

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
        check_texts(self.texts, "token texts")

    def ids(self, vocabulary: Vocabulary) -> np.ndarray:
        return _ascending(vocabulary, self.texts)

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
        check_texts((self.word,), "word")
        if self.word != self.word.strip().casefold():
            raise ValueError(f"word must be stripped and case-folded, not {self.word!r}")

    def ids(self, vocabulary: Vocabulary) -> np.ndarray:
        return vocabulary.table("word").members((self.word,))

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
        check_texts(self.stems, "stems")

    def ids(self, vocabulary: Vocabulary) -> np.ndarray:
        return vocabulary.table("stem").members(self.stems)

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
        check_texts((self.letters,), "affix letters")

    def ids(self, vocabulary: Vocabulary) -> np.ndarray:
        return vocabulary.table(self.where, len(self.letters)).members((self.letters,))

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

    def ids(self, vocabulary: Vocabulary) -> np.ndarray:
        return np.flatnonzero(vocabulary.classes[self.token_class])

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        return vocabulary.classes[self.token_class]

    def describe(self) -> str:
        return TOKEN_CLASSES[self.token_class][0]

    @property
    def complexity(self) -> float:
        return 1.05 + 0.001 * list(TOKEN_CLASSES).index(self.token_class)  # narrow classes first
