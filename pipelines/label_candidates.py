"""Candidate predicates for every feature, made by counting on one split (train).

A *family* is one question with many answers ("which token?", "which previous token?"): a code a row, counted for all
features at once (`candidate_counts.py`). What stands around a row beyond its next neighbour, and what narrows a token
down, is in `context_candidates.py`. Nothing here looks at another split.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from .alternative_candidates import alternatives
from .candidate_counts import Beside, CandidateLimits, Counter, Found, Pairs, best_sets, disjoint_class_of
from .context_candidates import context_candidates
from .part_candidates import part_families
from .predicates import Affix, Both, Neighbour, Piece, Position, Predicate, Stems, Token, TokenClass, TokenSet, Word
from .recent_candidates import recent_candidates
from .split_rows import ActiveRows
from .token_classes import DISJOINT_CLASSES, TOKEN_CLASSES, RowTable

AFFIX_LENGTHS = {"suffix": (2, 3, 4), "prefix": (3, 4, 5)}
POSITIONS = (2, 4, 8, 16)

_Family = tuple[Pairs, Callable[[int], Predicate]]


def _token_families(counter: Counter, tokens: Pairs) -> Iterator[_Family]:
    """Families that read the row's own token, from token counts."""
    vocabulary = counter.windows.vocabulary
    yield tokens, lambda c: Token(vocabulary.texts[c])
    words, stems = vocabulary.table("word"), vocabulary.table("stem")
    yield tokens.regroup(words.codes, len(words.names)), lambda c: Word(words.names[c])
    yield tokens.regroup(stems.codes, len(stems.names)), lambda c: Stems((stems.names[c],))
    for where, lengths in AFFIX_LENGTHS.items():
        for length in lengths:
            table = vocabulary.table(where, length)
            make = partial(lambda c, where, names: Affix(where, names[c]), where=where, names=table.names)
            yield tokens.regroup(table.codes, len(table.names)), make
    for name in TOKEN_CLASSES:
        yield tokens.regroup(np.where(vocabulary.classes[name], 0, -1), 1), partial(lambda c, n: TokenClass(n), n=name)


def _row_flag_families(counter: Counter) -> Iterator[_Family]:
    """Families with one answer: position and word pieces."""
    for predicate in (*(Position(n) for n in POSITIONS), Piece("starts"), Piece("continues")):
        codes = np.where(predicate.rows(counter.windows).ravel(), 0, -1)
        yield counter.pairs(codes, 1), partial(lambda c, predicate: predicate, predicate=predicate)


def _context_families(counter: Counter, beside: Mapping[int, Beside]) -> Iterator[_Family]:
    """Families that read a neighbour, alone or together with the row's own token or class."""
    vocabulary, least = counter.windows.vocabulary, counter.limits.min_hits
    texts, size, kinds = vocabulary.texts, len(vocabulary), len(DISJOINT_CLASSES)
    itself, any_token, class_of = np.arange(size + 1), np.zeros(size + 1, np.int64), disjoint_class_of(vocabulary)
    for offset in (-1, 1):
        pairs = beside[offset].regroup(any_token, itself, size, 1, 1)
        make = partial(lambda c, offset: Neighbour(offset, Token(texts[c])), offset=offset)
        yield pairs.frequent(least), make
        if offset < 0:
            for name in TOKEN_CLASSES:  # of tokens however rare
                make = partial(lambda c, n: Neighbour(-1, TokenClass(n)), n=name)
                yield pairs.regroup(np.where(vocabulary.classes[name], 0, -1), 1), make

    before = beside[-1]
    yield before.pairs, lambda c: Both(Token(texts[before.first[c]]), Neighbour(-1, Token(texts[before.second[c]])))

    def together(first: np.ndarray, second: np.ndarray, sizes: tuple[int, int], head: Callable, tail: Callable):
        pairs, base = before.regroup(first, second, sizes[1], sizes[0], least), sizes[1]
        return pairs, lambda c: Both(head(c // base), Neighbour(-1, tail(c % base)))

    def token(code: int) -> Token:
        return Token(texts[code])

    def token_class(code: int) -> TokenClass:
        return TokenClass(DISJOINT_CLASSES[code])

    yield together(itself, class_of, (size, kinds), token, token_class)
    yield together(class_of, itself, (kinds, size), token_class, token)
    yield together(class_of, class_of, (kinds, kinds), token_class, token_class)


def _add_sets(
    counter: Counter, pairs: Pairs, names: Sequence[str], make: Callable[[tuple[str, ...]], Predicate], found: Found
) -> None:
    keep = pairs.hits >= counter.limits.min_hits
    features, codes, hits = pairs.features[keep], pairs.codes[keep], pairs.hits[keep]
    sizes = counter.limits.set_sizes
    for _, chosen, f1 in best_sets(features, hits, pairs.support[codes], counter.num_active, sizes):
        starts = np.flatnonzero(np.diff(features[chosen], prepend=-1))
        for members, start in zip(np.split(codes[chosen], starts[1:]), starts, strict=False):
            feature = int(features[chosen[start]])
            if len(members) > 1 and f1[feature] >= counter.limits.min_f1:
                found.append((feature, float(f1[feature]), make(tuple(names[int(c)] for c in members))))


def propose(
    windows: RowTable, active: ActiveRows, eligible: np.ndarray, limits: CandidateLimits
) -> list[list[Predicate]]:
    """Candidates a feature (F lists, best train F1 first, at most `max_candidates` each).

    Args: `windows` [W, T]; `active` rows of the same windows; `eligible` [W * T] bool, the rows that count.
    """
    counter = Counter(windows, active, eligible, limits)
    vocabulary = windows.vocabulary
    tokens = counter.pairs(windows.tokens.ravel(), len(vocabulary))
    found: Found = []
    beside = {offset: counter.beside(offset) for offset in (-1, 1)}
    token_families, row_flags = _token_families(counter, tokens), _row_flag_families(counter)
    for families in (token_families, row_flags, _context_families(counter, beside), part_families(counter)):
        for pairs, make in families:
            for feature, code, f1 in zip(*counter.best(pairs), strict=True):
                found.append((int(feature), float(f1), make(int(code))))
    stems = vocabulary.table("stem")
    _add_sets(counter, tokens, vocabulary.texts, TokenSet, found)
    _add_sets(counter, tokens.regroup(stems.codes, len(stems.names)), stems.names, Stems, found)
    found += context_candidates(counter, tokens, found, beside)
    found += recent_candidates(counter)

    ranked = _ranked(found, active.num_features)
    ranked = _ranked(found + alternatives(counter, ranked), active.num_features)
    return [[predicate for _, predicate in own][: limits.max_candidates] for own in ranked]


def _ranked(found: Found, num_features: int) -> list[list[tuple[float, Predicate]]]:
    """(F1, predicate) of every feature, best first, none twice; families keep their order among equals."""
    own: list[dict[Predicate, float]] = [{} for _ in range(num_features)]
    for feature, f1, predicate in sorted(found, key=lambda c: -c[1]):
        own[feature].setdefault(predicate, f1)
    return [[(f1, predicate) for predicate, f1 in mine.items()] for mine in own]
