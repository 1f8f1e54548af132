"""C14: over which activations does a label hold? One that only the strongest rows fit is about those rows.

(The interpretability illusion: arXiv 2104.07143.)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from .control import Labelled
from .receipt import REPORTED, Receipt, judged
from .sampler import STRENGTHS
from .statistics import auroc
from .thresholds import THRESHOLDS

if TYPE_CHECKING:
    from ..run import Run

#: Tenths of the activations, from below, that count as the middle.
MIDDLE = (4, 5)
#: Active rows that a label in words is scored on stand for tenths only where there are so many.
MIN_ACTIVE = 20


class ActivationRange:
    """AUROC against matched negatives (N1) by tenth of the activations; executable labels on all active test rows."""

    code: ClassVar[str] = "C14"
    name: ClassVar[str] = "activation range"
    tier: ClassVar[str] = "fast"

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Needs nothing of the run."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Of every labelled feature the AUROC lost from the strongest tenth to the middle ones, and the valid range."""
        named, receipts = f"{self.code} {self.name}", []
        for feature, (values, scores) in self._active(labelled).items():
            negatives = labelled.scores[feature].get("N1")
            if negatives is None or len(values) < MIN_ACTIVE:
                continue
            receipts.append(self._receipt(named, feature, values, scores, negatives))
        failed = sum(r.verdict == "failed" for r in receipts)
        share = failed / len(receipts) if receipts else None
        return [*receipts, Receipt(control=f"{named} top-only share", value=share, n=len(receipts), verdict=REPORTED)]

    def _receipt(
        self, named: str, feature: int, values: np.ndarray, scores: np.ndarray, negatives: np.ndarray
    ) -> Receipt:
        order = np.argsort(values, kind="stable")
        tenth = np.arange(len(order)) * STRENGTHS // len(order)
        parts = [scores[order[tenth == i]] for i in range(STRENGTHS)]
        by_tenth = np.array([auroc(part, negatives) for part in parts])
        middle = auroc(np.concatenate([parts[i] for i in MIDDLE]), negatives)
        drop, most = float(by_tenth[-1] - middle), THRESHOLDS.top_only_drop
        holds = by_tenth >= by_tenth[-1] - most
        lowest = STRENGTHS - int(np.argmin(holds[::-1])) if not holds.all() else 0
        verdict = judged(drop, most, at_least=False)
        detail = {
            "by_tenth": [round(float(v), 4) for v in by_tenth],
            "valid_from": round(float(values[order[tenth == lowest][0]]), 4),
            "valid_to": round(float(values.max()), 4),
            "of_all_active": round(float((tenth >= lowest).mean()), 4),
        } | ({"top_only": True} if verdict == "failed" else {})
        return Receipt(
            feature=feature, control=named, value=drop, threshold=most, n=len(values), verdict=verdict, detail=detail
        )

    def _active(self, labelled: Labelled) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Activations of active rows with their scores: all test rows where executing costs nothing, else examples."""
        features = sorted(labelled.scores)
        exact = [f for f in features if labelled.labels[f].predicate is not None]
        active = labelled.rows.test.active
        rows, values = active.by_feature(), active.values_by_feature()
        every = labelled.label_scorer.score(
            [labelled.labels[f] for f in exact], [rows[f] for f in exact], labelled.rows.test
        )
        out = {f: (labelled.examples[f].values, labelled.scores[f]["active"]) for f in features}
        return out | {f: (values[f], scores) for f, scores in zip(exact, every, strict=True)}
