"""A stretch of a window around a row as plain text for a prompt, with any of its tokens marked.

The row stands anywhere in the stretch, decided by a hash of its number: neither the place of a mark nor the length of
what stands before it says anything about whether a feature is active there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..token_classes import RowTable
from .prompts import marked, plain

SNIPPET_TOKENS = 24


@dataclass(frozen=True)
class Snippet:
    """Some positions of one window; `spans` holds the characters of each in `text`."""

    window: int
    positions: range
    text: str  # plain
    spans: list[tuple[int, int]]

    def rows(self, width: int) -> np.ndarray:
        """[n] row numbers of its positions in windows of `width` tokens."""
        return self.window * width + np.array(self.positions)

    def with_marks(self, positions: Sequence[int]) -> str:
        """The text with << >> around the whole words that `positions` belong to; neighbours share a mark."""
        spans: list[tuple[int, int]] = []
        for start, stop in sorted(self._word(p) for p in positions if p in self.positions):
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
            else:
                spans.append((start, stop))
        return marked(self.text, spans)

    def token(self, position: int) -> str:
        """Text of one position, as it stands in `text`."""
        start, stop = self.spans[position - self.positions.start]
        return self.text[start:stop].strip()

    def _word(self, position: int) -> tuple[int, int]:
        start, stop = self.spans[position - self.positions.start]
        if self.text[start:stop][:1].isalnum():
            while start > 0 and self.text[start - 1].isalnum():
                start -= 1
        if self.text[start:stop][-1:].isalnum():
            while stop < len(self.text) and self.text[stop].isalnum():
                stop += 1
        return start, stop


def cut(windows: RowTable, row: int, *, tokens: int = SNIPPET_TOKENS, centred: bool = False) -> Snippet:
    """About `tokens` tokens of the row's window with the row among them, up to special tokens and whole words.

    `centred`: the row in the middle, as far as the window allows, instead of anywhere.
    """
    window, position = divmod(int(row), windows.tokens.shape[1])
    own = windows.tokens[window]
    texts, special = windows.vocabulary.texts, windows.vocabulary.classes["special"]
    is_border = np.where(own >= 0, special[np.maximum(own, 0)], True)
    first = last = position
    if not is_border[position]:
        before, after = np.flatnonzero(is_border[:position]), np.flatnonzero(is_border[position:])
        first = int(before[-1]) + 1 if len(before) else 0
        last = position + int(after[0]) - 1 if len(after) else len(own) - 1
    low = max(first, position - tokens + 1)
    high = max(low, min(position, last - tokens + 1))
    start = min(max(position - tokens // 2, low), high) if centred else low + int(_share(row) * (high - low + 1))
    stop = min(start + tokens, last + 1)
    joins = [texts[own[p - 1]][-1:].isalnum() and texts[own[p]][:1].isalnum() for p in range(first + 1, last + 1)]
    while start > first and joins[start - first - 1]:
        start -= 1
    while stop <= last and joins[stop - first - 1]:
        stop += 1
    pieces = [texts[t] for t in own[start:stop].tolist()]
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    return Snippet(window, range(start, stop), plain("".join(pieces)), spans)


def _share(row: int) -> float:
    """A number in [0, 1) that looks random and depends on the row alone."""
    mixed = (int(row) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & (2**64 - 1)
    mixed ^= mixed >> 31
    return ((mixed * 0xBF58476D1CE4E5B9) & (2**64 - 1)) / 2**64
