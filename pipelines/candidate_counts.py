"""Counting pairs (feature, code) on one split: hits, support, F1, and the sets of codes with the best F1.

A *code* is one answer to one question about a row ("which token?", "which previous token?"), -1 where it has none. All
features are counted at once; with the code's support over all rows, hits give precision, recall, F1 and lift.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .block_sort import count_codes, order_by_code
from .predicate_base import Predicate
from .split_rows import ActiveRows
from .token_classes import DISJOINT_CLASSES, RowTable, Vocabulary

T = TypeVar("T")
#: (feature, F1 on train, predicate)
Found = list[tuple[int, float, Predicate]]

CANDIDATES_PER_FAMILY = 2
#: Active rows of a feature that are looked at where all of them would be too many.
SAMPLED_ROWS = 256


@dataclass(frozen=True)
class CandidateLimits:
    """What a (feature, predicate) pair must reach on the counting split to be a candidate."""

    min_hits: int
    min_lift: float
    min_f1: float
    max_candidates: int
    max_set_size: int

    @property
    def set_sizes(self) -> list[int]:
        """How many answers a set of them may have."""
        return sorted({min(n, self.max_set_size) for n in (3, 8, self.max_set_size)})


@dataclass(frozen=True)
class Pairs:
    """Pairs (feature, code) that occur on active rows, sorted by them; `support` counts the code over all rows."""

    features: np.ndarray  # [P]
    codes: np.ndarray  # [P]
    hits: np.ndarray  # [P] active rows with the code
    support: np.ndarray  # [C]

    def regroup(self, table: np.ndarray, num_codes: int) -> "Pairs":
        """The same rows under coarser codes: `table[code]` is the new code, -1 drops the code."""
        new = table[self.codes]
        keep = new >= 0
        features, codes, hits = _group(self.features[keep], new[keep], num_codes, self.hits[keep])
        kept = table >= 0
        support = np.bincount(table[kept], weights=self.support[kept], minlength=num_codes).astype(np.int64)
        return Pairs(features, codes, hits, support)

    def frequent(self, least: int) -> "Pairs":
        """Without codes of fewer than `least` rows."""
        keep = self.support[self.codes] >= least
        return Pairs(self.features[keep], self.codes[keep], self.hits[keep], self.support)


def _group(features: np.ndarray, codes: np.ndarray, num_codes: int, weights: np.ndarray):
    """Distinct (feature, code) pairs in sorted order with their summed weight; `features` ascend."""
    order = order_by_code(features, codes, num_codes) if num_codes > 1 else np.arange(len(features))
    keys = (features.astype(np.int64) * num_codes + codes)[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    hits = np.add.reduceat(weights[order], starts) if len(keys) else weights
    return *np.divmod(keys[starts], max(num_codes, 1)), hits


def first_per_feature(features: np.ndarray, score: np.ndarray, limit: int) -> np.ndarray:
    """Indices of the `limit` highest scores of each feature, best first; ties go to the earlier entry."""
    order = np.lexsort((-score, features))  # stable
    sorted_features = features[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_features, sorted_features)
    return order[rank < limit]


@dataclass(frozen=True)
class Beside:
    """Pairs of (feature, code), however rare: a code is a row's token with the token at one offset from it."""

    pairs: Pairs
    first: np.ndarray  # [C] the row's token, ascending; -1: none
    second: np.ndarray  # [C] the token beside it, ascending within `first`

    def regroup(self, first: np.ndarray, second: np.ndarray, num_seconds: int, num_firsts: int, least: int) -> Pairs:
        """The same rows by coarser codes, first * num_seconds + second by tables [V + 1] (-1 drops a token).

        Codes of fewer than `least` rows are left out, as by `Counter.pairs`.
        """
        a, b = first[self.first].astype(np.int64), second[self.second].astype(np.int64)
        pairs = self.pairs.regroup(np.where((a >= 0) & (b >= 0), a * num_seconds + b, -1), num_firsts * num_seconds)
        return pairs.frequent(least)


