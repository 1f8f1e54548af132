"""Hostile or invisible text made visible, and numbers as people read them, wherever a page shows them."""

import math
import unicodedata
from functools import lru_cache

import numpy as np


def visible(text: str) -> str:
    """`text` with characters that would not show, or would reorder others, as [U+XXXX]; line breaks and tabs stay."""

    def hidden(c: str) -> bool:
        return c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))

    if text.replace("\n", "").replace("\t", "").isprintable():  # which no hidden character is
        return text
    return "".join(f"[U+{ord(c):04X}]" if hidden(c) else c for c in text)


@lru_cache(8192)
def token_text(token: str, mark_spaces: bool = False) -> str:
    """One token on one line: line breaks and tabs as arrows; spaces as dots where alone or to be marked."""
    shown = visible(token.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥"))
    if mark_spaces or (token and not token.strip(" \u00a0")):
        shown = shown.replace(" ", "·").replace("\u00a0", "⍽")
    return shown


def number(value: object, digits: int = 3) -> str:
    """A number as people read it: thousands separated, `digits` significant digits; an en dash for None or NaN."""
    if type(value) is float and 1e-3 <= abs(value) < 1000:  # most are
        return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\N{EN DASH}"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if not isinstance(value, (float, np.floating)):
        return str(value)
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def share(value: float | None) -> str:
    """A share as a percentage of two significant digits; an en dash for None or NaN."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    percent = 100 * value
    if percent == 0 or percent >= 10:
        return f"{percent:.0f} %" if percent < 10 or percent >= 99.95 else f"{percent:.1f} %"
    return f"{percent:.{min(max(1 - math.floor(math.log10(percent)), 0), 6)}f} %"
