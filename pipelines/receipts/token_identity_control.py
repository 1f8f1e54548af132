"""C13: may what a feature does at a position be put down to the token that stands there?

It may where the token is still found in the activations of the feature's layer (id(L) of `token_identity.py`), or where
replacing the token costs the feature its activation (Delta of `masked_token.py`). Else the card says "position, not
token", and no single token is highlighted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from ..progress import OnProgress
from ..split_rows import SplitRows, read_token_ids
from .control import Labelled
from .receipt import FAILED, PASSED, Receipt, judged
from .statistics import paired_interval

if TYPE_CHECKING:
    from ..masked_token import MaskedEffect
    from ..run import Run
    from ..token_identity import TokenIdentity, TokensConfig

CODE, NAME = "C13", "token identifiability"
CONTROL = f"{CODE} {NAME}"
MASKED = f"{CONTROL} masked token"
#: What a card says in place of a highlighted token.
CARD = "position, not token"


def attributes_to_token(receipts: Iterable[Mapping[str, Any]], feature: int) -> bool | None:
    """Whether a card or page may highlight a single token for `feature`; None where C13 was not run.

    Args: rows of the table `receipts` of one dictionary, at least with columns control, feature and verdict.
    The feature's own receipt decides; without one, that of its layer.
    """
    of_layer: bool | None = None
    for row in receipts:
        if row["control"] == MASKED and row["feature"] == feature:
            return row["verdict"] == PASSED
        if row["control"] == CONTROL and row["feature"] is None:
            of_layer = row["verdict"] == PASSED
    return of_layer


class TokenIdentityControl:
    """Measures id at the hook points that the dictionary reads, and Delta of a sample of features."""

    code: ClassVar[str] = CODE
    name: ClassVar[str] = NAME
    tier: ClassVar[str] = "full"

    def __init__(self, run: "Run", config: "TokensConfig"):
        self.run, self.config = run, config

    @classmethod
    def of(cls, run: "Run") -> Self:
        return cls(run, run.config.token_identity)

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Raises ModelError where the text of a split has too few tokens to read any from."""
        from ..token_identity import token_identity

        rows = labelled.rows
        found = token_identity(self.run.reading_model(), self.run.evidence, self.run.spec.reads, self.config)
        of_layer = identity_receipt(found, self.run.spec.reads, self.config)
        active = np.flatnonzero(rows.test.active.counts > 0)
        effects = measure_masked(self.run, [f for f in active.tolist() if f in labelled.labels], rows.test, self.config)
        return [of_layer, *masked_receipts(effects, of_layer.value, self.config)]


def measure_masked(
    run: "Run",
    features: Sequence[int],
    split: SplitRows,
    config: "TokensConfig",
    on_progress: OnProgress | None = None,
) -> "dict[int, MaskedEffect]":
    """Delta of at most `config.features` of the features, evenly spread over them, on rows of `split`."""
    from ..feature_values import FeatureValues
    from ..masked_token import masked_effects

    num = min(config.features, len(features))
    if num == 0:
        return {}
    chosen = [features[i] for i in np.unique(np.linspace(0, len(features) - 1, num).round().astype(int))]
    with FeatureValues.of(run, config.batch_tokens) as values:
        return masked_effects(values, split, read_token_ids(run.evidence, split), chosen, config, on_progress)


def identity_receipt(found: "TokenIdentity", reads: Sequence[str], config: "TokensConfig") -> Receipt:
    """id where the dictionary reads; of a crosscoder's hook points the one from which tokens are read best."""
    places = {p.hook_point: p for p in found.places}
    best = max((places[name] for name in reads), key=lambda p: p.own.value)
    verdict = judged(best.own.value, config.min_identity)
    detail = {
        "hook_points": {n: {t: round(e.value, 4) for t, e in places[n].found.items()} for n in reads},
        "map": "ridge to the token embedding, nearest by cosine",
        "token_types": found.num_types,
        "train_rows": found.num_train_rows,
        "commonest_token": round(found.commonest, 4),
        **({"card": CARD} if verdict == FAILED else {}),
    }
    return Receipt(
        control=CONTROL,
        value=best.own.value,
        threshold=config.min_identity,
        n=best.own.n,
        low=best.own.low,
        high=best.own.high,
        verdict=verdict,
        detail=detail,
    )


def masked_receipts(
    effects: "Mapping[int, MaskedEffect]", identity: float | None, config: "TokensConfig"
) -> list[Receipt]:
    """One a feature: passed where Delta reaches its threshold, or the layer's id does."""
    receipts = []
    for feature, effect in effects.items():
        delta = float(effect.own.mean())
        low, high = paired_interval(effect.own, np.zeros(len(effect.own)), draws=config.num_bootstrap, seed=config.seed)
        passed = delta >= config.min_delta or (identity is not None and identity >= config.min_identity)
        other = effect.other[~np.isnan(effect.other)]
        detail: dict[str, Any] = {
            "other_token": round(float(other.mean()), 4) if len(other) else None,
            "identity": None if identity is None else round(identity, 4),
            **({} if passed else {"card": CARD}),
        }
        receipts.append(
            Receipt(
                control=MASKED,
                feature=feature,
                value=delta,
                threshold=config.min_delta,
                n=len(effect.own),
                low=low if len(effect.own) > 1 else None,
                high=high if len(effect.own) > 1 else None,
                verdict=PASSED if passed else FAILED,
                detail=detail,
            )
        )
    return receipts
