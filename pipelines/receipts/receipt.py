"""A receipt: what one control measured, of one feature or of a whole dictionary, and what it was compared with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from saeql.store.records import RECEIPTS

PASSED, FAILED, REPORTED = "passed", "failed", "reported"


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """One row of evidence table `receipts`."""

    control: str
    """Code and name, 'C3 label permutation'; several numbers of one control end in their own name."""
    value: float | None
    """None where it could not be measured; `detail` says why."""
    verdict: str
    """passed, failed, or reported where nothing is asked."""
    feature: int | None = None
    """None: about the whole dictionary."""
    threshold: float | None = None
    n: int = 0
    low: float | None = None
    high: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    """Whatever else a reader needs to check it, as JSON."""


def judged(value: float | None, threshold: float, *, at_least: bool = True) -> str:
    """passed or failed; a value that could not be measured has not passed."""
    if value is None or value != value:
        return FAILED
    return PASSED if (value >= threshold if at_least else value <= threshold) else FAILED


def receipts_table(dictionary: str, receipts: Sequence[Receipt]) -> pa.Table:
    """Evidence table `receipts` of one dictionary."""
    columns: dict[str, list[Any]] = {
        name: [getattr(r, name) for r in receipts]
        for name in ("feature", "control", "value", "threshold", "n", "low", "high", "verdict")
    }
    columns["dictionary"] = [dictionary] * len(receipts)
    columns["detail"] = [
        json.dumps(r.detail, ensure_ascii=False, sort_keys=True) if r.detail else None for r in receipts
    ]
    return pa.table([pa.array(columns[f.name], f.type) for f in RECEIPTS], schema=RECEIPTS)
