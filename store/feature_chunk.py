"""What is derived of the activations of a range of features: their order by size, statistics, common tokens, examples.

Activations are grouped by (feature, split): group g is feature `first + g // 3` on split `g % 3`. Sorting packs a group
and a value into one 64-bit key, which numpy sorts several times faster than records.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from .records import SPLITS
from .text_rows import AFTER, BEFORE, TextRows, ranges, run_starts

#: Groups are 16 bits of a key.
MAX_FEATURES = 2**16 // len(SPLITS)
NUM_SPLITS = len(SPLITS)
#: Windows shown as top examples, by split.
TOP_WINDOWS = (20, 0, 10)
SAMPLES_PER_DECILE = 2
NUM_TOP_TOKENS = 10

RECORD = np.dtype([("row", "<u4"), ("group", "<u2"), ("activation", "<f4")])

_LOW = np.uint64(2**32 - 1)
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Chunk:
    """Activations of features first .. first + num_features - 1 on one corpus, in the order of groups, then rows."""

    segment_id: int
    first: int
    num_features: int
    text: TextRows
    groups: np.ndarray  # [N] uint16, ascending
    rows: np.ndarray  # [N] int64, ascending within a group
    activations: np.ndarray  # [N] float32, positive
    counts: np.ndarray  # [G] int64 rows of every group
    starts: np.ndarray  # [G] int64
    by_size: np.ndarray  # [N] index: groups in order, largest activation first, then the earlier row

    @cached_property
    def token_runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(group, count, token id) of every token that a group fires on, by feature, token and split."""
        feature, split = np.divmod(self.groups, NUM_SPLITS)
        keys = feature.astype(np.uint64) << np.uint64(34)
        keys |= self.text.token_ids[self.rows].astype(np.uint64) << np.uint64(2)
        keys |= split.astype(np.uint64)
        keys.sort()
        starts = run_starts(keys)
        count = np.diff(np.append(starts, len(keys)))
        found = keys[starts]
        group = (found >> np.uint64(34)).astype(np.int64) * NUM_SPLITS + (found & np.uint64(3)).astype(np.int64)
        return group, count, ((found >> np.uint64(2)) & _LOW).astype(np.int64)

    def token_pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(feature, token id, count) of every token that a feature fires on, over all splits."""
        group, count, token = self.token_runs
        feature = group // NUM_SPLITS
        starts = run_starts((feature << 32) | token)
        if len(starts) == 0:
            return feature, token, count
        return self.first + feature[starts], token[starts], np.add.reduceat(count, starts)


def make_chunk(segment_id: int, first: int, num_features: int, text: TextRows, records: np.ndarray) -> Chunk:
    """Order `records` ([N] of RECORD, in the order of rows)."""
    groups = np.ascontiguousarray(records["group"])
    order = np.argsort(groups, kind="stable")  # radix sort: 16 bits
    groups = groups[order]
    activations = records["activation"][order]
    size = _LOW - activations.view(np.uint32).astype(np.uint64)  # positive floats sort like their bits
    counts = np.bincount(groups, minlength=num_features * NUM_SPLITS)
    return Chunk(
        segment_id=segment_id,
        first=first,
        num_features=num_features,
        text=text,
        groups=groups,
        rows=records["row"][order].astype(np.int64),
        activations=activations,
        counts=counts,
        starts=np.cumsum(counts) - counts,
        by_size=np.argsort(_keys(groups, size), kind="stable"),
    )


def _keys(groups: np.ndarray, low: np.ndarray) -> np.ndarray:
    return (groups.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)


def by_feature_table(chunk: Chunk) -> pa.Table:
    """Rows of evidence.activations_by_feature."""
    rows = chunk.rows[chunk.by_size]
    return pa.table(
        {
            "segment_id": np.full(len(rows), chunk.segment_id, np.uint16),
            "feature": chunk.first + chunk.groups.astype(np.int32) // NUM_SPLITS,
            "split": _split_names(chunk.groups % NUM_SPLITS),
            "window_id": chunk.text.window_ids[rows],
            "position": chunk.text.positions[rows],
            "activation": chunk.activations[chunk.by_size],
        }
    )


def _split_names(splits: np.ndarray) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(splits.astype(np.int8)), pa.array(SPLITS))


def stats_table(chunk: Chunk) -> pa.Table:
    """Rows of derived.feature_stats, zeros where a feature never fires."""
    n, size = chunk.counts, len(chunk.counts)
    fires = n > 0
    sums = np.bincount(chunk.groups, weights=chunk.activations, minlength=size)
    sorted_values = chunk.activations[chunk.by_size]
    largest = np.zeros(size, np.float32)
    largest[fires] = sorted_values[chunk.starts[fires]]
    kept = np.tile(chunk.text.num_kept_rows, chunk.num_features)
    group, count, _ = chunk.token_runs
    distinct = np.bincount(group, minlength=size)
    weighted = np.bincount(group, weights=count * np.log2(count), minlength=size)
    safe = np.maximum(n, 1)
    entropy = np.where(fires, np.maximum(np.log2(safe) - weighted / safe, 0), 0)
    entropy[distinct <= 1] = 0
    return pa.table(
        {
            "segment_id": np.full(size, chunk.segment_id, np.uint16),
            "feature": (chunk.first + np.arange(size) // NUM_SPLITS).astype(np.int32),
            "split": _split_names(np.arange(size) % NUM_SPLITS),
            "num_activations": n.astype(np.int64),
            "density": np.where(kept > 0, n / np.maximum(kept, 1), 0.0),
            "mean_activation": sums / safe,
            "max_activation": largest,
            **{f"p{round(q * 100)}": _quantile(sorted_values, chunk.starts, n, q) for q in (0.5, 0.9, 0.99)},
            "token_entropy": entropy,
            "num_distinct_tokens": distinct.astype(np.int64),
            "num_documents": _num_documents(chunk).astype(np.int64),
        }
    )


def _quantile(values: np.ndarray, starts: np.ndarray, n: np.ndarray, q: float) -> np.ndarray:
    """[G] float32: interpolated between neighbours, of values that descend within a group; 0 for an empty group."""
    out = np.zeros(len(n), np.float32)
    some = n > 0
    place = (n[some] - 1) * (1 - q)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, n[some] - 1)
    upper, lower = values[starts[some] + below].astype(np.float64), values[starts[some] + above].astype(np.float64)
    out[some] = upper + (lower - upper) * (place - below)
    return out


def _num_documents(chunk: Chunk) -> np.ndarray:
    """[G] documents in which a group fires."""
    keys = _keys(chunk.groups, chunk.text.document_ids[chunk.rows])
    if not chunk.text.has_whole_documents:
        keys.sort()
    return np.bincount(chunk.groups[run_starts(keys)], minlength=len(chunk.counts))


def top_tokens_table(chunk: Chunk) -> pa.Table:
    """Rows of derived.feature_tokens: the commonest tokens on train, the smaller token id first where two are even."""
    group, count, token = chunk.token_runs
    train = group % NUM_SPLITS == 0
    limit = 2**24 - 1
    rarity = limit - np.minimum(count[train], limit)
    keys = np.sort(
        (group[train].astype(np.uint64) << np.uint64(48))
        | (rarity.astype(np.uint64) << np.uint64(24))
        | token[train].astype(np.uint64)
    )
    feature = (keys >> np.uint64(48)).astype(np.int64) // NUM_SPLITS
    starts = run_starts(feature)
    lengths = np.minimum(np.diff(np.append(starts, len(keys))), NUM_TOP_TOKENS)
    tokens = (keys[ranges(starts, lengths)] & np.uint64(limit)).astype(np.int64)
    return pa.table(
        {
            "segment_id": np.full(len(starts), chunk.segment_id, np.uint16),
            "feature": (chunk.first + feature[starts]).astype(np.int32),
            "top_tokens": pa.ListArray.from_arrays(
                pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32)),
                pa.array(chunk.text.vocabulary[tokens], pa.string()),
            ),
        }
    )


def examples_table(chunk: Chunk) -> pa.Table:
    """Rows of derived.examples: strongest windows and samples of every tenth, with the activations around them."""
    tops, top_rank = _top_windows(chunk)
    samples, decile, sample_rank = _decile_samples(chunk)
    place = np.concatenate([tops, samples])  # index into by_size
    is_sample = np.repeat([0, 1], [len(tops), len(samples)])
    deciles = np.concatenate([np.zeros(len(tops), np.int64), decile])
    ranks = np.concatenate([top_rank, sample_rank])
    order = np.argsort(
        (chunk.groups[place].astype(np.int64) << 32) | (is_sample << 24) | ((10 - deciles) << 16) | ranks, kind="stable"
    )
    place, is_sample, deciles, ranks = place[order], is_sample[order], deciles[order], ranks[order]
    groups, picked = chunk.groups[place], chunk.by_size[place]
    rows = chunk.rows[picked]
    lengths, hits = _context(chunk, groups, rows)
    offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
    near = (chunk.rows[hits] - np.repeat(rows, lengths)).astype(np.int8)
    return pa.table(
        {
            "segment_id": np.full(len(place), chunk.segment_id, np.uint16),
            "feature": chunk.first + groups.astype(np.int32) // NUM_SPLITS,
            "split": _split_names(groups % NUM_SPLITS),
            "kind": pa.DictionaryArray.from_arrays(pa.array(is_sample.astype(np.int8)), pa.array(["top", "decile"])),
            "decile": pa.array(deciles.astype(np.int8), mask=is_sample == 0),
            "rank": ranks.astype(np.int16),
            "window_id": chunk.text.window_ids[rows],
            "position": chunk.text.positions[rows],
            "activation": chunk.activations[picked],
            "offsets": pa.ListArray.from_arrays(offsets, pa.array(near)),
            "activations": pa.ListArray.from_arrays(offsets, pa.array(chunk.activations[hits])),
        }
    )


def _top_windows(chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
    """(index into by_size, rank from 1) of the strongest row of each group's strongest windows."""
    limits = np.tile(TOP_WINDOWS, chunk.num_features)
    pending = np.flatnonzero((chunk.counts > 0) & (limits > 0))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    looked_at = 48  # rows of a group: most have their windows among so many
    while len(pending):
        taken = np.minimum(looked_at, chunk.counts[pending])
        owner = np.repeat(np.arange(len(pending), dtype=np.uint64), taken)
        rank = ranges(np.zeros(len(pending), np.int64), taken).astype(np.uint64)
        rows = chunk.rows[chunk.by_size[ranges(chunk.starts[pending], taken)]]
        window = (chunk.text.window_ids[rows] - chunk.text.first_window).astype(np.uint64)
        assert looked_at <= 2**24 and len(chunk.text.starts) <= 2**24
        keys = np.sort((owner << np.uint64(48)) | (window << np.uint64(24)) | rank)
        keys = keys[run_starts(keys >> np.uint64(24))]  # the strongest row of each window
        best = np.sort(((keys >> np.uint64(48)) << np.uint64(24)) | (keys & np.uint64(2**24 - 1)))
        owner = (best >> np.uint64(24)).astype(np.int64)
        num = np.bincount(owner, minlength=len(pending))
        place = np.arange(len(best)) - np.repeat(np.cumsum(num) - num, num)
        done = (num >= limits[pending]) | (taken == chunk.counts[pending])
        kept = done[owner] & (place < limits[pending][owner])
        rank = (best[kept] & np.uint64(2**24 - 1)).astype(np.int64)
        found.append((chunk.starts[pending][owner[kept]] + rank, place[kept] + 1))
        pending, looked_at = pending[~done], looked_at * 4
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def _decile_samples(chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index into by_size, decile, rank) of rows drawn from every tenth of the train activations of each feature.

    Which rows depends on nothing but the feature and how often it fires.
    """
    features = np.arange(chunk.num_features)
    n = chunk.counts[features * NUM_SPLITS]
    tenth = np.arange(10)
    first = -(-tenth * n[:, None] // 10)  # [F, 10] ceil
    width = -(-(tenth + 1) * n[:, None] // 10) - first
    draw = _mix(((chunk.first + features[:, None]) * 16 + tenth).astype(np.uint64))
    low = (draw & _LOW).astype(np.int64) % np.maximum(width, 1)
    step = (draw >> np.uint64(32)).astype(np.int64) % np.maximum(width - 1, 1)
    other = (low + 1 + step) % np.maximum(width, 1)
    places, deciles, ranks = [], [], []
    start = chunk.starts[features * NUM_SPLITS][:, None]
    pairs = (np.where(width > 1, np.minimum(low, other), low), np.maximum(low, other))
    for number, pick in enumerate(pairs[:SAMPLES_PER_DECILE]):
        there = width > number
        places.append((start + first + pick)[there])
        deciles.append(np.broadcast_to(10 - tenth, width.shape)[there])
        ranks.append(np.full(int(there.sum()), number + 1))
    return np.concatenate(places), np.concatenate(deciles), np.concatenate(ranks)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: well spread bits of any numbers."""
    x = x + _MIX[0]
    x = (x ^ (x >> np.uint64(30))) * _MIX[1]
    x = (x ^ (x >> np.uint64(27))) * _MIX[2]
    return x ^ (x >> np.uint64(31))


def _context(chunk: Chunk, groups: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how many, index into the chunk) of the activations of the same group in the visible context of each row."""
    text = chunk.text
    window = text.window_ids[rows] - text.first_window
    first = np.maximum(rows - BEFORE, text.starts[window])
    last = np.minimum(rows + AFTER, text.starts[window + 1] - 1)
    keys = _keys(chunk.groups, chunk.rows)
    low = np.searchsorted(keys, _keys(groups, first), side="left")
    high = np.searchsorted(keys, _keys(groups, last), side="right")
    return high - low, ranges(low, high - low)
