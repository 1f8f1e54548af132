"""Candidate predicates of the words shortly before a row, made on train: stems among the last tokens of its document.

Hits are those on a sample of the active rows; the support of several stems is at most the sum of theirs, so the F1 of a
set is rather too low.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from .block_sort import count_codes
from .candidate_counts import SAMPLED_ROWS, Counter, Found, best_of_each, best_sets, distinct
from .predicates import Recent, Stems

#: How many of the last tokens are looked at.
RECENT = (2, 4, 16)
_FEATURES_AT_ONCE = 512


def recent_candidates(counter: Counter) -> Found:
    """Stems, one or several, among the last tokens of the document."""
    stems = counter.windows.vocabulary.table("stem")
    if not len(stems.names):
        return []
    code_of_row = np.append(stems.codes, -1)[counter.windows.tokens.ravel()]
    segments = counter.windows.segments
    supports = {
        last: _recent_support(code_of_row, segments, counter.eligible, len(stems.names), last) for last in RECENT
    }
    features, rows, weight = counter.sample(SAMPLED_ROWS)
    found_all: list[tuple[int, float, tuple[list[int], int]]] = []
    blocks = np.arange(0, counter.active.num_features + _FEATURES_AT_ONCE, _FEATURES_AT_ONCE)
    for low, high in pairwise(np.searchsorted(features, blocks)):
        for last in RECENT:
            part = features[low:high], rows[low:high]
            found = _recent(counter, part, weight, code_of_row, segments, supports[last], last)
            found_all += [(f, f1, (codes, last)) for f, f1, codes in found]
    return [
        (f, f1, Recent(Stems(tuple(stems.names[c] for c in codes)), last))
        for f, f1, (codes, last) in best_of_each(found_all)
    ]


def _recent_support(codes: np.ndarray, segments: np.ndarray, eligible: np.ndarray, num: int, last: int) -> np.ndarray:
    """[C] rows that count with the code among the last `last` tokens of their document."""
    rows = np.flatnonzero(codes >= 0)
    rows = rows[np.argsort(codes[rows], kind="stable")]
    own = codes[rows]
    following = np.append(np.where(own[1:] == own[:-1], rows[1:], codes.size), codes.size)[: len(rows)]
    ends = np.searchsorted(segments, segments[rows], "right")
    ends = np.minimum(np.minimum(rows + last, following), ends)
    counted = np.append(0, np.cumsum(eligible))
    return np.bincount(own, counted[ends] - counted[rows], num)


def _recent(
    counter: Counter, part: tuple[np.ndarray, np.ndarray], weight: np.ndarray, code_of_row: np.ndarray,
    segments: np.ndarray, support: np.ndarray, last: int,
) -> Iterator[tuple[int, float, list[int]]]:  # fmt: skip
    """(feature, F1, stem codes) of some features; the support of a set is at most the sum of its stems'."""
    (features, rows), num, limits = part, len(support), counter.limits
    keys = []
    for step in range(last):
        at = np.maximum(rows - step, 0)
        inside = (rows >= step) & (segments[at] == segments[rows]) & (code_of_row[at] >= 0)
        keys.append(np.flatnonzero(inside) * num + code_of_row[at[inside]])
    sample, codes = np.divmod(distinct(np.concatenate(keys)), num)
    pairs, hits = count_codes(features[sample], codes, num)
    owner, code = np.divmod(pairs, num)
    keep = hits >= limits.min_hits
    owner, code, hits = owner[keep], code[keep], hits[keep]
    scaled = hits * weight[owner]
    sampled = np.minimum(counter.num_active, SAMPLED_ROWS)
    for size, chosen, _ in best_sets(owner, scaled, support[code], counter.num_active, (1, *limits.set_sizes)):
        kept = np.sort(owner[chosen] * num + code[chosen])
        if not len(kept):
            return
        found = kept[np.minimum(np.searchsorted(kept, features[sample] * num + codes), len(kept) - 1)]
        held = distinct(sample[found == features[sample] * num + codes])
        together = np.bincount(features[held], minlength=len(sampled)) * weight  # rows, not stems
        total = np.bincount(owner[chosen], support[code[chosen]], len(sampled))
        f1 = 2 * together / np.maximum(counter.num_active + total, 1)
        lift = together / np.maximum(total, 1) / np.maximum(counter.base_rate, 1e-12)
        starts = np.flatnonzero(np.diff(owner[chosen], prepend=-1))
        for members, start in zip(np.split(code[chosen], starts[1:]), starts, strict=False):
            feature = int(owner[chosen[start]])
            if f1[feature] >= limits.min_f1 and lift[feature] >= limits.min_lift and (size == 1 or len(members) > 1):
                yield feature, float(f1[feature]), [int(c) for c in members]
