"""Candidate predicates of parts of speech, made on train: of the row's token or one beside it."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from .candidate_counts import Counter, Pairs, shifted
from .part_predicates import PartOfSpeech
from .predicates import Both, Predicate, Token

#: Whose part of speech: the row's own token, the previous, the next.
OFFSETS = (0, -1, 1)


def part_families(counter: Counter) -> Iterator[tuple[Pairs, Callable[[int], Predicate]]]:
    """Nothing where the windows are not tagged."""
    windows = counter.windows
    if windows.tagger is None:
        return
    texts, parts = windows.vocabulary.texts, windows.parts
    num = len(parts.names)
    tokens = windows.tokens.astype(np.int64)
    for offset in OFFSETS:
        codes = shifted(parts.codes.astype(np.int64), offset) if offset else parts.codes.astype(np.int64)
        yield counter.pairs(codes.ravel(), num), partial(lambda c, o: PartOfSpeech(parts.names[c], o), o=offset)
        together = np.where((tokens >= 0) & (codes >= 0), tokens * num + codes, -1)
        yield (
            counter.pairs(together.ravel(), len(texts) * num),
            partial(lambda c, o: Both(Token(texts[c // num]), PartOfSpeech(parts.names[c % num], o)), o=offset),
        )
