"""The default explainer: executable predicates, found by counting what active train rows have in common."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from ..label_candidates import CandidateLimits, propose
from ..label_config import LabelConfig
from ..progress import OnProgress
from ..split_rows import FeatureRows
from .base import Candidate

if TYPE_CHECKING:
    from ..run import Run


class PredicateExplainer:
    """Token, word, stem, affix, class, position and neighbour predicates with enough lift and F1 on train."""

    name: ClassVar[str] = "predicates"
    #: What it proposes for a feature does not depend on the others.
    in_blocks: ClassVar[bool] = True

    def __init__(self, config: LabelConfig):
        self.config = config
        self.limits = CandidateLimits(
            min_hits=config.min_hits,
            min_lift=config.min_lift,
            min_f1=config.min_f1 / 2,
            max_candidates=config.max_candidates,
            max_set_size=config.max_set_size,
        )

    @classmethod
    def of(cls, run: "Run") -> Self:
        """By the thresholds of `run.config.label`."""
        return cls(run.config.label)

    def propose(
        self, rows: FeatureRows, features: Sequence[int], on_progress: OnProgress
    ) -> Mapping[int, list[Candidate]]:
        """Candidates by feature, best train F1 first; `features` without enough active train rows have none."""
        train = rows.train
        wanted = np.zeros(rows.num_features, bool)
        wanted[np.asarray(features, np.int64)] = True
        wanted &= train.active.counts >= self.config.min_active_rows
        active = train.active.where(wanted[train.active.features])
        found = propose(train.windows, active, train.eligible, self.limits)
        on_progress(len(features), len(features))
        return {
            feature: [Candidate(p.describe(), p.kind, self.name, p) for p in own]
            for feature, own in enumerate(found)
            if own
        }
