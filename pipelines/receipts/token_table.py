"""The token table: what a feature's activity looks like from the token alone, counted on train documents.

    P(active | token t) = (n_active(t) + p0) / (n(t) + 1)        p0 = the feature's rate over all train rows

and the same of pairs (previous token, token), smoothed towards the token's own estimate. It needs no label and no
model: what a label does not add to it is no more than a list of tokens.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from ..block_sort import sum_by_code
from ..split_rows import ActiveRows, SplitRows


@dataclass(frozen=True)
class Counts:
    """Active rows and summed activation of pairs (feature, code), sorted by key = feature * `num_codes` + code."""

    keys: np.ndarray  # [P] int64
    active: np.ndarray  # [P] int64
    sums: np.ndarray  # [P] float64
    num_codes: int

    @classmethod
    def of(cls, active: ActiveRows, codes: np.ndarray, num_codes: int) -> Self:
        """Of the active rows; `codes` [R] is -1 where a row has none."""
        own = codes[active.rows]
        keep = own >= 0
        if not keep.all():
            active, own = active.where(keep), own[keep]
        return cls(*sum_by_code(active.features, own, num_codes, active.values), num_codes)

    @property
    def features(self) -> np.ndarray:
        """[P] feature of each pair."""
        return self.keys // self.num_codes

    @property
    def codes(self) -> np.ndarray:
        """[P] code of each pair."""
        return self.keys % self.num_codes

    def find(self, features: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Index of each pair, -1 where it never occurred (code -1 included)."""
        wanted = features.astype(np.int64) * self.num_codes + codes
        if len(self.keys) == 0:
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where((self.keys[at] == wanted) & (codes >= 0), at, -1)

    def lookup(self, features: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Active rows of each pair, 0 where it never occurred."""
        at = self.find(features, codes)
        return np.where(at >= 0, self.active[at] if len(self.active) else 0, 0)


class TokenTable:
    """Counted on one split, train; asked about rows of another."""

    def __init__(self, split: SplitRows):
        self.vocabulary = len(split.windows.vocabulary)
        tokens = split.windows.tokens.ravel().astype(np.int64)
        self.num_rows = split.num_rows
        self.rate = split.active.counts / max(self.num_rows, 1)  # [F] p0
        self.count = np.bincount(tokens[split.eligible], minlength=self.vocabulary)  # [V]
        self.active = Counts.of(split.active, tokens, self.vocabulary)
        pairs = bigrams(split, self.vocabulary)
        self._pair_names, dense = np.unique(pairs[split.eligible], return_inverse=True)
        self._pair_count = np.bincount(dense, minlength=len(self._pair_names))
        codes = np.full(len(pairs), -1, np.int64)
        codes[split.eligible] = dense
        self.active_pairs = Counts.of(split.active, codes, max(len(self._pair_names), 1))

    @classmethod
    def of(cls, split: SplitRows) -> Self:
        """Counted on `split`."""
        return cls(split)

    def predict(self, features: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """[n] P(active | token) of pairs of features [n] and token codes [n]."""
        return (self.active.lookup(features, tokens) + self.rate[features]) / (self.count[tokens] + 1)

    def predict_pairs(self, features: np.ndarray, rows: np.ndarray, split: SplitRows) -> np.ndarray:
        """[n] P(active | previous token, token) of pairs of features [n] and rows [n] of `split`."""
        tokens = split.windows.tokens.ravel()[rows].astype(np.int64)
        pairs = bigrams(split, self.vocabulary)[rows]
        at = np.searchsorted(self._pair_names, pairs)
        at = np.minimum(at, max(len(self._pair_names) - 1, 0))
        known = self._pair_names[at] == pairs if len(self._pair_names) else np.zeros(len(pairs), bool)
        code = np.where(known, at, -1)
        count = np.where(known, self._pair_count[at] if len(self._pair_count) else 0, 0)
        return (self.active_pairs.lookup(features, code) + self.predict(features, tokens)) / (count + 1)


def bigrams(split: SplitRows, vocabulary: int) -> np.ndarray:
    """[R] int64: previous token * V + token; rows without a previous token are not among those that count."""
    tokens = split.windows.tokens.astype(np.int64)
    out = np.full(tokens.shape, -1, np.int64)
    out[:, 1:] = tokens[:, :-1] * vocabulary + tokens[:, 1:]
    return out.ravel()


def token_auroc(table: TokenTable, split: SplitRows) -> np.ndarray:
    """[F] AUROC of P(active | token) over all rows of `split` that count, exact; NaN where no row is active.

    Rows of one token tie. Tokens on which a feature was never active on train tie too where they are equally frequent
    there, so a feature has few groups of ties: its own tokens, and one a train count.
    """
    tokens = split.windows.tokens.ravel().astype(np.int64)
    present = np.bincount(tokens[split.eligible], minlength=table.vocabulary)  # [V] test rows
    levels, level = np.unique(table.count, return_inverse=True)
    level_rows = np.bincount(level, weights=present, minlength=len(levels))
    seen = Counts.of(split.active, tokens, table.vocabulary)
    out = np.full(split.active.num_features, np.nan)
    own = np.searchsorted(table.active.keys, np.arange(len(out) + 1) * table.vocabulary)
    test = np.searchsorted(seen.keys, np.arange(len(out) + 1) * table.vocabulary)
    own_codes, seen_codes = table.active.codes, seen.codes
    for feature in np.flatnonzero(split.active.counts):
        mine = own_codes[own[feature] : own[feature + 1]]
        hit = seen_codes[test[feature] : test[feature + 1]]
        hits = seen.active[test[feature] : test[feature + 1]]
        place = np.searchsorted(mine, hit)
        known = np.zeros(len(hit), bool)
        known[place < len(mine)] = mine[place[place < len(mine)]] == hit[place < len(mine)]
        group = np.where(known, place, len(mine) + level[hit])
        positive = np.bincount(group, hits, len(mine) + len(levels))
        rest = level_rows - np.bincount(level[mine], present[mine], len(levels))
        every = np.concatenate([present[mine], rest])
        rate = table.rate[feature]
        active = table.active.active[own[feature] : own[feature + 1]]
        score = np.concatenate([(active + rate) / (table.count[mine] + 1), rate / (levels + 1)])
        out[feature] = _grouped_auroc(score, positive, every - positive)
    return out


def _grouped_auroc(score: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float:
    """AUROC where group i has `positive[i]` and `negative[i]` rows of `score[i]`; equal scores tie."""
    order = np.argsort(score)
    score, positive, negative = score[order], positive[order], negative[order]
    starts = np.flatnonzero(np.append(True, score[1:] != score[:-1]))
    p, q = np.add.reduceat(positive, starts), np.add.reduceat(negative, starts)
    pairs = p.sum() * q.sum()
    below = np.cumsum(q) - q
    return float((p * (below + q / 2)).sum() / pairs) if pairs else float("nan")


def token_r2(table: TokenTable, split: SplitRows) -> np.ndarray:
    """[F] 1 - sum (z - m(token))^2 / sum (z - mean z)^2 over the rows of `split`; NaN where z does not vary.

    z is the activation where the feature is active and 0 elsewhere; m is its mean over train rows of the token, with
    one row of the feature's mean beside them.
    """
    tokens = split.windows.tokens.ravel().astype(np.int64)
    present = np.bincount(tokens[split.eligible], minlength=table.vocabulary)
    num, size = split.num_rows, split.active.num_features
    active = split.active
    total = np.bincount(active.features, active.values.astype(np.float64), size)
    squares = np.bincount(active.features, active.values.astype(np.float64) ** 2, size)
    base = np.bincount(table.active.features, table.active.sums, size) / max(table.num_rows, 1)  # [F] mean z on train
    # predictions of the tokens on which the feature was never active: base / (n + 1)
    squared = present / (table.count + 1) ** 2
    mine, codes = table.active.features, table.active.codes
    guess = (table.active.sums + base[mine]) / (table.count[codes] + 1)
    plain = base[mine] / (table.count[codes] + 1)
    predicted = base**2 * squared.sum() + np.bincount(mine, present[codes] * (guess**2 - plain**2), size)
    row_tokens = tokens[active.rows]
    at = table.active.find(active.features, row_tokens)
    of_row = base[active.features] / (table.count[row_tokens] + 1)
    if len(guess):
        of_row = np.where(at >= 0, guess[at], of_row)
    crossed = np.bincount(active.features, active.values * of_row, size)
    spread = squares - total**2 / max(num, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, 1 - (squares - 2 * crossed + predicted) / spread, np.nan)
