"""What the controls ask: fixed before any label is scored, not configurable, and hashed into the receipts."""

import hashlib
import json
from dataclasses import asdict, dataclass

from .receipt import REPORTED, Receipt


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Every number that a verdict depends on."""

    max_near_copies: float = 0.5
    """C0: share of held-out windows that may nearly repeat train before nothing is left to trust."""
    null_margin: float = 0.02
    """C2: distance from 0.5 that the mean AUROC of labels of nothing may have."""
    null_significant: float = 0.05
    """C2: share of them that may be significant, two standard errors on top."""
    null_features: int = 200
    permutations: int = 199
    """C3: labels of other features that a label is compared with."""
    costly_permutations: int = 39
    """The same for labels in words whose scorer asks a language model about every row."""
    false_discovery_rate: float = 0.05
    chance: float = 0.5
    """C4: the lower end of the interval must lie above it."""
    contextual_negatives: int = 20
    """C4: same-token negatives that 'contextual' needs."""
    lexical_auroc: float = 0.95
    """C5: a feature that the token table predicts so well is lexical."""
    random_gap: float = 0.05
    """C6: what the median AUROC of labels has to be above that of a random dictionary's."""
    shared_share: float = 0.25
    """C9: share of features that a second seed finds too, up to `wide` latents; in wider dictionaries the next one."""
    shared_share_wide: float = 0.15
    wide: int = 8192
    top_only_drop: float = 0.15
    """C14: AUROC lost from the strongest tenth of the activations to the middle ones."""
    split_half: float = 0.8
    """C15: reliability that ranking features by their score needs."""
    baseline_margin: float = 0.05
    """C15: distance from 0.5 that labels saying nothing may have."""
    constant_share: float = 0.1
    """C15: share of labels that may get one score for every row."""
    failed_share: float = 0.05
    """C15: share of answers that may be missing."""
    planted_named: float = 12 / 14
    """C16: share of planted concepts that must be named."""
    planted_concepts: int = 10
    """C16: concepts that the text must hold often enough for a verdict."""
    planted_f1: float = 0.5
    """C16: test F1 with the concept itself that an executable name needs."""
    planted_same_token: float = 0.6
    """C16: its AUROC on rows of the same token, where the concept's own token also stands without it."""
    random_unexplained: float = 0.9
    """C16: share of RANDOM features that must be left alone."""
    no_claim: float = 0.05
    """C16: distance from 0.5 within which an AUROC claims nothing."""

    @property
    def sha256(self) -> str:
        """Of all names and values."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def receipt(self, tier: str) -> Receipt:
        """The thresholds themselves, written before what they judge."""
        detail = {"sha256": self.sha256, "tier": tier, "thresholds": asdict(self)}
        return Receipt(control="thresholds", value=None, verdict=REPORTED, detail=detail)


THRESHOLDS = Thresholds()
