"""Candidate predicates for every feature, made by counting on one split (train).

A *family* is one question with many answers ("which token?", "which previous token?"): a code a row. Counting the pairs
(feature, code) over the active rows gives, for every candidate at once, hits; with the code's support over all rows
that is precision, recall, F1 and lift. Nothing here looks at another split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .predicates import Affix, Both, Neighbour, Piece, Position, Predicate, Stems, Token, TokenClass, TokenSet, Word
from .split_rows import ActiveRows
from .token_classes import DISJOINT_CLASSES, TOKEN_CLASSES, RowTable

AFFIX_LENGTHS = {"suffix": (2, 3, 4), "prefix": (3, 4, 5)}
POSITIONS = (2, 4, 8, 16)
CANDIDATES_PER_FAMILY = 2


@dataclass(frozen=True)
class CandidateLimits:
    """What a (feature, predicate) pair must reach on the counting split to be a candidate."""

    min_hits: int
    min_lift: float
    min_f1: float
    max_candidates: int
    max_set_size: int


@dataclass(frozen=True)
class _Pairs:
    """Pairs (feature, code) that occur on active rows, sorted by them; `support` counts the code over all rows."""

    features: np.ndarray  # [P]
    codes: np.ndarray  # [P]
    hits: np.ndarray  # [P] active rows with the code
    support: np.ndarray  # [C]

    def regroup(self, table: np.ndarray, num_codes: int) -> "_Pairs":
        """The same rows under coarser codes: `table[code]` is the new code, -1 drops the code."""
        new = table[self.codes]
        keep = new >= 0
        features, codes, hits = _group(self.features[keep], new[keep], num_codes, self.hits[keep])
        kept = table >= 0
        support = np.bincount(table[kept], weights=self.support[kept], minlength=num_codes).astype(np.int64)
        return _Pairs(features, codes, hits, support)


def _group(features: np.ndarray, codes: np.ndarray, num_codes: int, weights: np.ndarray | None = None):
    """Distinct (feature, code) pairs in sorted order with their number (or summed weight)."""
    keys = features.astype(np.int64) * num_codes + codes
    if weights is None:
        keys, hits = np.unique(keys, return_counts=True)
    elif len(keys) == 0:
        hits = weights
    else:
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
        keys, hits = keys[order][starts], np.add.reduceat(weights[order], starts)
    return keys // num_codes, keys % num_codes, hits


def _first_per_feature(features: np.ndarray, score: np.ndarray, limit: int) -> np.ndarray:
    """Indices of the `limit` highest scores of each feature, best first; ties go to the earlier entry."""
    order = np.lexsort((-score, features))  # stable
    sorted_features = features[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_features, sorted_features)
    return order[rank < limit]


class _Counter:
    """Counts families over one split. `eligible` [R] marks the rows that count (R = W * T)."""

    def __init__(self, windows: RowTable, active: ActiveRows, eligible: np.ndarray, limits: CandidateLimits):
        self.windows, self.active, self.eligible, self.limits = windows, active, eligible, limits
        self.num_active = active.counts
        self.base_rate = self.num_active / max(int(eligible.sum()), 1)  # [F]

    def pairs(self, codes: np.ndarray, num_codes: int) -> _Pairs:
        """Count row codes [R] (-1: none). Codes rarer than `min_hits` cannot pass and are not counted."""
        support = np.bincount(codes[self.eligible & (codes >= 0)], minlength=num_codes)
        frequent = np.append(support >= self.limits.min_hits, False)
        at_active = codes[self.active.rows]
        keep = frequent[at_active]
        return _Pairs(*_group(self.active.features[keep], at_active[keep], num_codes), support)

    def sparse_pairs(self, codes: np.ndarray) -> tuple[_Pairs, np.ndarray]:
        """Like `pairs` for codes from a huge range; second: the code behind each dense code of the result."""
        values, dense = np.unique(codes, return_inverse=True)
        dense = np.where(codes >= 0, dense, -1)
        return self.pairs(dense, len(values)), values

    def best(self, pairs: _Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(features, codes, F1) of the best candidates of a family, those within the limits only."""
        n, support = self.num_active[pairs.features], pairs.support[pairs.codes]
        f1 = 2 * pairs.hits / (n + support)
        lift = pairs.hits / support / self.base_rate[pairs.features]
        ok = (pairs.hits >= self.limits.min_hits) & (lift >= self.limits.min_lift) & (f1 >= self.limits.min_f1)
        features, codes, f1 = pairs.features[ok], pairs.codes[ok], f1[ok]
        keep = _first_per_feature(features, f1, CANDIDATES_PER_FAMILY)
        return features[keep], codes[keep], f1[keep]


_Family = tuple[_Pairs, Callable[[int], Predicate]]


def _token_families(counter: _Counter, tokens: _Pairs) -> Iterator[_Family]:
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


def _row_flag_families(counter: _Counter) -> Iterator[_Family]:
    """Families with one answer: position and word pieces."""
    for predicate in (*(Position(n) for n in POSITIONS), Piece("starts"), Piece("continues")):
        codes = np.where(predicate.rows(counter.windows).ravel(), 0, -1)
        yield counter.pairs(codes, 1), partial(lambda c, predicate: predicate, predicate=predicate)


