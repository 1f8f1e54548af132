"""Tokens of a text as pieces to draw: where a feature is active in ten shades, the silent stretches between in one."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from ..shown import number, token_text

LEVELS = 10


class Piece(NamedTuple):
    """Text as it is shown; level 0 is silent, else 1 to `LEVELS` with the activation."""

    text: str
    level: int = 0
    value: float = 0.0
    is_peak: bool = False


def pieces(
    tokens: Sequence[str], activations: Sequence[float], largest: float, *, focus: int = -1, shaded: bool = True
) -> list[Piece]:
    """One piece an active token (focus: index of the peak), neighbouring silent ones joined.

    `largest` is the activation of the darkest shade. Without `shaded` no token stands out. Raises ValueError where
    there is not one activation a token.
    """
    if len(tokens) != len(activations):
        raise ValueError(f"{len(activations)} activations of {len(tokens)} tokens")
    made: list[Piece] = []
    silent_from = 0
    for n, activation in enumerate(activations):
        if not (shaded and 0 < activation < math.inf):
            continue
        if n > silent_from:
            made.append(Piece("".join(map(token_text, tokens[silent_from:n]))))
        level = min(max(math.ceil(activation / largest * LEVELS), 1), LEVELS) if largest > 0 else 1
        made.append(Piece(token_text(tokens[n]), level, activation, n == focus))
        silent_from = n + 1
    if silent_from < len(tokens):
        made.append(Piece("".join(map(token_text, tokens[silent_from:]))))
    return made


def shaded(parts: Sequence[Piece]) -> Markup:
    """HTML of pieces: shades by class, the value on hover and for who does not see the shade. A page has hundreds, and
    a template takes three times as long for each.
    """
    made = []
    for text, level, value, is_peak in parts:
        if not level:
            made.append(str(escape(text)))
            continue
        said, css = number(value), f"l{level} peak" if is_peak else f"l{level}"
        made.append(f'<mark class="{css}" title="{said}">{escape(text)}<span class="value"> ({said}) </span></mark>')
    return Markup("".join(made))
