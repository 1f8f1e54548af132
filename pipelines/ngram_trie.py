"""N-grams with wildcards as a trie that is read backwards from the row: which rows do any of the patterns end on?

A pattern is a tuple of token texts in the order of the text, None where any token may stand; its last entry is the row
itself. `(" United", " States")` holds on " States" after " United", `(" the", None)` on any token after " the".
Patterns with a common ending share its nodes, so what they have in common is looked up once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .token_classes import RowTable

Pattern = tuple[str | None, ...]
#: Token index of the vocabulary -> the rows (flat, ascending) that have it.
RowsOf = Callable[[int], np.ndarray]


@dataclass
class _Node:
    children: dict[str | None, "_Node"] = field(default_factory=dict)
    is_end: bool = False


def check_pattern(pattern: object) -> None:
    """Raises ValueError unless `pattern` is a tuple of texts and None that begins with a text."""
    texts = pattern if isinstance(pattern, tuple) else ()
    if not texts or not all(t is None or (isinstance(t, str) and t) for t in texts):
        raise ValueError(f"an n-gram must be a non-empty list of token texts and null, not {pattern!r}")
    if texts[0] is None:
        raise ValueError(f"an n-gram must not begin with a wildcard, which says nothing: {list(texts)!r}")


def trimmed(tokens: Iterable[str | None]) -> Pattern:
    """The pattern without wildcards at its beginning; empty where there is nothing else."""
    kept = list(tokens)
    while kept and kept[0] is None:
        del kept[0]
    return tuple(kept)


class TokenIndex:
    """The rows of every token of `windows`, found once for many patterns."""

    def __init__(self, windows: RowTable):
        flat = windows.tokens.ravel()
        self._order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat + 1, minlength=len(windows.vocabulary) + 1)  # the first is "no token"
        self._ends = np.cumsum(counts)

    def __call__(self, token: int) -> np.ndarray:
        return self._order[self._ends[token] : self._ends[token + 1]]


class NgramTrie:
    """The patterns of one label. Raises ValueError where one of them is no pattern."""

    def __init__(self, patterns: Iterable[Pattern]):
        self._root = _Node()
        for pattern in patterns:
            check_pattern(pattern)
            node = self._root
            for text in reversed(pattern):
                node = node.children.setdefault(text, _Node())
            node.is_end = True

    def matches(self, windows: RowTable, rows_of: RowsOf | None = None) -> np.ndarray:
        """[m] distinct flat rows (window * T + position) of `windows` [W, T] that a pattern ends on, in any order."""
        flat = windows.tokens.ravel()
        find = rows_of or (lambda token: np.flatnonzero(flat == token))
        found = [rows for rows in _walk(self._root, None, 0, windows, flat, find) if len(rows)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def rows(self, windows: RowTable) -> np.ndarray:
        """[W, T] bool: the rows that a pattern ends on."""
        out = np.zeros(windows.tokens.size, bool)
        out[self.matches(windows)] = True
        return out.reshape(windows.tokens.shape)


def _walk(node: _Node, rows: np.ndarray | None, depth: int, windows: RowTable, flat: np.ndarray, find: RowsOf):
    """Rows that hold so far (None: all, nothing was asked yet), `depth` tokens behind the row being asked next."""
    if node.is_end and rows is not None:
        yield rows
    width = windows.tokens.shape[1]
    for text, child in node.children.items():
        if text is None:
            yield from _walk(child, rows, depth + 1, windows, flat, find)
            continue
        token = windows.vocabulary.index.get(text)
        if token is None:
            continue
        if rows is None:  # the row itself may be a wildcard: it must be in the same window, and there
            kept = find(token)
            if depth:
                kept = kept[kept % width < width - depth] + depth
                kept = kept[flat[kept] >= 0]
        else:
            kept = rows[rows % width >= depth]
            kept = kept[flat[kept - depth] == token]
        if len(kept):
            yield from _walk(child, kept, depth + 1, windows, flat, find)
