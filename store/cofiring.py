"""Which features are active on the same rows: of each feature a few rows are looked at, spread evenly over the text.

With `num_sampled` rows of feature a, of which c have feature b as well, the count is c n_a / num_sampled, and

    pmi = log2( (c / num_sampled) / (n_b / N) )

for N rows of the corpus on which b fires n_b times. Partners are ranked by c x pmi; what happens by chance or less
(pmi <= 0) and what was seen once is left out. Nothing is estimated for features of up to MAX_SAMPLED rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .feature_chunk import NUM_SPLITS, Chunk
from .text_rows import ranges, run_starts

MAX_SAMPLED = 64
MAX_PARTNERS = 64
#: Pairs of (feature, partner) in memory at once.
BLOCK_PAIRS = 1_000_000


@dataclass(frozen=True)
class RowFeatures:
    """The features of every row of a corpus."""

    features: np.ndarray  # [N] int32, in the order of rows; may be a memory map
    starts: np.ndarray  # [R + 1] int64
    num_activations: np.ndarray  # [F] int64, all splits

    @property
    def num_rows(self) -> int:
        """Rows on which anything fires."""
        return int(np.count_nonzero(np.diff(self.starts)))


def cofirings_table(chunk: Chunk, of_rows: RowFeatures) -> pa.Table:
    """Rows of derived.cofirings for the features of `chunk`."""
    n = chunk.counts.reshape(-1, NUM_SPLITS).sum(axis=1)
    starts = chunk.starts[::NUM_SPLITS]
    sampled = np.minimum(n, MAX_SAMPLED)
    feature = np.repeat(np.arange(len(n)), sampled)
    place = ranges(np.zeros(len(n), np.int64), sampled)
    rows = chunk.rows[starts[feature] + (place * n[feature] + n[feature] // 2) // sampled[feature]]
    lengths = of_rows.starts[rows + 1] - of_rows.starts[rows]
    pairs_before = np.append(0, np.cumsum(np.bincount(feature, weights=lengths, minlength=len(n)).astype(np.int64)))
    parts, first = [], 0
    ends = np.append(0, np.cumsum(sampled))
    while first < len(n):
        last = int(np.searchsorted(pairs_before, pairs_before[first] + BLOCK_PAIRS, side="right")) - 1
        last = min(max(last, first + 1), len(n))
        block = slice(ends[first], ends[last])
        parts.append(_partners(feature[block], rows[block], lengths[block], n, sampled, chunk.first, of_rows))
        first = last
    columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]} if parts else {}
    return pa.table({"segment_id": np.full(len(columns["feature"]), chunk.segment_id, np.uint16), **columns})


def _seen_often(
    feature: np.ndarray, partners: np.ndarray, lengths: np.ndarray, of_rows: RowFeatures
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(feature, partner, on how many of its rows) of all pairs that come more than once; `feature` [R] ascending, of
    rows whose features are `partners`, `lengths` [R] of them a row.

    As a product of sparse matrices, features x rows by rows x partners: it counts in a table of d_sae, which takes two
    fifths of the time of sorting the pairs.
    """
    from scipy.sparse import csr_array  # slow to import, and not needed to ask a store

    begin = run_starts(feature)
    shape = len(feature), len(of_rows.num_activations)
    # a row's entries are those of its feature and of its partners; both tables are given as they are, unchecked
    ones, places = np.ones(shape[0], np.uint8), np.arange(shape[0], dtype=np.int32)
    of_features = csr_array((ones, places, np.append(begin, shape[0]).astype(np.int32)), (len(begin), shape[0]))
    ends = np.append(0, np.cumsum(lengths)).astype(np.int32)
    of_partners = csr_array((np.ones(len(partners), np.uint8), partners, ends), shape)
    counted: Any = of_features @ of_partners
    often = np.flatnonzero(counted.data > 1)
    owner = np.repeat(np.arange(len(begin)), np.diff(counted.indptr))[often]
    return feature[begin[owner]], counted.indices[often].astype(np.int64), counted.data[often].astype(np.int64)


def _partners(feature, rows, lengths, n, sampled, first_feature: int, of_rows: RowFeatures) -> dict[str, np.ndarray]:
    """Columns of the partners of a few features."""
    own, partner, seen = _seen_often(feature, of_rows.features[ranges(of_rows.starts[rows], lengths)], lengths, of_rows)
    expected = of_rows.num_activations[partner] / of_rows.num_rows
    pmi = np.log2(seen / sampled[own] / expected)
    kept = (pmi > 0) & (partner != own + first_feature)
    own, partner, seen, pmi = own[kept], partner[kept], seen[kept], pmi[kept]
    order = np.lexsort((partner, -(seen * pmi), own))
    own, partner, seen, pmi = own[order], partner[order], seen[order], pmi[order]
    begin = run_starts(own)
    rank = np.arange(len(own)) - np.repeat(begin, np.diff(np.append(begin, len(own))))
    kept = rank < MAX_PARTNERS
    own, partner, seen, pmi, rank = own[kept], partner[kept], seen[kept], pmi[kept], rank[kept]
    return {
        "feature": (own + first_feature).astype(np.int32),
        "rank": (rank + 1).astype(np.int8),
        "partner": partner.astype(np.int32),
        "count": np.rint(seen * n[own] / sampled[own]).astype(np.int32),
        "num_sampled": sampled[own].astype(np.uint8),
        "pmi": np.round(pmi, 2).astype(np.float32),  # decimals compress; sampling errs by more
    }
