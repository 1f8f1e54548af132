"""Which features fire on a token: of every token those that stand for it best, by the F1 of "active" and "this token".

A feature that is active on c of the n_t rows of a token, and on n_f rows in all, has F1 = 2 c / (n_f + n_t). To tell
all features of a common token is to read every activation; the best MAX_FEATURES are found while the store is built.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .text_rows import TextRows, run_starts

#: Features that are kept of every token.
MAX_FEATURES = 64
#: Pairs that wait to be compared with the best ones.
_PENDING = 1_000_000

_LOW = np.uint64(2**32 - 1)


@dataclass(frozen=True)
class Pairs:
    """Features and tokens that they fire on, [P] int32 each; `f1` is rounded to float32."""

    feature: np.ndarray
    token: np.ndarray
    count: np.ndarray
    f1: np.ndarray

    def where(self, kept: np.ndarray) -> "Pairs":
        """Some of them."""
        return Pairs(self.feature[kept], self.token[kept], self.count[kept], self.f1[kept])


class TokenFeatures:
    """Gathers the pairs of one segment, chunk by chunk of features, and keeps the best of every token.

    `candidates` may run on several threads while `add` runs on another; what is kept does not depend on their order.
    """

    def __init__(self, segment_id: int, text: TextRows, num_activations: np.ndarray):
        """`num_activations` [F] int64 of every feature, all splits."""
        self.segment_id = segment_id
        self._num_rows = np.bincount(text.token_ids, minlength=len(text.vocabulary))  # [V]
        self._num_activations = num_activations
        self._num_features = np.zeros(len(self._num_rows), np.int64)
        self._least = np.zeros(len(self._num_rows), np.float32)  # what a pair must reach to be among the best seen
        none = np.zeros(0, np.int32)
        self._parts = [Pairs(none, none, none, np.zeros(0, np.float32))]

    def candidates(self, feature: np.ndarray, token: np.ndarray, count: np.ndarray) -> tuple[Pairs, np.ndarray]:
        """(pairs that may be among the best, [V] features of every token) of all pairs [P] of some features."""
        f1 = self._f1(feature, token, count).astype(np.float32)
        kept = f1 >= self._least[token]
        pairs = Pairs(
            feature[kept].astype(np.int32), token[kept].astype(np.int32), count[kept].astype(np.int32), f1[kept]
        )
        return pairs.where(pairs.f1 >= self._thresholds(pairs)[pairs.token]), np.bincount(
            token, minlength=len(self._num_rows)
        )

    def add(self, found: tuple[Pairs, np.ndarray]) -> None:
        """What `candidates` found of features that have not been added before."""
        pairs, num_features = found
        self._num_features += num_features
        self._parts.append(pairs)
        if sum(len(part.token) for part in self._parts[1:]) > _PENDING:
            self._settle()

    def tables(self) -> dict[str, pa.Table]:
        """Rows of derived.token_features, sorted by token and feature, and of derived.token_counts."""
        self._settle()
        best = self._parts[0]
        best = best.where(self._without_ties(best))
        best = best.where(np.argsort((best.token.astype(np.int64) << 32) | best.feature))
        tokens = np.flatnonzero(self._num_rows)
        return {
            "derived.token_features": pa.table(
                {
                    "segment_id": np.full(len(best.token), self.segment_id, np.uint16),
                    "token_id": best.token,
                    "feature": best.feature,
                    "count": best.count,
                }
            ),
            "derived.token_counts": pa.table(
                {
                    "segment_id": np.full(len(tokens), self.segment_id, np.uint16),
                    "token_id": tokens.astype(np.int32),
                    "num_rows": self._num_rows[tokens].astype(np.int32),
                    "num_features": self._num_features[tokens].astype(np.int32),
                }
            ),
        }

    def _f1(self, feature: np.ndarray, token: np.ndarray, count: np.ndarray) -> np.ndarray:
        return 2.0 * count / (self._num_activations[feature] + self._num_rows[token])

    def _settle(self) -> None:
        """Compare all that wait with the best ones."""
        columns = (np.concatenate([getattr(p, name) for p in self._parts]) for name in Pairs.__dataclass_fields__)
        pairs = Pairs(*columns)
        least = self._thresholds(pairs)
        self._parts = [pairs.where(pairs.f1 >= least[pairs.token])]
        self._least = least

    def _thresholds(self, pairs: Pairs) -> np.ndarray:
        """[V] float32: F1 of the last of a token's best, 0 where a token has fewer pairs than may be kept."""
        # F1 is positive, so its bits sort as it does: one sort of numbers, five times as fast as one of records
        rarity = _LOW - pairs.f1.view(np.uint32).astype(np.uint64)
        keys = np.sort((pairs.token.astype(np.uint64) << np.uint64(32)) | rarity)
        starts = run_starts(keys >> np.uint64(32))
        full = np.diff(np.append(starts, len(keys))) >= MAX_FEATURES
        last = keys[starts[full] + MAX_FEATURES - 1]
        least = np.zeros(len(self._num_rows), np.float32)
        least[(last >> np.uint64(32)).astype(np.int64)] = (_LOW - (last & _LOW)).astype(np.uint32).view(np.float32)
        return least

    def _without_ties(self, pairs: Pairs) -> np.ndarray:
        """[P] bool: no more than may be kept of every token, the smaller feature first where two are even."""
        many = np.flatnonzero((np.bincount(pairs.token, minlength=len(self._num_rows)) > MAX_FEATURES)[pairs.token])
        token, feature = pairs.token[many], pairs.feature[many]
        order = np.lexsort((feature, -self._f1(feature, token, pairs.count[many]), token))
        starts = run_starts(token[order])
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        kept = np.ones(len(pairs.token), bool)
        kept[many[order[rank >= MAX_FEATURES]]] = False
        return kept
