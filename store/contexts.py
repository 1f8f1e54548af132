"""What surrounds an example: its tokens, the activations on them, its document."""

from collections.abc import Callable
from typing import Any

from .text_rows import AFTER, BEFORE

Rows = list[dict[str, Any]]


def contexts(ask: Callable[[str], Rows], places: Rows) -> Rows:
    """`places` (window_id, position, offsets and activations of what is active nearby) with what is visible there.

    Their windows are named as constants, so that DuckDB reads no others. Adds tokens, activations (one a token), focus
    (index of the place in tokens, from 1), document_id and title.
    """
    if not places:
        return []
    ids = ", ".join(str(i) for i in sorted({p["window_id"] for p in places}))
    windows = {
        row["window_id"]: row
        for row in ask(f"SELECT window_id, tokens, document_ids FROM evidence.windows WHERE window_id IN ({ids})")
    }
    made = []
    for place in places:
        window, position = windows[place["window_id"]], place["position"]
        first = max(position - BEFORE, 0)
        tokens = window["tokens"][first : position + AFTER + 1]
        activations = [0.0] * len(tokens)
        for offset, activation in zip(place["offsets"], place["activations"], strict=True):
            activations[position + offset - first] = activation
        made.append(
            {k: v for k, v in place.items() if k != "offsets"}
            | {
                "document_id": window["document_ids"][position],
                "tokens": tokens,
                "activations": activations,
                "focus": position - first + 1,
            }
        )
    ids = ", ".join(str(i) for i in sorted({row["document_id"] for row in made}))
    found = ask(f"SELECT document_id, title FROM evidence.documents WHERE document_id IN ({ids})")
    titles = {row["document_id"]: row["title"] for row in found}
    return [row | {"title": titles.get(row["document_id"])} for row in made]
