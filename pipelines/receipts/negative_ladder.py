"""C4: a label's AUROC against harder and harder negatives, and whether it says more than which token it is."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from .control import Labelled
from .examples import RUNGS
from .receipt import FAILED, PASSED, REPORTED, Receipt
from .statistics import DocumentDraws, auroc
from .thresholds import THRESHOLDS
from .token_table import token_auroc

if TYPE_CHECKING:
    from ..run import Run

HEADLINE = "N1"
#: Why a rung has no negatives, where it has none.
_MISSING = {
    "N0": "no inactive row",
    "N1": "no inactive row of the same frequency, position and length",
    "N2": "no row of the same tokens on which the feature is silent",
    "N3": "nothing was asked for rows near in meaning, or all of them fire",
    "N4": "no neighbours by decoder cosine that are active where this feature is silent",
}


class NegativeLadder:
    """AUROC on N0 to N4 with intervals over documents. On N2 only rows of one token are compared with each other."""

    code: ClassVar[str] = "C4"
    name: ClassVar[str] = "negative ladder"
    tier: ClassVar[str] = "fast"

    def __init__(self, *, draws: int = 400, seed: int = 0):
        self.draws, self.seed = draws, seed

    @classmethod
    def of(cls, run: "Run") -> Self:
        """By `label.num_bootstrap`."""
        return cls(draws=run.config.label.num_bootstrap, seed=run.config.label.seed)

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Of every labelled feature the rungs and whether it is contextual; the median of every rung over all."""
        test, named = labelled.rows.test, f"{self.code} {self.name}"
        draws = DocumentDraws(test.num_documents, draws=self.draws, seed=self.seed)
        lexical = token_auroc(labelled.token_table, test) >= THRESHOLDS.lexical_auroc
        receipts: list[Receipt] = []
        for feature in sorted(labelled.scores):
            rungs = {rung: self._rung(labelled, feature, rung, draws) for rung in RUNGS}
            rungs = {rung: r for rung, r in rungs.items() if r.value is not None or rung != "N3"}
            receipts += rungs.values()
            receipts.append(_contextual(named, feature, rungs["N2"], bool(lexical[feature])))
        return [*receipts, *_summary(named, receipts)]

    def _rung(self, labelled: Labelled, feature: int, rung: str, draws: DocumentDraws) -> Receipt:
        control = f"{self.code} {self.name} {rung}"
        scores, examples = labelled.scores[feature], labelled.examples[feature]
        negatives = examples.negatives.get(rung)
        if negatives is None:
            verdict = FAILED if rung == HEADLINE else REPORTED
            return Receipt(
                feature=feature, control=control, value=None, verdict=verdict, detail={"missing": _MISSING[rung]}
            )
        test, pairs = labelled.rows.test, None
        if rung == "N2":
            tokens = test.windows.tokens.ravel()
            pairs = tokens[examples.active][:, None] == tokens[negatives][None, :]
        value = auroc(scores["active"], scores[rung], pairs)
        low, high = draws.interval(
            scores["active"], test.documents[examples.active], scores[rung], test.documents[negatives], pairs
        )
        verdict = REPORTED
        if rung == HEADLINE:
            verdict = PASSED if low > THRESHOLDS.chance else FAILED
        return Receipt(
            feature=feature,
            control=control,
            value=None if np.isnan(value) else value,
            threshold=THRESHOLDS.chance,
            n=len(negatives),
            low=None if np.isnan(low) else low,
            high=None if np.isnan(high) else high,
            verdict=verdict,
            detail={"active": len(examples.active)},
        )


def _contextual(named: str, feature: int, same_token: Receipt, lexical: bool) -> Receipt:
    """Whether the label tells active from silent rows of the same token; where it could be asked."""
    enough = same_token.n >= THRESHOLDS.contextual_negatives and same_token.low is not None
    holds = enough and same_token.low is not None and same_token.low > THRESHOLDS.chance and not lexical
    detail = {"lexical": lexical} | ({} if enough else {"missing": "too few rows of the same tokens that are silent"})
    return Receipt(
        feature=feature,
        control=f"{named} contextual",
        value=same_token.value,
        threshold=THRESHOLDS.chance,
        n=same_token.n,
        low=same_token.low,
        high=same_token.high,
        verdict=PASSED if holds else FAILED if enough else REPORTED,
        detail=detail,
    )


def _summary(named: str, receipts: Sequence[Receipt]) -> list[Receipt]:
    out = []
    for rung in RUNGS:
        own = [r for r in receipts if r.control == f"{named} {rung}"]
        values = [r.value for r in own if r.value is not None]
        detail = {"features": len(own)} | ({} if values else {"missing": _MISSING[rung]})
        median = float(np.median(values)) if values else None
        out.append(
            Receipt(control=f"{named} {rung} median", value=median, n=len(values), verdict=REPORTED, detail=detail)
        )
    verdicts = Counter(r.verdict for r in receipts if r.control == f"{named} contextual")
    total = sum(verdicts.values())
    share = verdicts[PASSED] / total if total else None
    detail = {"contextual": verdicts[PASSED], "not": verdicts[FAILED], "could_not_be_asked": verdicts[REPORTED]}
    out.append(Receipt(control=f"{named} contextual share", value=share, n=total, verdict=REPORTED, detail=detail))
    return out
