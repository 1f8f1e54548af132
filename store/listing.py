"""Lists of features a page at a time: filters and order on the cards in memory, and what a search found among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .cards import Cards
from .errors import StoreError
from .search import Scored, SearchHit, Why

#: What a list can be sorted by; "score" is the search's own.
SORTS = ("feature", "label", "density", "auroc", "max_activation")


@dataclass(frozen=True)
class Filters:
    """What a feature must be to be listed; None asks nothing. Bounds are inclusive."""

    kind: str | None = None
    min_density: float | None = None
    max_density: float | None = None
    min_auroc: float | None = None

    @property
    def asks(self) -> bool:
        """Whether anything is asked."""
        return self != Filters()


@dataclass(frozen=True)
class Found:
    """What a search found: features with their scores, best first, and why, asked for those that are shown.

    Where the search was asked for its best only, `total` says how many there are.
    """

    features: np.ndarray  # [N] int
    scores: np.ndarray  # [N] float
    why: Callable[[Sequence[int]], dict[int, Why]]
    total: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether these are all."""
        return self.total is None or self.total == len(self.features)

    @classmethod
    def of(cls, scored: Sequence[Scored]) -> "Found":
        """Of features that come with their reasons."""
        reasons = {s.feature: s.matched for s in scored}
        return cls(
            np.array([s.feature for s in scored], np.int64),
            np.array([s.score for s in scored], np.float64),
            lambda features: {f: reasons[f] for f in features},
        )

    def scores_of(self, features: Sequence[int]) -> dict[int, float]:
        """Scores of some of its features."""
        wanted = np.isin(self.features, np.asarray(features, np.int64))
        return dict(zip(self.features[wanted].tolist(), self.scores[wanted].tolist(), strict=True))


@dataclass(frozen=True)
class Listing:
    """One page of a list: `total` features meet what is asked, `hits` are those from `offset` on."""

    total: int
    offset: int
    hits: list[SearchHit]


def select(
    cards: Cards,
    filters: Filters,
    *,
    found: Found | None = None,
    among: np.ndarray | None = None,
    sort: str | None = None,
    descending: bool = True,
) -> np.ndarray:
    """Features that meet `filters` (and are in `found` and `among`), in order. Nulls come last either way.

    Without `sort` the order is that of `found`, else by number. Raises StoreError for what cannot be sorted by.
    """
    if sort is not None and sort not in SORTS:
        raise StoreError(f"no list is sorted by {sort!r}: there is {', '.join(SORTS)}")
    keep = _mask(cards, filters)
    if among is not None:
        inside = np.zeros(len(keep), bool)
        rows = cards.rows(among)
        inside[rows[rows >= 0]] = True
        keep &= inside
    if found is not None:
        rows = cards.rows(found.features)
        if sort is None:
            rows = rows[rows >= 0]
            return cards.features[rows[keep[rows]]]
        inside = np.zeros(len(keep), bool)
        inside[rows[rows >= 0]] = True
        keep &= inside
    order = cards.order(sort or "feature", descending=descending and sort is not None)
    return cards.features[order[keep[order]]]


def _mask(cards: Cards, filters: Filters) -> np.ndarray:
    """[F] bool of the cards' rows."""
    keep = np.ones(len(cards.features), bool)
    if filters.kind is not None:
        keep &= cards.of_kind(filters.kind)
    density, auroc = cards.numbers("density"), cards.numbers("auroc")
    if filters.min_density is not None:
        keep &= density >= filters.min_density
    if filters.max_density is not None:
        keep &= density <= filters.max_density
    if filters.min_auroc is not None:
        keep &= auroc >= filters.min_auroc  # without one it is NaN, and out
    return keep
