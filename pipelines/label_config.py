"""How features are labelled: what a label needs, which explainers propose, what scores words, which controls run."""

from dataclasses import dataclass

from .receipts.tiers import TIERS


@dataclass(frozen=True)
class LabelConfig:
    """How labels are proposed on train, chosen on calibration, and checked on test. No threshold is applied on test."""

    active_fraction: float = 0.25
    """A feature is active where its activation exceeds this fraction of its largest train activation, in [0, 1)."""
    min_f1: float = 0.3
    """Calibration F1 that an executable label needs; candidates need half of it on train."""
    min_lift: float = 2.0
    """P(active | predicate) / P(active) that an executable label needs, on train and on calibration."""
    min_active_rows: int = 10
    """Active rows that a feature needs on train, and again on calibration, to be labelled at all."""
    min_hits: int = 3
    """Active rows on which an executable label must hold, on train and on calibration."""
    simplicity_margin: float = 0.02
    """Calibration F1 given up for a simpler predicate."""
    max_candidates: int = 16
    """Candidates a feature that are tried on calibration."""
    max_set_size: int = 16
    """Texts that a 'one of ...' predicate may list."""
    num_bootstrap: int = 400
    """Draws of test documents behind each interval."""
    seed: int = 0
    """Seed of the document draws and of the examples."""
    explainers: tuple[str, ...] = ("predicates",)
    """Which explainers propose labels."""
    part_of_speech: str = ""
    """spaCy pipeline with a tagger, by name or folder: labels may say what part of speech a token is; unset: none."""
    bank: str = ""
    """File of further labels for the explainer label_bank, one a line; unset: the packaged ones alone."""
    scorer: str = "embedding"
    """What scores labels that are words only; executable labels are scored by executing them."""
    min_auroc: float = 0.65
    """Calibration AUROC, against matched negatives, that a label in words only needs."""
    executable_margin: float = 0.03
    """Calibration AUROC given up for an executable label, or for fewer words."""
    num_examples: int = 40
    """Active rows a feature that labels are scored on, and as many negatives on every rung (docs/receipts.md)."""
    receipts: str = "fast"
    """Cost tier of the controls: fast, full or paper; none writes no receipts."""

    def __post_init__(self):
        if not 0 <= self.active_fraction < 1:
            raise ValueError(f"active_fraction must be in [0, 1), not {self.active_fraction}")
        for name in ("min_f1", "min_auroc", "simplicity_margin", "executable_margin"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        for name in ("min_lift", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("min_active_rows", "min_hits", "max_candidates", "num_bootstrap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_set_size < 2:
            raise ValueError(f"max_set_size must be at least 2, not {self.max_set_size}")
        if self.num_examples < 2:
            raise ValueError(f"num_examples must be at least 2, not {self.num_examples}")
        if self.receipts not in ("none", *TIERS):
            raise ValueError(f"label.receipts must be none, {', '.join(TIERS)}, not {self.receipts!r}")
        if not self.explainers:
            raise ValueError('label.explainers names no explainer: ["predicates"] needs nothing but the evidence')
