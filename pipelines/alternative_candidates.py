"""Candidates that join two others of a feature: "this; or that", where both together have a better F1 than either."""

from collections.abc import Sequence

import numpy as np

from .candidate_counts import SAMPLED_ROWS, Counter, Found
from .predicates import Either, Predicate

#: The F1 from which on nothing is added, what has to be gained; how many candidates are joined, how many pairs kept.
GOOD_ENOUGH, MIN_GAIN, JOINED, KEPT = 0.8, 0.02, 8, 2


def alternatives(counter: Counter, ranked: Sequence[Sequence[tuple[float, Predicate]]]) -> Found:
    """The best pairs of `ranked` (F1 and predicate, best first) of every feature.

    Hits are those on a sample of the active rows. The support of two together is at most the sum of theirs less what
    both hit, so the F1 of a pair is rather too low.
    """
    features, rows, _ = counter.sample(SAMPLED_ROWS)
    starts = np.searchsorted(features, np.arange(counter.active.num_features + 1))
    out: Found = []
    for feature, own in enumerate(ranked):
        if len(own) < 2 or own[0][0] >= GOOD_ENOUGH:
            continue
        mine = rows[starts[feature] : starts[feature + 1]]
        f1, predicates = np.array([f for f, _ in own[:JOINED]]), [p for _, p in own[:JOINED]]
        holds = np.array([p.at(counter.windows, mine) for p in predicates], np.float64)
        positives = float(counter.num_active[feature])
        both = positives / len(mine) * (holds @ holds.T)  # [n, n] active rows; of one alone on the diagonal
        hits = np.diag(both)
        support = np.maximum(2 * hits / f1 - positives, hits)
        joined = hits[:, None] + hits[None, :] - both
        scores = 2 * joined / (positives + support[:, None] + support[None, :] - both)
        scores[np.tril_indices(len(f1))] = 0
        for at in np.argsort(-scores, axis=None, kind="stable")[:KEPT]:
            first, second = np.unravel_index(at, scores.shape)
            if scores[first, second] >= f1[0] + MIN_GAIN:
                pair = Either(predicates[int(first)], predicates[int(second)])
                out.append((feature, float(scores[first, second]), pair))
    return out
