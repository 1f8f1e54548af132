"""What a predicate is: the rows on which it holds, the label a reader sees, its JSON; and those of one token alone."""

import json
import unicodedata
from dataclasses import fields
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from .token_classes import RowTable, Vocabulary

#: Tokens whose rows are put together one by one.
MOST_TOKENS = 64


@lru_cache(maxsize=1 << 16)
def quoted(text: str) -> str:
    """Token text in double quotes; control, format (bidi) and unassigned characters escaped as in JSON."""
    readable = json.dumps(text, ensure_ascii=False)
    return "".join(json.dumps(c)[1:-1] if unicodedata.category(c)[0] == "C" else c for c in readable)


def check_texts(value: object, what: str) -> None:
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

    def at(self, windows: RowTable, rows: np.ndarray) -> np.ndarray:
        """[n] bool: whether it holds on each of `rows` [n], window * T + position; the same as `rows` without all."""
        return self.rows(windows).ravel()[rows]

    def matches(self, windows: RowTable) -> np.ndarray:
        """[m] the rows on which it holds, ascending, window * T + position: fast where they are few."""
        return np.flatnonzero(self.rows(windows))

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
        from .predicates import predicate_of  # which knows all of them

        return predicate_of(data)


class TokenPredicate(Predicate):
    """A predicate that reads the row's own token only."""

    def ids(self, vocabulary: Vocabulary) -> np.ndarray:
        """[n] indices into `vocabulary.texts`, ascending: the tokens on which it holds."""
        raise NotImplementedError

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        """[V] bool over `vocabulary.texts`."""
        return self._mask(vocabulary)[:-1]

    def _mask(self, vocabulary: Vocabulary) -> np.ndarray:
        """[V + 1], so that index -1 (no token) reads False."""
        out = np.zeros(len(vocabulary) + 1, bool)
        out[self.ids(vocabulary)] = True
        return out

    def rows(self, windows: RowTable) -> np.ndarray:
        return self._mask(windows.vocabulary)[windows.tokens]

    def at(self, windows: RowTable, rows: np.ndarray) -> np.ndarray:
        return self._mask(windows.vocabulary)[windows.tokens.ravel()[rows]]

    def matches(self, windows: RowTable) -> np.ndarray:
        tokens = self.ids(windows.vocabulary)
        return windows.rows_of(tokens) if len(tokens) <= MOST_TOKENS else np.flatnonzero(self.rows(windows))

    @property
    def noun(self) -> str:
        """How the token reads after 'after': 'after " the"', 'after a number'."""
        return self.describe()
