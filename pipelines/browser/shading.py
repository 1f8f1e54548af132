"""Tokens of a text as pieces to draw: where a feature is active in ten shades, the silent stretches between in one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..shown import token_text

LEVELS = 10


@dataclass(frozen=True)
class Piece:
    """Text as it is shown; level 0 is silent, else 1 to `LEVELS` with the activation."""

    text: str
    level: int = 0
    value: float = 0.0
    is_peak: bool = False


def pieces(
    tokens: Sequence[str], activations: Sequence[float], largest: float, *, focus: int = -1, shaded: bool = True
) -> list[Piece]:
    """One piece an active token (focus: index of the peak), neighbouring silent ones joined.

    `largest` is the activation of the darkest shade. Without `shaded` no token stands out.
    """
    made: list[Piece] = []
    silent: list[str] = []
    for n, (token, activation) in enumerate(zip(tokens, activations, strict=True)):
        text = token_text(token)
        if not shaded or not (math.isfinite(activation) and activation > 0):
            silent.append(text)
            continue
        if silent:
            made.append(Piece("".join(silent)))
            silent = []
        level = min(max(math.ceil(activation / largest * LEVELS), 1), LEVELS) if largest > 0 else 1
        made.append(Piece(text, level, activation, n == focus))
    if silent:
        made.append(Piece("".join(silent)))
    return made
