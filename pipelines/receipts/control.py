"""What a control is: a named check that the pipeline runs at a stated cost tier and that writes receipts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np

from ..explainers.base import Candidate
from ..split_rows import FeatureRows
from .examples import Examples
from .held_out import HeldOut
from .label_scorer import LabelScorer
from .receipt import Receipt
from .scorer import Scorer
from .tiers import TIERS as TIERS
from .token_table import TokenTable

if TYPE_CHECKING:
    from ..run import Run


class ReceiptError(ValueError):
    """A control that the rest rests on failed: no label of this run could be trusted."""


@dataclass(frozen=True)
class Labelled:
    """What controls look at: rows of a dictionary, their labels, the examples these are scored on."""

    run: "Run"
    rows: FeatureRows
    labels: Mapping[int, Candidate]  # features that have one
    examples: Mapping[int, Examples]  # test examples of features that can be scored
    tier: str
    scorer: Scorer | None = None  # of the labels; None: by the configuration of `run`
    held_out: HeldOut | None = None  # where the examples come from; None: as the run's evidence says

    @cached_property
    def label_scorer(self) -> Scorer:
        """What the labels are scored by."""
        return self.scorer if self.scorer is not None else LabelScorer.of(self.run)

    @cached_property
    def source(self) -> HeldOut:
        """What the examples are sampled from."""
        return self.held_out or HeldOut.of_evidence(self.rows, self.run.evidence, self.run.config.label)

    @cached_property
    def scores(self) -> dict[int, dict[str, np.ndarray]]:
        """Scores of every labelled feature's examples by its label: 'active' [P] and each rung [Q], float64."""
        features = [f for f in self.labels if f in self.examples]
        parts = {f: {"active": self.examples[f].active, **self.examples[f].negatives} for f in features}
        rows = [np.concatenate(list(own.values())) for own in parts.values()]
        found = self.label_scorer.score([self.labels[f] for f in features], rows, self.rows.test)
        out = {}
        for scores, (feature, own) in zip(found, parts.items(), strict=True):
            ends = np.cumsum([len(x) for x in own.values()])[:-1]
            out[feature] = dict(zip(own, np.split(np.asarray(scores, np.float64), ends), strict=True))
        return out

    @cached_property
    def token_table(self) -> TokenTable:
        """How often each feature is active on each token of train."""
        return TokenTable.of(self.rows.train)


class Control(Protocol):
    """One check of `docs/receipts.md`."""

    code: ClassVar[str]  # 'C3'
    name: ClassVar[str]  # 'label permutation'
    tier: ClassVar[str]

    @classmethod
    def of(cls, run: "Run") -> Self:
        """For `run`: cheap until it checks. Raises a ValueError where what it needs cannot be had."""
        ...

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Raises ReceiptError where its failing ends the run (C0, C1)."""
        ...
