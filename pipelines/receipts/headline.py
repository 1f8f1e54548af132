"""The headline of a dictionary: the strongest sentence that its controls allow, down to "no evidence"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .card import text_of
from .receipt import FAILED, PASSED

#: Controls of whole dictionaries that decide, with what a pass lets a reader say.
_CLAIMS = {
    "C6 random dictionary": "labels fit better than those of a random dictionary",
    "C7 frozen baselines best": "labels fit better than those of dictionaries trained with frozen weights",
    "C8 randomised model": "contextual labels fit better than on a model of random weights",
}
#: Without these nothing else counts.
_GROUND = ("C0 split hygiene", "C1 metric self-tests")


@dataclass(frozen=True)
class Headline:
    """One sentence, and the receipts it stands on."""

    text: str
    claims: tuple[tuple[str, str], ...]
    """What each deciding control found: control and text."""


def headline(receipts: Sequence[Mapping[str, Any]]) -> Headline:
    """What may be said of a dictionary, from the receipts about it as a whole (rows with no feature)."""
    by_control = {r["control"]: r for r in receipts if r["feature"] is None}
    if not by_control:
        return Headline("no control has run: nothing is known about these labels (`saeql label`)", ())
    failed = [c for c in by_control if c.startswith(_GROUND) and by_control[c]["verdict"] == FAILED]
    if failed:
        return Headline(f"{failed[0]} failed: no number of this run can be trusted", ())
    found = tuple((control, _found(control, by_control.get(control))) for control in _CLAIMS)
    measured = {c: by_control[c] for c in _CLAIMS if c in by_control and by_control[c]["value"] is not None}
    passed = [text for c, text in _CLAIMS.items() if c in measured and measured[c]["verdict"] == PASSED]
    lost = [c for c, r in measured.items() if r["verdict"] == FAILED]
    if not measured:
        return Headline(
            "labels were tested on unseen documents, but not against a random dictionary: whether these features beat "
            "random is not known (`saeql control`)",
            found,
        )
    if lost:
        return Headline(f"no evidence these features beat random ({', '.join(lost)} failed)", found)
    return Headline("; ".join(passed), found)


def _found(control: str, receipt: Mapping[str, Any] | None) -> str:
    return "did not run" if receipt is None else f"{text_of(receipt)}: {receipt['verdict']}"