class Counter:
    """Counts families over one split. `eligible` [R] marks the rows that count (R = W * T)."""

    def __init__(self, windows: RowTable, active: ActiveRows, eligible: np.ndarray, limits: CandidateLimits):
        self.windows, self.active, self.eligible, self.limits = windows, active, eligible, limits
        self.num_active = active.counts
        self.base_rate = self.num_active / max(int(eligible.sum()), 1)  # [F]

    def pairs(self, codes: np.ndarray, num_codes: int, *, rare: bool = False) -> Pairs:
        """Count row codes [R] (-1: none). Codes rarer than `min_hits` cannot pass alone: counted only where `rare`."""
        support = np.bincount(codes[self.eligible & (codes >= 0)], minlength=num_codes)
        frequent = np.append(support >= (1 if rare else self.limits.min_hits), False)
        at_active = np.where(frequent[codes], codes, -1).astype(np.int32)[self.active.rows]
        keep = at_active >= 0
        keys, hits = count_codes(self.active.features[keep], at_active[keep], num_codes)
        return Pairs(*np.divmod(keys, max(num_codes, 1)), hits, support)

    def sparse_pairs(self, codes: np.ndarray, *, rare: bool = False) -> tuple[Pairs, np.ndarray]:
        """Like `pairs` for codes from a huge range; second: the code behind each dense code of the result."""
        values, dense = np.unique(codes, return_inverse=True)
        dense = np.where(codes >= 0, dense, -1)
        return self.pairs(dense, len(values), rare=rare), values

    def beside(self, offset: int) -> Beside:
        """Counts of a row's token with the token `offset` places on."""
        size, tokens = len(self.windows.vocabulary), self.windows.tokens.astype(np.int64)
        other = shifted(tokens, offset)
        codes = np.where((tokens >= 0) & (other >= 0), tokens * size + other, -1).ravel()
        codes[~self.eligible] = -1
        pairs, values = self.sparse_pairs(codes, rare=True)
        return Beside(pairs, np.where(values >= 0, values // size, -1), values % size)

    def sample(self, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(features, rows, [F] active rows that each one stands for): at most `num` a feature, evenly spread."""
        counts, starts = self.num_active, self.active.starts[:-1]
        taken = np.minimum(counts, num)
        features = np.repeat(np.arange(len(counts)), taken)
        step = np.arange(len(features)) - np.repeat(np.cumsum(taken) - taken, taken)
        rows = self.active.rows[starts[features] + step * counts[features] // np.maximum(taken[features], 1)]
        return features, rows.astype(np.int64), counts / np.maximum(taken, 1)

    def best(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(features, codes, F1) of the best candidates of a family, those within the limits only."""
        n, support = self.num_active[pairs.features], pairs.support[pairs.codes]
        f1 = 2 * pairs.hits / (n + support)
        lift = pairs.hits / support / self.base_rate[pairs.features]
        ok = (pairs.hits >= self.limits.min_hits) & (lift >= self.limits.min_lift) & (f1 >= self.limits.min_f1)
        features, codes, f1 = pairs.features[ok], pairs.codes[ok], f1[ok]
        keep = first_per_feature(features, f1, CANDIDATES_PER_FAMILY)
        return features[keep], codes[keep], f1[keep]


def shifted(rows: np.ndarray, offset: int) -> np.ndarray:
    """[W, T] int64: the value at position + offset, -1 where there is none."""
    out = np.full(rows.shape, -1, np.int64)
    if abs(offset) < rows.shape[1]:
        if offset < 0:
            out[:, -offset:] = rows[:, :offset]
        else:
            out[:, :-offset] = rows[:, offset:]
    return out


def disjoint_class_of(vocabulary: Vocabulary) -> np.ndarray:
    """[V + 1] int64: which of `DISJOINT_CLASSES` each token is of, -1 for none; the last entry is of no token."""
    out = np.full(len(vocabulary) + 1, -1, np.int64)
    for i, name in enumerate(DISJOINT_CLASSES):
        out[:-1][vocabulary.classes[name]] = i
    return out


def distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, ascending; sorting is much faster than the hash table of `np.unique` where most differ."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


def best_sets(
    groups: np.ndarray, hits: np.ndarray, support: np.ndarray, positives: np.ndarray, sizes: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For every group sets of its entries with a high F1: (size, entries by group and best first, [G] F1) a size.

    Args: of every entry its group, with hits and support; `positives` [G] active rows of the group's feature; `sizes`,
    ascending: how many entries a set may have.

    F1 = 2 hits / (positives + support) is a ratio of sums, so Dinkelbach's iteration finds its maximum: with the F1 so
    far fixed, the best set is the entries of largest hits - F1 / 2 * support, and the F1 only rises. That is done for
    the largest size; smaller sets are the first of its entries.
    """
    num_groups = len(positives)
    alone = 2 * hits / np.maximum(positives[groups] + support, 1)
    f1, order = np.zeros(num_groups), np.zeros(0, np.int64)
    np.maximum.at(f1, groups, alone)
    for _ in range(5):
        gain = hits - f1[groups] / 2 * support
        kept = np.flatnonzero(gain > 0)
        order = kept[first_per_feature(groups[kept], gain[kept], sizes[-1])]
        f1 = _f1_of(order, groups, hits, support, positives)
    of_group = groups[order]
    rank = np.arange(len(order)) - np.searchsorted(of_group, of_group)
    for size in sizes:
        chosen = order[rank < size]
        yield size, chosen, _f1_of(chosen, groups, hits, support, positives)


def _f1_of(
    chosen: np.ndarray, groups: np.ndarray, hits: np.ndarray, support: np.ndarray, positives: np.ndarray
) -> np.ndarray:
    total_hits = np.bincount(groups[chosen], hits[chosen], len(positives))
    total_support = np.bincount(groups[chosen], support[chosen], len(positives))
    return 2 * total_hits / np.maximum(positives + total_support, 1)


def best_of_each(found: Sequence[tuple[int, float, T]], limit: int = 3) -> list[tuple[int, float, T]]:
    """The `limit` best of every feature, of entries (feature, F1, ...)."""
    own: dict[int, list[tuple[int, float, T]]] = {}
    for entry in found:
        own.setdefault(entry[0], []).append(entry)
    return [entry for entries in own.values() for entry in sorted(entries, key=lambda e: -e[1])[:limit]]
