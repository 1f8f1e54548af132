"""What an answer says, however it says it; None or NaN where it says nothing that was asked for."""

import json
import math
import re
from typing import Any

from .questions import Answer

_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_EXPLANATION = re.compile(r"\[\s*explanation\s*\]\s*:?[ \t]*(.*)", re.IGNORECASE)
_PREFIX = re.compile(
    r"^(?:[-*\u2022#>\s]|\d+[.)]\s)*(?:\**(?:explanation|label|pattern|description|answer|category)\**\s*:\**\s*)?",
    re.IGNORECASE,
)
_REFUSAL = re.compile(r"\b(?:i'?m sorry|i am sorry|i can(?:'|no)t|i cannot|as an ai|unable to)\b", re.IGNORECASE)
_MAX_LABEL_CHARACTERS = 160
_YES, _NO = {"yes", "true", "1", "y"}, {"no", "false", "0", "n"}


def explanation(answer: Answer) -> str | None:
    """One line that describes a pattern: the last `[EXPLANATION]:`, a text in JSON, or the first plain line."""
    if answer.failure:
        return None
    text = _THOUGHT.sub("", answer.text).strip()
    found = _from_json(text, ("explanation", "label", "pattern", "description"))
    if found is None:
        after = _EXPLANATION.findall(text)
        lines = [line for line in (after[-1:] or text.splitlines()) if line.strip(" \t`*#-=.")]
        found = lines[0] if lines else ""
    label = _clean(str(found))
    if not any(c.isalnum() for c in label) or len(label) > _MAX_LABEL_CHARACTERS or _REFUSAL.search(label):
        return None
    return label


def _clean(text: str) -> str:
    """On one line, without list signs, names of fields, quotes around it and the full stop behind it."""
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(_PREFIX.sub("", text).split())
    while len(text) > 1 and text[0] in "\"'`*\u201c\u2018" and text[-1] in "\"'`*.\u201d\u2019":
        text = text[1:].rstrip(".")[:-1] if text[-1] == "." else text[1:-1]
    return text.strip(" *`").rstrip(".").strip()


def chance_of_yes(answer: Answer) -> float:
    """P(yes) of yes and no by the first token's probabilities, or 1 or 0 by the word; NaN where it is neither."""
    if answer.failure:
        return math.nan
    chances = _chances(answer, lambda word: 1 if word in _YES else 0 if word in _NO else None)
    if chances:
        return chances.get(1, 0.0) / sum(chances.values())
    text = _THOUGHT.sub("", answer.text)
    found = _from_json(text, ("answer", "yes", "result"))
    words = re.findall(r"[a-z0-9]+", (str(found) if found is not None else text).casefold())
    words = words[:1] if words and words[0] in _YES | _NO else words
    said = {word in _YES for word in words if word in _YES | _NO}
    return float(said.pop()) if len(said) == 1 else math.nan


def expected_digit(answer: Answer) -> float:
    """Mean of the digit 0-9 by the first token's probabilities, or the digit itself; NaN where there is none."""
    if answer.failure:
        return math.nan
    chances = _chances(answer, lambda word: int(word) if len(word) == 1 and word in "0123456789" else None)
    if chances:
        return sum(digit * chance for digit, chance in chances.items()) / sum(chances.values())
    text = _THOUGHT.sub("", answer.text)
    found = _from_json(text, ("activation", "answer", "strength"))
    numbers = re.findall(r"\d+(?:\.\d+)?", str(found) if found is not None else text)
    return min(float(numbers[0]), 9.0) if numbers else math.nan


def _chances(answer: Answer, meaning: Any) -> dict[int, float]:
    """Probability by meaning of the likeliest first tokens, in whichever case and spacing they are written."""
    out: dict[int, float] = {}
    for token, log_chance in answer.first_tokens:
        value = meaning(token.strip().strip('*"').casefold())
        if value is not None and log_chance <= 1e-6:  # NaN is neither
            out[value] = out.get(value, 0.0) + math.exp(log_chance)
    return out if sum(out.values()) > 0 else {}


def _from_json(text: str, names: tuple[str, ...]) -> Any:
    """The first of `names` in the first JSON object of `text`, None where there is none."""
    start, stop = text.find("{"), text.rfind("}")
    if start < 0 or stop < start:
        return None
    try:
        found = json.loads(text[start : stop + 1])
    except (ValueError, RecursionError):
        return None
    values = [found[name] for name in names if isinstance(found, dict) and name in found]
    return values[0] if values and isinstance(values[0], str | int | float | bool) else None
