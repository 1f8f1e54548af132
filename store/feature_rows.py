"""Rows of one feature as the views `features`, `neighbours` and `logit_effects` have them, read from their tables.

To ask the views costs DuckDB five to thirteen milliseconds of planning, however little they then read: too much for a
page. Nor is anything sorted or cast here by DuckDB, which doubles the half millisecond that such a question takes.
`tests/store/test_feature_store.py` holds these rows against the views.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .feature_columns import SCORES, STATISTICS
from .search import Ask

Rows = list[dict[str, Any]]


def feature_row(
    ask: Ask,
    name: str,
    dictionary_id: int,
    segment_id: int,
    feature: int,
    *,
    vocabulary: np.ndarray,
    effects: Rows,
    known: dict[str, Any] | None,
    is_compared: bool,
) -> dict[str, Any] | None:
    """The feature's row of `features`; None where it has no statistics.

    `vocabulary` is that of `text_rows.read_vocabulary`, `effects` are `stored_effects`, `known` is what `Cards`
    and `FeatureColumns` have of it where those are in memory, and `is_compared` says whether the dictionary has rows
    in `stability`.
    """
    of_segment = f"segment_id = {segment_id} AND feature = {feature}"
    of_dictionary = f"dictionary_id = {dictionary_id} AND feature = {feature}"
    if known is None:
        known = _asked(ask, of_segment, of_dictionary)
    if known is None:
        return None
    tokens = _first(ask(f"SELECT top_tokens FROM derived.feature_tokens WHERE {of_segment}"))
    seen = {}
    if is_compared:
        seen = _first(ask(f"SELECT stability, first_seen FROM evidence.stability WHERE {of_dictionary}"))
    return {
        "dictionary": name,
        "feature": feature,
        "label": known.get("label") or "unexplained",
        "kind": known.get("kind") or "none",
        **{score: known.get(score) for score in SCORES},
        "density": known["density"],
        "test_density": known.get("test_density"),
        **{name: known[name] for name in STATISTICS if name != "density"},
        "top_tokens": tokens.get("top_tokens") or [],
        "promotes": _texts(effects, "promoted", vocabulary),
        "suppresses": _texts(effects, "suppressed", vocabulary),
        "stability": seen.get("stability"),
        "first_seen": seen.get("first_seen"),
    }


def _asked(ask: Ask, of_segment: str, of_dictionary: str) -> dict[str, Any] | None:
    """What `FeatureColumns.of` gives, and label and kind."""
    by_split = {
        row.pop("split"): row
        for row in ask(f"SELECT split, {', '.join(STATISTICS)} FROM derived.feature_stats WHERE {of_segment}")
    }
    if "train" not in by_split:
        return None
    label = _first(ask(f"SELECT label, kind, {', '.join(SCORES)} FROM evidence.labels WHERE {of_dictionary}"))
    return by_split["train"] | {"test_density": by_split.get("test", {}).get("density")} | label


def neighbour_rows(
    ask: Ask, name: str, dictionary_id: int, feature: int, limit: int, label: Callable[[int], str]
) -> Rows:
    """The first rows of `neighbours`; `label` tells a feature's."""
    rows = ask(
        "SELECT feature, rank, neighbour, cosine FROM evidence.neighbours "
        f"WHERE dictionary_id = {dictionary_id} AND feature = {feature}"
    )
    rows = sorted(rows, key=lambda row: row["rank"])[: max(limit, 0)]
    return [{"dictionary": name, **row, "neighbour_label": label(row["neighbour"])} for row in rows]


def cofiring_rows(ask: Ask, segment_id: int, feature: int, limit: int, label: Callable[[int], str]) -> Rows:
    """The first rows of `cofirings` on one corpus."""
    rows = ask(
        "SELECT rank, partner, count, num_sampled, pmi FROM derived.cofirings "
        f"WHERE segment_id = {segment_id} AND feature = {feature}"
    )
    rows = sorted((row for row in rows if row["rank"] <= limit), key=lambda row: row["rank"])
    return [row | {"partner_label": label(row["partner"])} for row in rows]


def stored_effects(ask: Ask, dictionary_id: int, feature: int) -> Rows:
    """A feature's rows of evidence.logit_effects, promoted first. feature_logits decodes seven times as long."""
    query = "SELECT feature, direction, rank, token_id, effect FROM evidence.logit_effects"
    rows = ask(f"{query} WHERE dictionary_id = {dictionary_id} AND feature = {feature}")
    return sorted(rows, key=lambda row: (row["direction"], row["rank"]))


def effect_rows(name: str, effects: Rows, vocabulary: np.ndarray, direction: str | None, limit: int) -> Rows:
    """Rows of `logit_effects` of `stored_effects`, `limit` of each direction; `vocabulary` as in `feature_row`."""
    return [
        {"dictionary": name, **row, "token": _text(row, vocabulary)}
        for row in effects
        if row["rank"] < limit and direction in (None, row["direction"])
    ]


def receipt_rows(ask: Ask, name: str, dictionary_id: int, feature: int | None) -> Rows:
    """Rows of `receipts` about a feature, or with None about the dictionary as a whole, by control."""
    which = "IS NULL" if feature is None else f"= {feature}"
    rows = ask(f"SELECT * FROM evidence.receipts WHERE dictionary_id = {dictionary_id} AND feature {which}")
    for row in rows:
        del row["dictionary_id"]
    return [{"dictionary": name, **row} for row in sorted(rows, key=lambda row: row["control"])]


def example_rows(ask: Ask, segment_id: int, feature: int, split: str, kind: str | None) -> Rows:
    """Rows of derived.examples on one split, deciles first, then the strongest; `kind` None takes both."""
    rows = ask(
        "SELECT kind, decile, rank, window_id, position, activation, offsets, activations FROM derived.examples "
        f"WHERE segment_id = {segment_id} AND feature = {feature} AND split = '{split}'"
    )
    rows = [row for row in rows if kind in (None, row["kind"])]
    return sorted(rows, key=lambda row: (row["kind"], -(row["decile"] or 0), row["rank"]))


def _text(effect: dict[str, Any], vocabulary: np.ndarray) -> str | None:
    token_id: int = effect["token_id"]
    found: str | None = vocabulary.item(token_id) if 0 <= token_id < len(vocabulary) else None
    return found


def _texts(effects: Rows, direction: str, vocabulary: np.ndarray) -> list[str]:
    """The tokens that a vocabulary has of one direction, strongest first."""
    texts = (_text(row, vocabulary) for row in effects if row["direction"] == direction)
    return [text for text in texts if text is not None]


def _first(rows: Rows) -> dict[str, Any]:
    return rows[0] if rows else {}
