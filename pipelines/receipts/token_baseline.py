"""C5: what the token alone says of a feature. A feature that is a token must have a label that says so."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from ..explainers.base import Candidate
from ..predicates import Both, Either, Predicate, TokenPredicate
from .control import Labelled
from .receipt import FAILED, PASSED, REPORTED, Receipt
from .statistics import auroc
from .thresholds import THRESHOLDS
from .token_table import token_auroc, token_r2

if TYPE_CHECKING:
    from ..run import Run


class TokenBaseline:
    """A_tok, R2 of the token, A of the pair (previous token, token); `lexical` where A_tok reaches its threshold."""

    code: ClassVar[str] = "C5"
    name: ClassVar[str] = "token identity"
    tier: ClassVar[str] = "fast"

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Needs nothing of the run."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Of every feature that is active on test, labelled or not; and the lexical share."""
        named, test, table = f"{self.code} {self.name}", labelled.rows.test, labelled.token_table
        aurocs, r2 = token_auroc(table, test), token_r2(table, test)
        counts, bar = test.active.counts, THRESHOLDS.lexical_auroc
        alive = np.flatnonzero(~np.isnan(aurocs))
        receipts = []
        for feature in alive.tolist():
            label, value = labelled.labels.get(feature), float(aurocs[feature])
            verdict = REPORTED
            if label is not None and value >= bar:
                verdict = PASSED if is_about_the_token(label) else FAILED
            detail = {"lexical": value >= bar}
            n = int(counts[feature])
            receipts.append(
                Receipt(feature=feature, control=named, value=value, threshold=bar, n=n, verdict=verdict, detail=detail)
            )
            if not np.isnan(r2[feature]):
                receipts.append(
                    Receipt(feature=feature, control=f"{named} R2", value=float(r2[feature]), n=n, verdict=REPORTED)
                )
        receipts += self._pairs(labelled)
        share = float((aurocs[alive] >= bar).mean()) if len(alive) else None
        receipts.append(Receipt(control=f"{named} lexical share", value=share, n=len(alive), verdict=REPORTED))
        return receipts

    def _pairs(self, labelled: Labelled) -> list[Receipt]:
        """AUROC of the pair table on the examples (N0), with what it and the label gain over the token table there."""
        table, test, out = labelled.token_table, labelled.rows.test, []
        features = [f for f in sorted(labelled.examples) if len(labelled.examples[f].negatives.get("N0", ()))]
        if not features:
            return out
        own = [np.concatenate([labelled.examples[f].active, labelled.examples[f].negatives["N0"]]) for f in features]
        sizes = [len(x) for x in own]
        owner, rows = np.repeat(features, sizes), np.concatenate(own)
        ends = np.cumsum(sizes)[:-1]
        by_token = np.split(table.predict(owner, test.windows.tokens.ravel()[rows].astype(np.int64)), ends)
        by_pair = np.split(table.predict_pairs(owner, rows, test), ends)
        for feature, token, pair in zip(features, by_token, by_pair, strict=True):
            size = len(labelled.examples[feature].active)
            of_token, of_pair = auroc(token[:size], token[size:]), auroc(pair[:size], pair[size:])
            detail = {"token": round(of_token, 4), "gain": round(of_pair - of_token, 4)}
            if feature in labelled.scores:
                scores = labelled.scores[feature]
                detail["gain_of_label"] = round(auroc(scores["active"], scores["N0"]) - of_token, 4)
            out.append(
                Receipt(
                    feature=feature,
                    control=f"{self.code} {self.name} bigram",
                    value=of_pair,
                    n=len(token),
                    verdict=REPORTED,
                    detail=detail,
                )
            )
        return out


def is_about_the_token(label: Candidate) -> bool:
    """Whether a label says which tokens the row itself may be, alone or where something stands beside them."""
    if label.predicate is not None:
        return _names_tokens(label.predicate)
    return label.kind == "lexical"


def _names_tokens(predicate: Predicate) -> bool:
    if isinstance(predicate, Both):
        return _names_tokens(predicate.first) or _names_tokens(predicate.second)
    if isinstance(predicate, Either):
        return _names_tokens(predicate.first) and _names_tokens(predicate.second)
    return isinstance(predicate, TokenPredicate)
