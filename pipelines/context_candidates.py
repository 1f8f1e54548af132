"""Candidate predicates of what stands beside a row, made on train: neighbours of a token, places before the row.

A *head* is a predicate of the row's own token that already catches much of a feature. Its rows are divided by what
stands beside them: the set of neighbours with the best F1 is kept ("after one of ..."), or the set that F1 is best
without ("not after one of ..."). All of it is counted exactly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .candidate_counts import (
    Beside,
    Counter,
    Found,
    Pairs,
    best_of_each,
    best_sets,
    disjoint_class_of,
    first_per_feature,
)
from .predicates import (
    Both,
    Neighbour,
    Not,
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


def context_candidates(counter: Counter, tokens: Pairs, found: Found, counted: dict[int, Beside]) -> Found:
    """Heads of `found`, and the most frequent tokens, narrowed by neighbours; places before the row alone.

    `counted`: what is counted already by offset; it is used up.
    """
    out: Found = []
    heads = _heads(counter, tokens, found)
    for offset in sorted({*PLACES, *HEAD_OFFSETS}):
        beside = counted.pop(offset, None) or counter.beside(offset)
        if offset in PLACES:
            out += _places(counter, beside, offset)
        if offset in HEAD_OFFSETS:
            out += _narrowed(counter, heads, beside, offset)
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
                ids[predicate] = predicate.ids(vocabulary)
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


@dataclass(frozen=True)
class _Neighbours:
    """What stands beside the rows of some tokens: texts, and stems of them, with their rows."""

    codes: np.ndarray  # [n] codes of `Beside`
    names: np.ndarray  # [m] vocabulary indices, ascending
    place: np.ndarray | None  # [n] which of the names each code has; None: one code a name
    support: np.ndarray  # [m]
    has_stem: np.ndarray  # [m] bool
    stems: np.ndarray  # [s] stem codes, ascending
    stem_place: np.ndarray  # which of the stems each name that has one has
    stem_support: np.ndarray  # [s]

    @classmethod
    def of(cls, beside: Beside, tokens: np.ndarray, stem_of: np.ndarray) -> "_Neighbours":
        """Beside rows of the `tokens`; `stem_of` [V] is -1 where a text has no stem."""
        low, high = np.searchsorted(beside.first, tokens), np.searchsorted(beside.first, tokens, "right")
        if len(tokens) == 1:
            codes, place = np.arange(low[0], high[0]), None
            names, support = beside.second[codes], beside.pairs.support[codes]
        else:
            codes = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
            names, place = np.unique(beside.second[codes], return_inverse=True)
            support = np.bincount(place, beside.pairs.support[codes], len(names))
        stem = stem_of[names]
        has_stem = stem >= 0
        stems, stem_place = np.unique(stem[has_stem], return_inverse=True)
        stem_support = np.bincount(stem_place, support[has_stem], len(stems))
        return cls(codes, names, place, support, has_stem, stems, stem_place, stem_support)

    def hits(self, codes: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """[m] of the names, from pairs of one feature: `codes` ascending, and their hits."""
        if not len(self.codes):
            return np.zeros(0)
        if self.place is None:
            own = slice(*np.searchsorted(codes, [self.codes[0], self.codes[-1] + 1]))
            return np.bincount(codes[own] - self.codes[0], hits[own], len(self.names))
        at = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        inside = self.codes[at] == codes
        return np.bincount(self.place[at[inside]], hits[inside], len(self.names))


def _narrowed(counter: Counter, heads: Sequence[_Head], beside: Beside, offset: int) -> Found:
    """Heads with the neighbours that their rows are divided by."""
    vocabulary, limits = counter.windows.vocabulary, counter.limits
    stems, sizes, least = vocabulary.table("stem"), limits.set_sizes, limits.min_hits
    texts = _Named(vocabulary.texts, Token, TokenSet)
    of_stem = _Named(stems.names, lambda stem: Stems((stem,)), Stems)
    pairs, starts = beside.pairs, np.searchsorted(beside.pairs.features, np.arange(counter.active.num_features + 1))
    same: dict[TokenPredicate, list[int]] = {}  # heads that hold on the same tokens
    for place, head in enumerate(heads):
        same.setdefault(head.predicate, []).append(place)
    out: list[Found] = [[] for _ in heads]
    for predicate, places in same.items():
        near = _Neighbours.of(beside, heads[places[0]].tokens, stems.codes)
        for place in places:
            head = heads[place]
            own = slice(starts[head.feature], starts[head.feature + 1])
            hits = near.hits(pairs.codes[own], pairs.hits[own])
            stem_hits = np.bincount(near.stem_place, hits[near.has_stem], len(near.stems))
            positives = int(counter.num_active[head.feature])
            whole = head.f1 / 2 * (positives + head.support), head.support  # rows without a neighbour included
            needed = max(head.f1 + MIN_GAIN, limits.min_f1)
            found: list[tuple[float, _Named, np.ndarray, bool]] = []
            for called, names, h, s in (
                (texts, near.names, hits, near.support), (of_stem, near.stems, stem_hits, near.stem_support)
            ):  # fmt: skip
                if _can_reach(needed, h, s, positives, (0.0, 0.0), sizes[-1]):
                    kept = _kept(h, s, positives, (1, *sizes), least)
                    found += [(f1, called, names[codes], True) for codes, f1 in kept]
                if _can_reach(needed, -h, -s, positives, whole, sizes[-1]):
                    left_out = _left_out(h, s, positives, whole, sizes, least)
                    found += [(f1, called, names[codes], False) for codes, f1 in left_out]
            found = [entry for entry in found if entry[0] >= needed]
            found.sort(key=lambda entry: -entry[0])
            for f1, called, names, is_kept in found[:3]:
                neighbour = Neighbour(offset, called.one_of(names))
                out[place].append((head.feature, f1, Both(predicate, neighbour if is_kept else Not(neighbour))))
    return [entry for own in out for entry in own]


def _can_reach(
    f1: float, hits: np.ndarray, support: np.ndarray, positives: int, start: tuple[float, float], most: int
) -> bool:
    """False where no `most` codes added to sums that begin at `start` (hits, support) reach `f1`.

    F1 >= f is hits - f / 2 * support >= f / 2 * positives, in which every code has its own share of the left side.
    """
    gain = np.maximum(hits - f1 / 2 * support, 0)
    missing = f1 / 2 * (positives + start[1]) - start[0] - 1e-6
    if gain.sum() < missing:
        return False
    return len(gain) <= most or bool(np.partition(gain, len(gain) - most)[-most:].sum() >= missing)


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
        order = _largest(gain, most)
        order = order[gain[order] > 0]
        before, f1 = f1, 2 * (start[0] + hits[order].sum()) / (positives + start[1] + support[order].sum())
        if f1 <= before:
            break
    order = order[np.argsort(-(hits - f1 / 2 * support)[order], kind="stable")]
    total_hits, total_support = start[0] + np.cumsum(hits[order]), start[1] + np.cumsum(support[order])
    for size in sorted({min(n, len(order)) for n in sizes} - {0}):
        yield codes[order[:size]], float(2 * total_hits[size - 1] / (positives + total_support[size - 1]))


def _largest(values: np.ndarray, num: int) -> np.ndarray:
    """Indices of the `num` largest, ascending; of equal ones the first, on every processor."""
    if len(values) <= num:
        return np.arange(len(values))
    bar = np.partition(values, len(values) - num)[len(values) - num]
    above = np.flatnonzero(values > bar)
    return np.sort(np.concatenate([above, np.flatnonzero(values == bar)[: num - len(above)]]))


def _places(counter: Counter, beside: Beside, offset: int) -> Found:
    """Tokens at one place before the row: sets of them alone; one, or a set, together with the row's class."""
    vocabulary: Vocabulary = counter.windows.vocabulary
    size, kinds, least = len(vocabulary), len(DISJOINT_CLASSES), counter.limits.min_hits
    stems, itself = vocabulary.table("stem"), np.arange(size + 1)
    pairs = beside.regroup(np.zeros(size + 1, np.int64), itself, size, 1, least)
    texts = _Named(vocabulary.texts, Token, TokenSet)
    of_stem = _Named(stems.names, lambda stem: Stems((stem,)), Stems)
    found: list[tuple[int, float, tuple[_Named, list[int], str | None]]] = []
    for own, called in ((pairs, texts), (pairs.regroup(stems.codes, len(stems.names)), of_stem)):
        for feature, f1, codes in _sets(own.features, own.codes, own.hits, own.support, counter):
            found.append((feature, f1, (called, codes, None)))
    both = beside.regroup(disjoint_class_of(vocabulary), itself, size, kinds, least)
    groups = both.features * kinds + both.codes // size
    for group, f1, codes in _sets(groups, both.codes, both.hits, both.support, counter, per_feature=kinds):
        found.append((group // kinds, f1, (texts, [c % size for c in codes], DISJOINT_CLASSES[group % kinds])))
    out: Found = []
    for feature, f1, (called, codes, of_class) in best_of_each(found):
        neighbour = Neighbour(offset, called.one_of(codes))
        out.append((feature, f1, neighbour if of_class is None else Both(TokenClass(of_class), neighbour)))
    return out


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
