"""Intruders: of five texts the feature fires in four; who reads them names the odd one out. No label is involved.

Chance is 1 in 5 (Paulo et al. 2025, arXiv:2507.08473). The embedder picks the text that is least like the other four; a
language model may pick in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..embedder import Embedder
from ..split_rows import SplitRows
from .row_text import VIEWS
from .statistics import wilson

SIZE = 5
CHANCE = 1 / SIZE

#: Groups of `SIZE` texts -> the place of the odd one in each, -1 where no answer could be had.
Pick = Callable[[Sequence[Sequence[str]]], np.ndarray]


@dataclass(frozen=True)
class IntruderResult:
    """Share of n groups whose intruder was found, with Wilson's 95 % interval; None where there was no group."""

    accuracy: float | None
    low: float | None
    high: float | None
    n: int


def embedder_pick(embedder: Embedder) -> Pick:
    """The text whose mean cosine with the other four is lowest. Equal ones: the first, which is a place by chance."""

    def pick(groups: Sequence[Sequence[str]]) -> np.ndarray:
        if not groups:
            return np.zeros(0, np.int64)
        vectors = embedder.embed([text for group in groups for text in group]).reshape(len(groups), SIZE, -1)
        cosines = np.einsum("gid,gjd->gij", vectors, vectors).sum(axis=2)  # with itself too: the same for all
        return np.round(cosines, 4).argmin(axis=1)

    return pick


def find_intruders(
    pick: Pick,
    active: Sequence[np.ndarray],
    inactive: Sequence[np.ndarray],
    split: SplitRows,
    *,
    view: str = "near",
    trials: int = 10,
    seed: int = 0,
) -> list[IntruderResult]:
    """For every feature `trials` groups of four of its `active` rows and one `inactive` row, in random order.

    Groups of a feature draw four anew each time, an intruder only once; so there are no more groups than intruders. A
    feature with fewer than four active rows has no group. No answer counts as wrong.
    """
    groups, owners, places = [], [], []
    rng = np.random.default_rng(seed)
    for feature, (own, others) in enumerate(zip(active, inactive, strict=True)):
        if len(own) < SIZE - 1:
            continue
        for intruder in rng.permutation(others)[:trials]:
            place = int(rng.integers(SIZE))
            groups.append(np.insert(rng.choice(own, SIZE - 1, replace=False), place, intruder))
            owners.append(feature)
            places.append(place)
    texts = VIEWS[view](split.windows, np.concatenate([np.zeros(0, np.int64), *groups]))
    picked = pick([texts[i : i + SIZE] for i in range(0, len(texts), SIZE)])
    owner = np.array(owners, np.int64)
    right = np.bincount(owner, np.asarray(picked) == np.array(places), len(active)) if groups else np.zeros(len(active))
    n = np.bincount(owner, minlength=len(active))
    return [_result(hits, int(count)) for hits, count in zip(right, n, strict=True)]


def _result(hits: float, n: int) -> IntruderResult:
    if n == 0:
        return IntruderResult(None, None, None, 0)
    low, high = wilson(np.asarray(hits), np.asarray(n))
    return IntruderResult(hits / n, float(low), float(high), n)
