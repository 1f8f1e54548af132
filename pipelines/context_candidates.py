"""Candidate predicates of what stands beside a row, made on train: neighbours of a token, places before the row.

A *head* is a predicate of the row's own token that already catches much of a feature. Its rows are divided by what
stands beside them: the set of neighbours with the best F1 is kept ("after one of ..."), or the set that F1 is best
without ("not after one of ..."). All of it is counted exactly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .candidate_counts import Counter, Found, Pairs, best_of_each, best_sets, first_per_feature, shifted
from .predicates import (
    Both,
    Neighbour,
    Not,
    Predicate,
    Stems,
    Token,
    TokenClass,
    TokenPredicate,
    TokenSet,
)
from .token_classes import DISJOINT_CLASSES, Vocabulary

#: Where the neighbours of a head are looked for.
HEAD_OFFSETS = (-1, -2, 1)
#: Places before the row whose tokens, or sets of them, are candidates by themselves or with the row's class.
PLACES = (-1, -2, -3)
#: Active rows that a head has to hold on, of all, and the F1 from which on nothing has to be added to it.
MIN_RECALL, GOOD_ENOUGH = 0.15, 0.95
#: What a context has to add to the F1 of its head.
MIN_GAIN = 0.01


def context_candidates(counter: Counter, tokens: Pairs, found: Found) -> Found:
    """Heads of `found`, and the most frequent tokens, narrowed by neighbours; places before the row alone."""
    out: Found = []
    heads = _heads(counter, tokens, found)
    for offset in sorted({*PLACES, *HEAD_OFFSETS}):
        other = shifted(counter.windows.tokens.astype(np.int64), offset)
        if offset in PLACES:
            out += _places(counter, other, offset)
        if offset in HEAD_OFFSETS:
            out += _narrowed(counter, heads, other, offset)
    return out


@dataclass(frozen=True)
class _Head:
    feature: int
    predicate: TokenPredicate
    tokens: np.ndarray  # vocabulary indices, ascending
    f1: float
    support: int


def _heads(counter: Counter, tokens: Pairs, found: Found) -> list[_Head]:
    """Up to three a feature: its most frequent token, the best of one answer, the best set."""
    vocabulary, limits = counter.windows.vocabulary, counter.limits
    best: dict[int, dict[str, tuple[float, TokenPredicate]]] = {}
    for i in first_per_feature(tokens.features, tokens.hits, 1):
        feature, hits = int(tokens.features[i]), int(tokens.hits[i])
        if hits >= max(limits.min_hits, MIN_RECALL * counter.num_active[feature]):
            f1 = 2 * hits / (counter.num_active[feature] + tokens.support[tokens.codes[i]])
            best.setdefault(feature, {})["frequent"] = (float(f1), Token(vocabulary.texts[int(tokens.codes[i])]))
    for feature, f1, predicate in found:
        if isinstance(predicate, TokenPredicate) and not isinstance(predicate, TokenClass):
            several = isinstance(predicate, TokenSet) or (isinstance(predicate, Stems) and len(predicate.stems) > 1)
            own, kind = best.setdefault(feature, {}), "set" if several else "one"
            if kind not in own or f1 > own[kind][0]:
                own[kind] = f1, predicate
    ids: dict[TokenPredicate, np.ndarray] = {}
    out = []
    for feature in sorted(best):
        if max(f1 for f1, _ in best[feature].values()) >= GOOD_ENOUGH:
            continue
        for predicate, f1 in {p: f1 for f1, p in best[feature].values()}.items():
            if predicate not in ids:
                ids[predicate] = np.flatnonzero(predicate.tokens(vocabulary))
            support = int(tokens.support[ids[predicate]].sum())
            out.append(_Head(feature, predicate, ids[predicate], f1, support))
    return out


@dataclass(frozen=True)
class _Named:
    """How codes become a predicate of one token."""

    names: Sequence[str]
    one: Callable[[str], TokenPredicate]
    several: Callable[[tuple[str, ...]], TokenPredicate]

    def one_of(self, codes: Sequence[int] | np.ndarray) -> TokenPredicate:
        texts = tuple(self.names[int(c)] for c in codes)
        return self.one(texts[0]) if len(texts) == 1 else self.several(texts)


class _Beside:
    """Rows by (token, token beside it): support of every such pair, and the hits of every feature."""

    def __init__(self, counter: Counter, other: np.ndarray):
        self.size = len(counter.windows.vocabulary)
        tokens = counter.windows.tokens.astype(np.int64)
        codes = np.where((tokens >= 0) & (other >= 0), tokens * self.size + other, -1).ravel()
        codes[~counter.eligible] = -1
        self.pairs, values = counter.sparse_pairs(codes, rare=True)
        self.first, self.second = np.where(values >= 0, values // self.size, -1), values % self.size
        self.starts = np.searchsorted(self.pairs.features, np.arange(counter.active.num_features + 1))

    def of(self, head: _Head) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens beside the head's rows, hits, support), a row a token."""
        low, high = np.searchsorted(self.first, head.tokens), np.searchsorted(self.first, head.tokens, "right")
        codes = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
        own = slice(self.starts[head.feature], self.starts[head.feature + 1])
        hit, hits = self.pairs.codes[own], self.pairs.hits[own]
        if len(low) == 1:
            names, support, first = self.second[codes], self.pairs.support[codes], low[0]
            own = slice(*np.searchsorted(hit, [low[0], high[0]]))
            return names, np.bincount(hit[own] - first, hits[own], len(codes)), support
        names, place = np.unique(self.second[codes], return_inverse=True)
        support = np.bincount(place, self.pairs.support[codes], len(names))
        inside = _is_in(self.first[hit], head.tokens)
        place = np.searchsorted(names, self.second[hit[inside]])
        return names, np.bincount(place, hits[inside], len(names)), support


