"""Everything that is shown of one feature, read from the store: for the page, the API and notebooks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from saeql.store.cards import Cards
from saeql.store.feature_batch import FeatureBatch
from saeql.store.feature_store import Example, FeatureStore

from ..charts import Chart, bins_chart, density_bins, histogram_chart, with_density
from ..receipts.card import CardLine, card_lines
from ..receipts.token_identity_control import attributes_to_token
from .shading import Piece, pieces

NUM_TOP = 20
NUM_HELD_OUT = 10
NUM_OF_DECILE = 2
NUM_READ = 300  # examples of both kinds, more than there are
NUM_EFFECTS = 10
NUM_NEAR = 10

#: Histograms of the densities of all features, and the edges of their bins, drawn once for the cards of an open store.
_DENSITIES: "WeakKeyDictionary[Cards, tuple[Chart | None, np.ndarray]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class ShownExample:
    """An example with its tokens ready to draw."""

    example: Example
    pieces: list[Piece]


@dataclass(frozen=True)
class FeaturePage:
    """One feature. `row` is its row of the view `features`, `by_token` whether single tokens may stand out."""

    row: dict[str, Any]
    receipts: list[dict[str, Any]]
    card: list[CardLine]
    by_token: bool
    effects: dict[str, list[dict[str, Any]]]  # 'promoted' and 'suppressed' rows of logit_effects
    top: list[ShownExample]
    deciles: list[tuple[int, list[ShownExample]]]  # 10, the strongest tenth, first
    neighbours: list[dict[str, Any]]
    cofirings: list[dict[str, Any]]
    counts: np.ndarray  # of activations, and the edges of their bins
    edges: np.ndarray
    densities: tuple[Chart | None, np.ndarray]  # of all features, and the edges of their bins
    split: str
    shade: bool
    held_out: list[ShownExample]  # strongest on test, where those of both splits are wanted

    @property
    def feature(self) -> int:
        """Its number."""
        return self.row["feature"]

    @cached_property
    def activation_chart(self) -> Chart | None:
        """Its activations on train."""
        return histogram_chart(self.counts, self.edges, "activation", "rows")

    @cached_property
    def density_chart(self) -> Chart | None:
        """All features by density, with a stroke at this one."""
        chart, edges = self.densities
        return None if chart is None else with_density(chart, edges, self.row["density"])

    @cached_property
    def largest_effect(self) -> float:
        """The length of the longest bar of its logit effects."""
        return max((abs(e["effect"]) for rows in self.effects.values() for e in rows), default=0.0)


def feature_page(
    store: FeatureStore | FeatureBatch,
    feature: int,
    *,
    dictionary: str | None = None,
    split: str = "train",
    whole: list[dict[str, Any]] | None = None,
    shade: bool = False,
    both: bool = False,
) -> FeaturePage:
    """Ask the store. `whole` are the receipts of the dictionary, where somebody has them; `shade` draws where it is
    active also where that is not about the tokens there; `both` adds the `NUM_HELD_OUT` strongest examples of test.
    Raises FeatureNotFound.
    """
    row = store.feature(feature, dictionary)
    name = row["dictionary"]
    receipts = store.receipts(feature, dictionary=name)
    about = whole if whole is not None else store.receipts(None, dictionary=name)
    by_token = attributes_to_token([*receipts, *about], feature) is not False
    effects: dict[str, list[dict[str, Any]]] = {"promoted": [], "suppressed": []}
    for effect in store.logit_effects(feature, dictionary=name, limit=NUM_EFFECTS):
        effects[effect["direction"]].append(effect)
    largest = row["max_activation"] or 0.0

    def shown(example: Example) -> ShownExample:
        drawn = pieces(example.tokens, example.activations, largest, focus=example.focus - 1, shaded=by_token or shade)
        return ShownExample(example, drawn)

    found = store.examples(feature, dictionary=name, kind=None, limit=NUM_READ)
    top = (
        [e for e in found if e.kind == "top"]
        if split == "train"
        else store.examples(feature, dictionary=name, split=split, limit=NUM_TOP)
    )
    held_out = store.examples(feature, dictionary=name, split="test", limit=NUM_HELD_OUT) if both else []
    samples: dict[int, list[ShownExample]] = {}
    for example in (e for e in found if e.kind == "decile"):
        group = samples.setdefault(example.decile or 0, [])
        if len(group) < NUM_OF_DECILE:
            group.append(shown(example))
    counts, edges = store.activation_histogram(feature, dictionary=name)
    return FeaturePage(
        row=row,
        receipts=receipts,
        card=card_lines(receipts),
        by_token=by_token,
        effects=effects,
        top=[shown(example) for example in top[:NUM_TOP]],
        deciles=sorted(samples.items(), reverse=True),
        neighbours=store.neighbours(feature, dictionary=name, limit=NUM_NEAR),
        cofirings=store.cofirings(feature, dictionary=name, limit=NUM_NEAR),
        counts=counts,
        edges=edges,
        densities=_densities(store.cards(name)),
        split=split,
        shade=shade,
        held_out=[shown(example) for example in held_out],
    )


def _densities(cards: Cards) -> tuple[Chart | None, np.ndarray]:
    if cards not in _DENSITIES:
        bins = density_bins(cards.numbers("density"))
        _DENSITIES[cards] = bins_chart(bins, width=470, height=240), bins[1]
    return _DENSITIES[cards]


def snippets(page: FeaturePage, shown_run: str) -> dict[str, str]:
    """What is shown, as SQL and as Python to copy."""
    name = page.row["dictionary"].replace("'", "''")
    this = f"dictionary = '{name}' AND feature = {page.feature}"
    sql = (
        f"SELECT * FROM features WHERE {this};\n"
        f"SELECT rank, activation, title, tokens, activations FROM examples\n"
        f"  WHERE {this} AND kind = 'top' AND split = '{page.split}' ORDER BY rank;\n"
        f"SELECT direction, token, effect FROM logit_effects WHERE {this} ORDER BY direction, rank;\n"
        f"FROM features_like({page.feature}, dict := '{name}');\n"
        f"FROM cofires({page.feature}, dict := '{name}');"
    )
    python = (
        "from saeql.pipelines import Run\n\n"
        f"with Run.open({shown_run!r}).store() as store:\n"
        f"    feature = store.feature({page.feature}, {page.row['dictionary']!r})\n"
        f"    examples = store.examples({page.feature}, split={page.split!r}, limit=20)\n"
        f"    near = store.neighbours({page.feature})\n"
        f"    together = store.cofirings({page.feature})"
    )
    return {"SQL": sql, "Python": python}
