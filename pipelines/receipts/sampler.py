"""Draws examples of features from one held-out split: active rows over all strengths, and negatives on every rung.

What is drawn for a feature depends on the seed, the split and that feature alone: every choice is the smallest of
hashes of (seed, rung, feature, row), never the next number of a shared generator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..split_rows import SplitRows
from .examples import Examples, NearRows

#: Classes of strength that active rows are spread over.
STRENGTHS = 10
#: Positions up to this one are matched exactly by N1, later ones in bins of so many.
EXACT_POSITIONS = 8
_FEATURES_AT_ONCE = 512
#: Rows of the same stratum that are tried for one active row.
_ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How examples are drawn."""

    num: int = 40
    """Active rows a feature, and negatives on each rung."""
    per_document: int = 3
    """Active rows of one document, exceeded only where the documents do not have enough."""
    seed: int = 0


def luck(seed: int, what: str, *keys: np.ndarray) -> np.ndarray:
    """uint64 hashes of (seed, what, keys...), elementwise: splitmix64 (Steele, Lea & Flood 2014)."""
    state = np.uint64(seed * 0x9E37 + sum(ord(c) * 257**i for i, c in enumerate(what)) & 0x7FFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _splitmix(np.asarray(key).astype(np.uint64) ^ _splitmix(np.asarray(state, np.uint64)))
    return np.asarray(state, np.uint64)


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rank_within(group: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """[n] int64: place of each entry within its group when sorted by `keys`, the first key first."""
    order = np.lexsort((*reversed(keys), group))
    ordered = group[order]
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return rank


def _contains(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether each of `wanted` is among the sorted `keys`."""
    if len(keys) == 0:
        return np.zeros(wanted.shape, bool)
    return keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted


class Sampler:
    """Examples of one split. `left_out` [W] marks windows that no example may come from.

    `neighbours` [F, K] int32 are features in order of decoder cosine, -1 where there is none; without them, and without
    `near`, rungs N4 and N3 are missing.
    """

    def __init__(
        self,
        split: SplitRows,
        config: SampleConfig,
        *,
        left_out: np.ndarray | None = None,
        neighbours: np.ndarray | None = None,
        near: NearRows | None = None,
    ):
        assert split.split != "train", "labels are made from train: no example may come from it"
        self.split, self.config, self.neighbours, self.near = split, config, neighbours, near
        tokens, self.context = split.windows.tokens, split.windows.tokens.shape[1]
        self.tokens, self.size = tokens.ravel(), max(tokens.size, 1)
        self.pooled = split.eligible.copy()  # [R]
        if left_out is not None:
            self.pooled &= ~np.repeat(left_out, self.context)
        self.pool = np.flatnonzero(self.pooled)  # [N]
        self._active = self._keys(split.active.features, split.active.rows)
        weak = self._keys(split.weak.features, split.weak.rows)
        self._fires = np.sort(np.concatenate([self._active, weak]))
        self._strata = _Groups(self.pool, self._stratum_of_rows()[self.pool], config.seed)
        self._tokens = _Groups(self.pool, self.tokens[self.pool], config.seed)

    def _keys(self, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return features.astype(np.int64) * self.size + rows

    def _stratum_of_rows(self) -> np.ndarray:
        """[R] int64: token-frequency decile, position and window length of each row in one number."""
        counts = np.bincount(self.tokens[self.pool], minlength=len(self.split.windows.vocabulary) + 1)
        order = np.argsort(counts, kind="stable")
        before = np.cumsum(counts[order]) - counts[order]
        decile = np.zeros(len(counts), np.int64)
        decile[order] = before * 10 // max(len(self.pool), 1)
        bins = np.arange(self.context + 1)
        bins = np.where(bins < EXACT_POSITIONS, bins, EXACT_POSITIONS + bins // EXACT_POSITIONS)
        length = bins[self.split.windows.valid.sum(axis=1)]
        place = np.tile(bins[: self.context], len(length)) + np.repeat(length, self.context) * (bins[-1] + 1)
        return decile[self.tokens] + 10 * place

    def sample(self, features: Sequence[int]) -> dict[int, Examples]:
        """Examples of the `features` that have an active row outside of the windows left out."""
        wanted = np.zeros(self.split.active.num_features, bool)
        wanted[np.asarray(features, np.int64)] = True
        owner, rows, values = self._positives(wanted)
        found: dict[int, Examples] = {}
        present = np.unique(owner)
        for start in range(0, len(present), _FEATURES_AT_ONCE):
            part = present[start : start + _FEATURES_AT_ONCE]
            at = slice(*np.searchsorted(owner, [part[0], part[-1] + 1]))
            found |= self._examples_of(part, owner[at], rows[at], values[at])
        return found

    def _positives(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(features, rows, activations) of the chosen active rows, by feature, spread over strengths and documents."""
        active = self.split.active
        keep = wanted[active.features] & self.pooled[active.rows]
        owner, rows, values = active.features[keep], active.rows[keep], active.values[keep]
        chance = luck(self.config.seed, "active", owner, rows)
        count = np.bincount(owner, minlength=len(wanted))[owner]
        strength = rank_within(owner, values) * STRENGTHS // np.maximum(count, 1)
        documents = self.split.documents[rows].astype(np.int64)
        crowd = rank_within(owner.astype(np.int64) * self.split.num_documents + documents, chance)
        crowd //= self.config.per_document
        turn = rank_within((owner.astype(np.int64) * (crowd.max(initial=0) + 1) + crowd) * STRENGTHS + strength, chance)
        place = rank_within(owner, crowd, turn, chance)
        chosen = np.flatnonzero(place < self.config.num)
        chosen = chosen[np.lexsort((place[chosen], owner[chosen]))]
        return owner[chosen], rows[chosen], values[chosen]

    def _examples_of(
        self, features: np.ndarray, owner: np.ndarray, rows: np.ndarray, values: np.ndarray
    ) -> dict[int, Examples]:
        """Examples of one block of features, all of which have active rows here."""
        drawn = {
            "N0": self._random(owner, rows),
            "N1": self._matched(owner, rows),
            "N2": self._same_token(owner, rows),
            "N3": self._near(features, owner, rows),
            "N4": self._of_neighbours(features, owner),
        }
        ends = np.searchsorted(owner, [features, features + 1]).T
        out = {}
        for feature, (start, end) in zip(features.tolist(), ends, strict=True):
            negatives = {}
            for rung, (owners, found) in drawn.items():
                own = found[slice(*np.searchsorted(owners, [feature, feature + 1]))]
                if len(own):
                    negatives[rung] = own
            out[feature] = Examples(feature, self.split.split, rows[start:end], values[start:end], negatives)
        return out

    def _take(
        self, owner: np.ndarray, rows: np.ndarray, order: np.ndarray, limit: np.ndarray, *, silent: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(features, rows): of the candidates the first `limit[feature]` in `order` that may be negatives.

        `silent`: rows of weak activation may not be. Sorted by feature, no row twice.
        """
        keys = self._keys(owner, rows)
        ok = self.pooled[rows] & ~_contains(self._fires if silent else self._active, keys)
        owner, rows, order, keys = owner[ok], rows[ok], order[ok], keys[ok]
        kept = _first_of_each(keys, order)
        owner, rows, order = owner[kept], rows[kept], order[kept]
        place = rank_within(owner, order, rows)
        chosen = np.flatnonzero(place < limit[owner])
        chosen = chosen[np.lexsort((place[chosen], owner[chosen]))]
        return owner[chosen], rows[chosen]

    def _limits(self, owner: np.ndarray) -> np.ndarray:
        return np.bincount(owner, minlength=self.split.active.num_features)

    def _random(self, owner: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """N0: three times as many draws as are needed, since some fall on active rows."""
        tries = np.tile(np.arange(3), len(owner))
        owners, positives = np.repeat(owner, 3), np.repeat(rows, 3)
        chance = luck(self.config.seed, "N0", owners, positives, tries)
        drawn = self.pool[(chance % np.uint64(len(self.pool))).astype(np.int64)]
        return self._take(owners, drawn, tries, self._limits(owner), silent=False)

    def _matched(self, owner: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """N1: for every active row one of its stratum, the first of several draws that is not active."""
        tries = np.tile(np.arange(_ATTEMPTS), len(owner))
        index = np.repeat(np.arange(len(owner)), _ATTEMPTS)
        owners = owner[index]
        chance = luck(self.config.seed, "N1", owners, rows[index], tries)
        drawn = self._strata.pick(self._strata.of_row(rows)[index], chance)
        keys = self._keys(owners, drawn)
        ok = ~_contains(self._active, keys)
        index, tries, keys, drawn = index[ok], tries[ok], keys[ok], drawn[ok]
        kept = _first_of_each(keys, tries)
        index, tries, drawn = index[kept], tries[kept], drawn[kept]
        kept = np.flatnonzero(rank_within(index, tries) == 0)
        kept = kept[np.argsort(index[kept])]
        return owner[index[kept]], drawn[kept]

    def _same_token(self, owner: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """N2: rows of each token in the share that it has among the active rows, as far as there are so many."""
        group = self._tokens.of_row(rows)
        pairs, counts = np.unique(owner.astype(np.int64) * len(self._tokens) + group, return_counts=True)
        owners, tokens = pairs // len(self._tokens), pairs % len(self._tokens)
        tries = np.minimum(self._tokens.counts[tokens], 16 * counts + 16)
        index = np.repeat(np.arange(len(pairs)), tries)
        step = np.arange(len(index)) - np.repeat(np.cumsum(tries) - tries, tries)
        offset = luck(self.config.seed, "N2", owners, tokens)[index] % self._tokens.counts[tokens][index].astype(
            np.uint64
        )
        drawn = self._tokens.at(tokens[index], offset.astype(np.int64) + step)
        ok = ~_contains(self._fires, self._keys(owners[index], drawn))
        index, step, drawn = index[ok], step[ok], drawn[ok]
        turn = rank_within(index, step) // counts[index]  # turn 0: as many rows of a token as are active
        return self._take(owners[index].astype(np.int32), drawn, turn, self._limits(owner), silent=True)

    def _near(self, features: np.ndarray, owner: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """N3: what `near` finds, in its order."""
        if self.near is None:
            return owner[:0], rows[:0]
        ends = np.searchsorted(owner, [features, features + 1]).T
        active = {f: rows[a:b] for f, (a, b) in zip(features.tolist(), ends.tolist(), strict=True)}
        found = self.near.near(active, self.split)
        lists = [np.asarray(found.get(f, ()), np.int64) for f in active]
        owners = np.repeat(features, [len(x) for x in lists])
        order = np.concatenate([np.arange(len(x)) for x in lists]) if lists else np.zeros(0, np.int64)
        drawn = np.concatenate(lists) if lists else np.zeros(0, np.int64)
        return self._take(owners, drawn, order, self._limits(owner), silent=True)

    def _of_neighbours(self, features: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """N4: active rows of the nearest features in turn."""
        if self.neighbours is None or self.neighbours.shape[1] == 0:
            return owner[:0], owner[:0]
        active, width = self.split.active, self.neighbours.shape[1]
        counts, starts = active.counts, active.starts
        limits = self._limits(owner)
        turns = -(-3 * limits[features] // width) + 2
        index = np.repeat(np.arange(len(features)), turns * width)
        step = np.arange(len(index)) - np.repeat(np.cumsum(turns * width) - turns * width, turns * width)
        near = self.neighbours[features[index], step % width]
        ok = (near >= 0) & (counts[near] > 0)
        index, step, near = index[ok], step[ok], near[ok].astype(np.int64)
        chance = luck(self.config.seed, "N4", features[index], step) % counts[near].astype(np.uint64)
        drawn = active.rows[starts[near] + chance.astype(np.int64)]
        return self._take(features[index], drawn, step, limits, silent=True)


def _first_of_each(keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Where every distinct key stands first in `order`, keys ascending."""
    by = np.lexsort((order, keys))
    first = np.ones(len(by), bool)
    first[1:] = keys[by][1:] != keys[by][:-1]
    return by[first]


class _Groups:
    """Rows in groups, each in an order of its own that a hash decides. `len` groups."""

    def __init__(self, rows: np.ndarray, codes: np.ndarray, seed: int):
        self._names, dense = np.unique(codes, return_inverse=True)
        self.rows = rows[np.lexsort((luck(seed, "order", rows), dense))]
        self.counts = np.bincount(dense, minlength=len(self._names))
        self._starts = np.cumsum(self.counts) - self.counts
        self._group = np.full(int(rows.max(initial=0)) + 1, -1, np.int64)
        self._group[rows] = dense

    def __len__(self) -> int:
        return max(len(self._names), 1)

    def of_row(self, rows: np.ndarray) -> np.ndarray:
        """Group of each of `rows`, which were given."""
        return self._group[rows]

    def at(self, groups: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Row number `index` of each group, counted round."""
        return self.rows[self._starts[groups] + index % self.counts[groups]]

    def pick(self, groups: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """A row of each group by hash."""
        return self.at(groups, (chance % self.counts[groups].astype(np.uint64)).astype(np.int64))


def neighbour_table(neighbours: Mapping[str, np.ndarray], num_features: int) -> np.ndarray:
    """[F, K] int32 from columns `feature`, `rank`, `neighbour` of evidence table neighbours; -1 where there is none."""
    width = int(neighbours["rank"].max(initial=-1)) + 1
    out = np.full((num_features, width), -1, np.int32)
    out[neighbours["feature"], neighbours["rank"]] = neighbours["neighbour"]
    return out
