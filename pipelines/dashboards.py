"""What a page about a feature shows, collected from a run's store, dictionary and unembedding, batch by batch.

The formats of other tools are written from it: `neuronpedia.py` and `saedashboard.py`.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from saeql.sae.model import SparseAutoencoder
from saeql.store.feature_store import FeatureStore

from .index import lens_logits

if TYPE_CHECKING:
    from .run import Run

NUM_BINS = 50
NUM_ALIGNED = 3
NUM_TOP = 20
NUM_OF_DECILE = 2


@dataclass(frozen=True)
class Histogram:
    """Counts of `NUM_BINS` bins of one width, and their centres; both empty where there is nothing to count."""

    counts: list[int] = field(default_factory=list)
    centres: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, counts: NDArray[Any], low: float, high: float) -> "Histogram":
        """Counts of equal bins from `low` to `high`."""
        width = (high - low) / len(counts)
        return cls(counts.astype(int).tolist(), [low + (n + 0.5) * width for n in range(len(counts))])


@dataclass(frozen=True)
class Sequence:
    """An example: tokens, activations, and which strength it stands for (`decile` None: one of the strongest)."""

    tokens: list[str]
    activations: list[float]
    focus: int  # index of the peak, from 0
    decile: int | None
    low: float  # activations that it stands for: a tenth of them, or for the strongest all
    high: float


@dataclass(frozen=True)
class Dashboard:
    """One feature; names of fields are those of the store's view `features`, values read on train."""

    feature: int
    row: dict[str, Any]  # its row of `features`
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    neighbours: list[tuple[int, float]]
    activations: Histogram
    logits: Histogram
    aligned: list[tuple[int, float, float]]  # coordinate, value, share of the row's l1 norm
    vector: list[float]
    sequences: list[Sequence]


def dashboards(run: "Run", batch_features: int) -> Iterator[list[Dashboard]]:
    """All features of a run in batches. Raises StoreError before the store is built, ModelError for part of a model."""
    dictionary = run.dictionary()
    with run.store() as store:
        for start in range(0, dictionary.d_sae, batch_features):
            features = range(start, min(start + batch_features, dictionary.d_sae))
            yield _batch(store, run, dictionary, features)


def _batch(store: FeatureStore, run: "Run", dictionary: SparseAutoencoder, features: range) -> list[Dashboard]:
    name = run.spec.name

    def ask(query: str, **params: object) -> list[dict[str, Any]]:
        # `{these}` names the features of the batch
        these = "dictionary = $name AND feature BETWEEN $first AND $last"
        params = {"name": name, "first": features.start, "last": features.stop - 1, **params}
        return store.trusted_sql(query.format(these=these), params).to_pylist()

    rows = {row["feature"]: row for row in ask("SELECT * FROM features WHERE {these}")}
    effects = _grouped(ask("SELECT * FROM logit_effects WHERE {these} ORDER BY feature, rank"))
    near = _grouped(ask("SELECT feature, neighbour, cosine FROM neighbours WHERE {these} ORDER BY feature, rank"))
    sequences = _sequences(ask)
    activations = _activation_histograms(ask, rows)
    logits = _logit_histograms(run, dictionary, features)
    made = []
    for feature in features:
        vector = dictionary.W_dec[feature].detach().float().cpu()
        aligned = vector.abs().topk(min(NUM_ALIGNED, len(vector))).indices.tolist()
        total = float(vector.abs().sum()) or 1.0
        by_direction = {
            direction: [(e["token"], e["effect"]) for e in effects[feature] if e["direction"] == direction]
            for direction in ("promoted", "suppressed")
        }
        made.append(
            Dashboard(
                feature=feature,
                row=rows[feature],
                promoted=by_direction["promoted"],
                suppressed=by_direction["suppressed"],
                neighbours=[(n["neighbour"], n["cosine"]) for n in near[feature]],
                activations=activations.get(feature, Histogram()),
                logits=logits.get(feature, Histogram()),
                aligned=[(n, float(vector[n]), float(vector[n].abs()) / total) for n in aligned],
                vector=vector.tolist(),
                sequences=sequences[feature],
            )
        )
    return made


def _grouped(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["feature"]].append(row)
    return groups


def _sequences(ask: Any) -> dict[int, list[Sequence]]:
    bounds = {
        (row["feature"], row["decile"]): (row["low"], row["high"])
        for row in ask(
            # the store's deciles: 10 is the strongest tenth
            "SELECT feature, 10 - (place * 10) // n AS decile, min(activation) AS low, max(activation) AS high FROM ("
            "SELECT feature, activation, count(*) OVER (PARTITION BY feature) AS n, "
            "row_number() OVER (PARTITION BY feature ORDER BY activation DESC) - 1 AS place "
            "FROM activations WHERE {these} AND split = 'train') GROUP BY ALL"
        )
    }
    found: dict[int, list[Sequence]] = defaultdict(list)
    query = (
        "SELECT feature, decile, activation, tokens, activations, focus FROM examples "
        "WHERE {these} AND split = 'train' AND rank <= CASE kind WHEN 'top' THEN $top ELSE $of_decile END "
        "ORDER BY feature, decile DESC NULLS FIRST, rank"
    )
    for row in ask(query, top=NUM_TOP, of_decile=NUM_OF_DECILE):
        decile = row["decile"]
        low, high = (0.0, row["activation"]) if decile is None else bounds[row["feature"], decile]
        found[row["feature"]].append(Sequence(row["tokens"], row["activations"], row["focus"] - 1, decile, low, high))
    return found


def _activation_histograms(ask: Any, rows: dict[int, dict[str, Any]]) -> dict[int, Histogram]:
    counts: dict[int, NDArray[np.int64]] = defaultdict(lambda: np.zeros(NUM_BINS, np.int64))
    query = (
        "SELECT feature, least($bins - 1, floor(activation * $bins / f.max_activation))::INTEGER AS bin, count(*) AS n "
        "FROM activations JOIN (SELECT dictionary, feature, max_activation FROM features) f "
        "USING (dictionary, feature) WHERE {these} AND split = 'train' GROUP BY ALL"
    )
    for row in ask(query, bins=NUM_BINS):
        counts[row["feature"]][row["bin"]] = row["n"]
    return {feature: Histogram.of(found, 0.0, rows[feature]["max_activation"]) for feature, found in counts.items()}


def _logit_histograms(run: "Run", dictionary: SparseAutoencoder, features: range) -> dict[int, Histogram]:
    if not run.language_model.is_causal:
        return {}
    found = {}
    for start, logits in lens_logits(dictionary.to(run.language_model.device), run.language_model, features):
        for n, row in enumerate(logits.cpu()):
            low, high = float(row.min()), float(row.max())
            found[start + n] = Histogram.of(torch.histc(row, NUM_BINS, low, high).numpy(), low, high)
    return found