def _shift(rows: np.ndarray, offset: int) -> np.ndarray:
    """[W, T] int64: the value at position + offset, -1 where there is none."""
    out = np.full(rows.shape, -1, np.int64)
    if offset < 0:
        out[:, 1:] = rows[:, :-1]
    else:
        out[:, :-1] = rows[:, 1:]
    return out


def _context_families(counter: _Counter) -> Iterator[_Family]:
    """Families that read a neighbour, alone or together with the row's own token or class."""
    vocabulary, tokens = counter.windows.vocabulary, counter.windows.tokens.astype(np.int64)
    texts, size, kinds = vocabulary.texts, len(vocabulary), len(DISJOINT_CLASSES)
    class_of = np.full(size + 1, -1, np.int64)  # last entry: no token
    for i, name in enumerate(DISJOINT_CLASSES):
        class_of[:-1][vocabulary.classes[name]] = i
    previous = _shift(tokens, -1)
    for offset in (-1, 1):
        pairs = counter.pairs(_shift(tokens, offset).ravel(), size)
        yield pairs, partial(lambda c, offset: Neighbour(offset, Token(texts[c])), offset=offset)
        if offset < 0:
            for name in TOKEN_CLASSES:
                make = partial(lambda c, n: Neighbour(-1, TokenClass(n)), n=name)
                yield pairs.regroup(np.where(vocabulary.classes[name], 0, -1), 1), make

    def together(first: np.ndarray, second: np.ndarray, base: int, head: Callable, tail: Callable) -> _Family:
        codes = np.where((first >= 0) & (second >= 0), first * base + second, -1)
        pairs, values = counter.sparse_pairs(codes.ravel())
        return pairs, lambda c: Both(head(int(values[c]) // base), Neighbour(-1, tail(int(values[c]) % base)))

    def token(code: int) -> Token:
        return Token(texts[code])

    def token_class(code: int) -> TokenClass:
        return TokenClass(DISJOINT_CLASSES[code])

    yield together(tokens, previous, size, token, token)
    yield together(tokens, class_of[previous], kinds, token, token_class)
    yield together(class_of[tokens], previous, size, token_class, token)
    yield together(class_of[tokens], class_of[previous], kinds, token_class, token_class)


def _best_sets(counter: _Counter, pairs: _Pairs, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every feature the set of at most `size` codes with the highest F1: (features, codes, F1 of the set) a member.

    F1 = 2 hits / (num_active + support) is a ratio of sums, so Dinkelbach's iteration finds its maximum: with the F1 so
    far fixed, the best set is the `size` codes of largest hits - F1 / 2 * support, and the F1 only rises.
    """
    keep = pairs.hits >= counter.limits.min_hits
    features, codes, hits = pairs.features[keep], pairs.codes[keep], pairs.hits[keep]
    support = pairs.support[codes]
    num_features = counter.active.num_features
    f1, chosen = np.zeros(num_features), np.zeros(0, np.int64)
    for _ in range(6):
        gain = hits - f1[features] / 2 * support
        chosen = _first_per_feature(features, gain, size)
        chosen = chosen[gain[chosen] > 0]
        total_hits = np.bincount(features[chosen], hits[chosen], num_features)
        total_support = np.bincount(features[chosen], support[chosen], num_features)
        f1 = 2 * total_hits / np.maximum(counter.num_active + total_support, 1)
    return features[chosen], codes[chosen], f1[features[chosen]]


def _add_sets(
    counter: _Counter, pairs: _Pairs, names: Sequence[str], make: Callable[[tuple[str, ...]], Predicate], found: list
) -> None:
    sizes = sorted({min(3, counter.limits.max_set_size), counter.limits.max_set_size})
    for size in sizes:
        features, codes, f1 = _best_sets(counter, pairs, size)
        starts = np.flatnonzero(np.diff(features, prepend=-1))
        for members, start in zip(np.split(codes, starts[1:]), starts, strict=False):
            if len(members) > 1 and f1[start] >= counter.limits.min_f1:
                predicate = make(tuple(names[int(c)] for c in members))
                found.append((int(features[start]), float(f1[start]), predicate))


def propose(
    windows: RowTable, active: ActiveRows, eligible: np.ndarray, limits: CandidateLimits
) -> list[list[Predicate]]:
    """Candidates a feature (F lists, best train F1 first, at most `max_candidates` each).

    Args: `windows` [W, T]; `active` rows of the same windows; `eligible` [W * T] bool, the rows that count.
    """
    counter = _Counter(windows, active, eligible, limits)
    vocabulary = windows.vocabulary
    tokens = counter.pairs(windows.tokens.ravel(), len(vocabulary))
    found: list[tuple[int, float, Predicate]] = []
    for families in (_token_families(counter, tokens), _row_flag_families(counter), _context_families(counter)):
        for pairs, make in families:
            for feature, code, f1 in zip(*counter.best(pairs), strict=True):
                found.append((int(feature), float(f1), make(int(code))))
    stems = vocabulary.table("stem")
    _add_sets(counter, tokens, vocabulary.texts, TokenSet, found)
    _add_sets(counter, tokens.regroup(stems.codes, len(stems.names)), stems.names, Stems, found)

    candidates: list[list[tuple[float, Predicate]]] = [[] for _ in range(active.num_features)]
    for feature, f1, predicate in found:
        candidates[feature].append((f1, predicate))
    for own in candidates:
        own.sort(key=lambda c: -c[0])  # stable: families keep their order among equals
    return [list(dict.fromkeys(p for _, p in own))[: limits.max_candidates] for own in candidates]
