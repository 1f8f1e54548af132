"""The card of a feature: its receipts as lines that a reader can take in, in one order, each with its verdict."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Receipts that the card shows, in its order: control -> what it is called there. Any other receipt of the feature
#: follows under its own name.
TITLES: dict[str, str] = {
    "C4 negative ladder N1": "AUROC, matched negatives",
    "C4 negative ladder N0": "AUROC, any negatives",
    "C4 negative ladder N2": "AUROC, same token",
    "C4 negative ladder N3": "AUROC, near in meaning",
    "C4 negative ladder N4": "AUROC, neighbours' rows",
    "C4 negative ladder contextual": "more than its token",
    "C5 token identity": "token table alone",
    "C3 label permutation": "permuted labels, p",
    "C14 activation range": "fits the strongest only",
    "C14b second corpus of the feature": "AUROC on another text",
    "C6 random dictionary percentile": "above random labels",
    "C9 seed stability of the feature": "in a second seed",
    "C13 token identifiability masked token": "lost when the token is masked",
    "S1 steering effect": "steering z",
}


@dataclass(frozen=True)
class CardLine:
    """One receipt on a card."""

    control: str
    title: str
    text: str
    verdict: str


def card_lines(receipts: Sequence[Mapping[str, Any]]) -> list[CardLine]:
    """The receipts of one feature (rows of the view `receipts`) in the card's order."""
    order = {control: place for place, control in enumerate(TITLES)}
    known = sorted(receipts, key=lambda r: (order.get(r["control"], len(order)), r["control"]))
    return [_line(str(r["control"]), r) for r in known]


def _line(control: str, receipt: Mapping[str, Any]) -> CardLine:
    return CardLine(control, TITLES.get(control, control), text_of(receipt), receipt["verdict"])


def text_of(receipt: Mapping[str, Any]) -> str:
    """What was measured, in words: value, interval, what was asked, on how many cases, and what else matters."""
    detail = json.loads(receipt["detail"]) if receipt.get("detail") else {}
    if receipt["value"] is None:
        return f"not measured: {detail.get('missing', 'no cases')}"
    parts = [f"{receipt['value']:.3g}"]
    if receipt["low"] is not None and receipt["high"] is not None:
        parts.append(f"({receipt['low']:.3g} to {receipt['high']:.3g})")
    if receipt["threshold"] is not None:
        parts.append(f"asked {receipt['threshold']:.3g}")
    if receipt["n"]:
        parts.append(f"n {receipt['n']}")
    if "valid_from" in detail:
        parts.append(f"holds for activations {detail['valid_from']:.3g} to {detail['valid_to']:.3g}")
    if "card" in detail:
        parts.append(str(detail["card"]))
    return ", ".join(parts).replace(", (", " (", 1)
