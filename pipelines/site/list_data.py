"""What lists show and are filtered and sorted by, in files of neighbouring features, and the order of the labels."""

from collections.abc import Sequence

import numpy as np

from saeql.store.cards import Cards

from ..browser.rendering import fixed
from ..shown import share, visible
from .files import SiteFiles, steps

#: Features of one file: a search shows features from anywhere, a sorted list reads them all.
LIST_FEATURES = 1024


def write_list_data(files: SiteFiles, place: str, cards: Cards, features: np.ndarray, kinds: Sequence[str]) -> None:
    """Write those of `features` (ascending); `kinds` are what the numbers of kinds mean, `place` begins the names."""
    rows = cards.rows(features)
    numbers = {name: cards.numbers(name)[rows] for name in ("density", "auroc", "max_activation")}
    labels, found_kinds = (cards.column(name).take(rows).to_pylist() for name in ("label", "kind"))
    kind = np.array([kinds.index(name) for name in found_kinds], np.uint8)
    for start in range(0, len(features), LIST_FEATURES):
        part = slice(start, start + LIST_FEATURES)
        files.data(
            f"{place}/c{start // LIST_FEATURES}",
            {
                "kinds": [visible(name) for name in kinds],
                "label": [visible(label) for label in labels[part]],
                "auroc_text": [fixed(None if np.isnan(x) else x) for x in numbers["auroc"][part].tolist()],
                "density_text": [share(x) for x in numbers["density"][part].tolist()],
            },
            kind=kind[part],
            **{name: values[part] for name, values in numbers.items()},
        )
    order = {  # places of the features, not their numbers
        way: np.argsort(np.argsort(_rank(cards, descending)[rows], kind="stable"), kind="stable")
        for way, descending in (("ascending", False), ("descending", True))
    }
    files.data(f"{place}/labels", {}, **{way: values.astype(np.uint32) for way, values in order.items()})
    if (features != np.arange(len(features))).any():
        files.data(f"{place}/numbers", {}, steps=steps(features))


def _rank(cards: Cards, descending: bool) -> np.ndarray:
    """[F] place of every card in the order of the labels."""
    rank = np.empty(len(cards.features), np.int64)
    rank[cards.order("label", descending=descending)] = np.arange(len(cards.features))
    return rank
