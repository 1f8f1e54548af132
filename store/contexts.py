"""What surrounds an example: its tokens, the activations on them, its document."""

from collections.abc import Callable, Sequence
from typing import Any

from .text_rows import AFTER, BEFORE, TextRows

Rows = list[dict[str, Any]]


def contexts(text: TextRows, titles: Callable[[Sequence[int]], dict[int, str | None]], places: Rows) -> Rows:
    """`places` (window_id, position, offsets and activations of what is active nearby) with what is visible there.

    Adds tokens, activations (one a token), focus (index of the place in tokens, from 1), document_id and title.
    """
    made = []
    for place in places:
        window, position = place["window_id"] - text.first_window, place["position"]
        row = int(text.starts[window]) + position
        first = max(row - BEFORE, int(text.starts[window]))
        last = min(row + AFTER + 1, int(text.starts[window + 1]))
        activations = [0.0] * (last - first)
        for offset, activation in zip(place["offsets"], place["activations"], strict=True):
            activations[row + offset - first] = activation
        made.append(
            {k: v for k, v in place.items() if k != "offsets"}
            | {
                "document_id": int(text.document_ids[row]),
                "tokens": text.vocabulary[text.token_ids[first:last]].tolist(),
                "activations": activations,
                "focus": row - first + 1,
            }
        )
    found = titles(sorted({row["document_id"] for row in made})) if made else {}
    return [row | {"title": found.get(row["document_id"])} for row in made]
