"""Rows of one feature as the views `features`, `neighbours` and `logit_effects` have them, read from their tables.

To ask the views costs DuckDB five to thirteen milliseconds of planning, however little they then read: too much for a
page. `tests/store/test_feature_store.py` holds these rows against the views.
"""

from collections.abc import Callable
from typing import Any

from .search import Ask

Rows = list[dict[str, Any]]

_STATISTICS = "density, mean_activation, max_activation, p50, p90, p99, token_entropy, num_documents"
_SCORES = ("auroc", "auroc_low", "auroc_high", "f1", "n_active", "n_inactive")


def feature_row(ask: Ask, name: str, dictionary_id: int, segment_id: int, feature: int) -> dict[str, Any] | None:
    """The feature's row of `features`; None where it has no statistics."""
    of_segment = f"segment_id = {segment_id} AND feature = {feature}"
    of_dictionary = f"dictionary_id = {dictionary_id} AND feature = {feature}"
    by_split = {
        row.pop("split"): row
        for row in ask(
            f"SELECT split::VARCHAR AS split, {_STATISTICS} FROM derived.feature_stats "
            f"WHERE {of_segment} AND split IN ('train', 'test')"
        )
    }
    if "train" not in by_split:
        return None
    train = by_split["train"]
    label = _first(ask(f"SELECT label, kind, {', '.join(_SCORES)} FROM evidence.labels WHERE {of_dictionary}"))
    tokens = _first(ask(f"SELECT top_tokens FROM derived.feature_tokens WHERE {of_segment}"))
    logits = _first(ask(f"SELECT promotes, suppresses FROM derived.feature_logits WHERE {of_dictionary}"))
    seen = _first(ask(f"SELECT stability, first_seen FROM evidence.stability WHERE {of_dictionary}"))
    return {
        "dictionary": name,
        "feature": feature,
        "label": label.get("label") or "unexplained",
        "kind": label.get("kind") or "none",
        **{score: label.get(score) for score in _SCORES},
        "density": train.pop("density"),
        "test_density": by_split.get("test", {}).get("density"),
        **train,
        "top_tokens": tokens.get("top_tokens") or [],
        "promotes": logits.get("promotes") or [],
        "suppresses": logits.get("suppresses") or [],
        "stability": seen.get("stability"),
        "first_seen": seen.get("first_seen"),
    }


def neighbour_rows(
    ask: Ask, name: str, dictionary_id: int, feature: int, limit: int, label: Callable[[int], str]
) -> Rows:
    """The first rows of `neighbours`; `label` tells a feature's."""
    rows = ask(
        "SELECT feature, rank, neighbour, cosine FROM evidence.neighbours "
        f"WHERE dictionary_id = {dictionary_id} AND feature = {feature} ORDER BY rank LIMIT {int(limit)}"
    )
    return [{"dictionary": name, **row, "neighbour_label": label(row["neighbour"])} for row in rows]


def effect_rows(
    ask: Ask, name: str, dictionary_id: int, vocabulary_id: int, feature: int, direction: str | None, limit: int
) -> Rows:
    """Rows of `logit_effects`, `limit` of each direction, promoted first."""
    rows = ask(
        "SELECT feature, direction::VARCHAR AS direction, rank, token_id, effect FROM evidence.logit_effects "
        f"WHERE dictionary_id = {dictionary_id} AND feature = {feature} AND rank < $limit "
        "AND direction = coalesce($direction, direction) ORDER BY direction, rank",
        {"limit": limit, "direction": direction},
    )
    ids = ", ".join(str(row["token_id"]) for row in rows) or "NULL"
    texts = {
        row["token_id"]: row["token"]
        for row in ask(
            f"SELECT token_id, token FROM evidence.vocabulary WHERE vocabulary_id = {vocabulary_id} "
            f"AND token_id IN ({ids})"
        )
    }
    return [
        {"dictionary": name, **row, "token": texts.get(row["token_id"]), "effect": row.pop("effect")} for row in rows
    ]


def _first(rows: Rows) -> dict[str, Any]:
    return rows[0] if rows else {}
