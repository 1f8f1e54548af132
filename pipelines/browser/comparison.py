"""Two dictionaries of one store side by side: metrics, densities, kinds of labels, and features that they share."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from saeql.store.feature_store import FeatureStore

from ..charts import Chart, Series, series_chart
from ..metric_table import MetricLine, paired
from ..receipts.card import CardLine, card_lines
from ..receipts.headline import Headline, headline

NUM_MATCHES = 50


@dataclass(frozen=True)
class Comparison:
    """What is known of both, row by row."""

    names: tuple[str, str]
    rows: tuple[dict[str, Any], dict[str, Any]]  # of the view dictionaries
    headlines: tuple[Headline, Headline]
    controls: list[tuple[str, CardLine | None, CardLine | None]]  # by what was checked
    metrics: list[tuple[MetricLine | None, MetricLine | None]]
    kinds: list[tuple[str, int, int]]
    densities: Chart | None
    matches: list[dict[str, Any]]
    num_matches: int


def comparison(store: FeatureStore, one: str, other: str) -> Comparison:
    """Ask the store; `matches` are there where `saeql compare --save` has kept them, on either side."""
    rows = {row["dictionary"]: row for row in store.dictionaries()}
    lines = [{m.name: m for m in paired([r for r in store.metrics(n) if r["split"] == "test"])} for n in (one, other)]
    kinds = [store.cards(name).kinds() for name in (one, other)]
    receipts = [store.receipts(None, dictionary=name) for name in (one, other)]
    checks = [{line.title: line for line in card_lines(found)} for found in receipts]
    matches = _matches(store, one, other)
    labels = [store.cards(name) for name in (one, other)]
    shown = [
        match | {"label": labels[0].label(match["feature"]), "other_label": labels[1].label(match["other_feature"])}
        for match in matches[:NUM_MATCHES]
    ]
    return Comparison(
        names=(one, other),
        rows=(rows[one], rows[other]),
        headlines=(headline(receipts[0]), headline(receipts[1])),
        controls=[(title, checks[0].get(title), checks[1].get(title)) for title in sorted({**checks[0], **checks[1]})],
        metrics=[(lines[0].get(name), lines[1].get(name)) for name in dict.fromkeys([*lines[0], *lines[1]])],
        kinds=[(kind, kinds[0].get(kind, 0), kinds[1].get(kind, 0)) for kind in sorted({**kinds[0], **kinds[1]})],
        densities=_densities({name: store.cards(name).numbers("density") for name in dict.fromkeys((one, other))}),
        matches=shown,
        num_matches=len(matches),
    )


def _matches(store: FeatureStore, one: str, other: str) -> list[dict[str, Any]]:
    """Pairs, nearest first. A comparison calls dictionaries as it was told to, which need not be their names here."""
    for mine, theirs, columns in (
        (one, other, "feature, other_feature"),
        (other, one, "other_feature AS feature, feature AS other_feature"),
    ):
        found = store.trusted_sql(
            f"SELECT {columns}, decoder_cosine, shared FROM matches WHERE dictionary = $mine AND (other_dictionary = "
            "$theirs OR other_dictionary IN (SELECT compared_as FROM stability WHERE dictionary = $theirs)) "
            "ORDER BY decoder_cosine DESC, feature",
            {"mine": mine, "theirs": theirs},
        )
        if found.num_rows:
            return found.to_pylist()
    return []


def _densities(densities: dict[str, np.ndarray]) -> Chart | None:
    """Share of each one's features in bins of log10 density."""
    series = []
    for name, found in densities.items():
        logs = np.log10(found[found > 0])
        counts, edges = np.histogram(logs, np.arange(-7, 0.01, 0.25))
        middles = (edges[:-1] + edges[1:]) / 2
        used = np.flatnonzero(counts)
        if len(used):
            inside = range(used[0], used[-1] + 1)
            points = [
                (float(middles[n]), float(counts[n] / len(found)), None, None, f"{name}: {counts[n]} features")
                for n in inside
            ]
            series.append(Series(name, points))
    return series_chart(
        series, "log10 of the share of rows on which it is active", "share of features", width=470, height=240
    )