def _is_in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    if len(ascending) == 1:
        return values == ascending[0]
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[at] == values


def _narrowed(counter: Counter, heads: Sequence[_Head], other: np.ndarray, offset: int) -> Found:
    """Heads with the neighbours that their rows are divided by."""
    beside, out = _Beside(counter, other), []
    vocabulary, limits = counter.windows.vocabulary, counter.limits
    stems = vocabulary.table("stem")
    texts = _Named(vocabulary.texts, Token, TokenSet)
    of_stem = _Named(stems.names, lambda stem: Stems((stem,)), Stems)
    for head in heads:
        positives = int(counter.num_active[head.feature])
        names, hits, support = beside.of(head)
        whole = head.f1 / 2 * (positives + head.support), head.support  # rows without a neighbour included
        stem = stems.codes[names]
        has_stem = stem >= 0
        stem_names, place = np.unique(stem[has_stem], return_inverse=True)
        stem_hits = np.bincount(place, hits[has_stem], len(stem_names))
        stem_support = np.bincount(place, support[has_stem], len(stem_names))
        found: list[tuple[float, Predicate]] = []
        for called, n, h, s in ((texts, names, hits, support), (of_stem, stem_names, stem_hits, stem_support)):
            for codes, f1 in _kept(h, s, positives, (1, *limits.set_sizes), limits.min_hits):
                found.append((f1, Both(head.predicate, Neighbour(offset, called.one_of(n[codes])))))
            for codes, f1 in _left_out(h, s, positives, whole, limits.set_sizes, limits.min_hits):
                found.append((f1, Both(head.predicate, Not(Neighbour(offset, called.one_of(n[codes]))))))
        found = [(f1, p) for f1, p in found if f1 >= max(head.f1 + MIN_GAIN, limits.min_f1)]
        found.sort(key=lambda c: -c[0])
        out += [(head.feature, f1, p) for f1, p in found[:3]]
    return out


def _kept(
    hits: np.ndarray, support: np.ndarray, positives: int, sizes: Sequence[int], min_hits: int
) -> Iterator[tuple[np.ndarray, float]]:
    """(codes, F1): codes whose rows together have a high F1, a set a size."""
    codes = np.flatnonzero(hits >= min_hits)
    return _dinkelbach(codes, hits[codes], support[codes], positives, (0.0, 0.0), sizes)


def _left_out(
    hits: np.ndarray, support: np.ndarray, positives: int, whole: tuple[float, float], sizes: Sequence[int], least: int
) -> Iterator[tuple[np.ndarray, float]]:
    """(codes, F1): codes without whose rows the `whole` (hits, support) has a high F1, a set a size."""
    codes = np.flatnonzero(support - hits >= least)
    return _dinkelbach(codes, -hits[codes], -support[codes], positives, whole, sizes)


def _dinkelbach(
    codes: np.ndarray, hits: np.ndarray, support: np.ndarray, positives: int, start: tuple[float, float],
    sizes: Sequence[int],
) -> Iterator[tuple[np.ndarray, float]]:  # fmt: skip
    """`best_sets` of one group, whose sums begin at `start` (hits, support)."""
    f1, order, most = 2 * start[0] / (positives + start[1]), codes[:0], sizes[-1]
    for _ in range(4):
        gain = hits - f1 / 2 * support
        order = np.argpartition(-gain, most)[:most] if len(gain) > most else np.arange(len(gain))
        order = order[gain[order] > 0]
        before, f1 = f1, 2 * (start[0] + hits[order].sum()) / (positives + start[1] + support[order].sum())
        if f1 <= before:
            break
    order = order[np.argsort(-(hits - f1 / 2 * support)[order], kind="stable")]
    total_hits, total_support = start[0] + np.cumsum(hits[order]), start[1] + np.cumsum(support[order])
    for size in sorted({min(n, len(order)) for n in sizes} - {0}):
        yield codes[order[:size]], float(2 * total_hits[size - 1] / (positives + total_support[size - 1]))


def _places(counter: Counter, other: np.ndarray, offset: int) -> Found:
    """Tokens at one place before the row: sets of them alone; one, or a set, together with the row's class."""
    vocabulary: Vocabulary = counter.windows.vocabulary
    out: Found = []
    size, kinds = len(vocabulary), len(DISJOINT_CLASSES)
    stems = vocabulary.table("stem")
    pairs = counter.pairs(other.ravel(), size)
    texts = _Named(vocabulary.texts, Token, TokenSet)
    of_stem = _Named(stems.names, lambda stem: Stems((stem,)), Stems)
    for own, called in ((pairs, texts), (pairs.regroup(stems.codes, len(stems.names)), of_stem)):
        for feature, f1, codes in _sets(own.features, own.codes, own.hits, own.support, counter):
            out.append((feature, f1, Neighbour(offset, called.one_of(codes))))
    class_of = np.full(size + 1, -1, np.int64)  # last entry: no token
    for i, name in enumerate(DISJOINT_CLASSES):
        class_of[:-1][vocabulary.classes[name]] = i
    first = class_of[counter.windows.tokens]
    codes = np.where((first >= 0) & (other >= 0), first * size + other, -1).ravel()
    both, values = counter.sparse_pairs(codes)
    groups = both.features * kinds + values[both.codes] // size
    for group, f1, chosen in _sets(groups, both.codes, both.hits, both.support, counter, per_feature=kinds):
        head = TokenClass(DISJOINT_CLASSES[group % kinds])
        out.append((group // kinds, f1, Both(head, Neighbour(offset, texts.one_of(values[chosen] % size)))))
    return best_of_each(out)


def _sets(
    groups: np.ndarray, codes: np.ndarray, hits: np.ndarray, support: np.ndarray, counter: Counter, per_feature: int = 1
) -> Iterator[tuple[int, float, list[int]]]:
    """(group, F1, codes) of the best sets of codes; a feature has `per_feature` groups."""
    limits = counter.limits
    keep = hits >= limits.min_hits
    groups, codes, hits = groups[keep], codes[keep], hits[keep]
    positives = np.repeat(counter.num_active, per_feature)
    for size, chosen, f1 in best_sets(groups, hits, support[codes], positives, (1, *limits.set_sizes)):
        starts = np.flatnonzero(np.diff(groups[chosen], prepend=-1))
        for members, start in zip(np.split(codes[chosen], starts[1:]), starts, strict=False):
            group = int(groups[chosen[start]])
            if f1[group] >= limits.min_f1 and (size == 1 or len(members) > 1):
                yield group, float(f1[group]), [int(c) for c in members]
