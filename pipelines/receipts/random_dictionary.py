"""C6: what labels score on random directions that fire as often as the trained features.

A dictionary of random rows, thresholds set to the trained firing rates, goes through the same labels and scores. What
trained features score above that is what training has to do with them (Heap et al. 2025, arXiv 2501.17727; Korznikov et
al. 2026, arXiv 2602.14111).
"""

from typing import ClassVar

import numpy as np

from .beyond_labels import steering_gap
from .control import Control
from .control_gaps import BesideControlRuns, ControlPair, Trained
from .control_scores import percentiles
from .receipt import REPORTED, Receipt
from .thresholds import THRESHOLDS

#: The one that decides, and others that are only reported where they were made.
KIND, MORE_KINDS = "random", ("random-covariance", "neurons", "pca")


class RandomDictionary(BesideControlRuns):
    """Trained labels against those of a random dictionary, as a whole and feature by feature."""

    code: ClassVar[str] = "C6"
    name: ClassVar[str] = "random dictionary"
    tier: ClassVar[str] = "full"

    def compare(self, trained: Trained) -> list[Receipt]:
        """Receipts of the whole, and the percentile of every labelled feature."""
        title, pair = f"{self.code} {self.name}", trained.pair(KIND)
        if pair.scores is None:
            return [pair.absent(title, pair.missing)]
        mine, other = pair.scores
        found = [
            pair.gap(title, mine.of_labels(), other.of_labels(), at_least=THRESHOLDS.random_gap),
            pair.gap(f"{title} alive", mine.of_alive(), other.of_alive(), mean=True, asked=False),
            pair.labelled_shares(f"{title} labelled share"),
            pair.permutation_share(f"{title} C3 share"),
            *steering_gap(pair, f"{title} steering", asked=False),
        ]
        for kind in MORE_KINDS:
            more = trained.pair(kind)
            if more.scores is not None:
                mine, other = more.scores
                found += [
                    more.gap(f"{title} {kind}", mine.of_labels(), other.of_labels(), asked=False),
                    more.labelled_shares(f"{title} {kind} labelled share"),
                ]
        return found + self._percentiles(pair)

    def _percentiles(self, pair: ControlPair) -> list[Receipt]:
        """Where every label's score lies among those of random features."""
        assert pair.scores is not None
        mine, other = pair.scores
        has_score, others = mine.is_labelled & ~np.isnan(mine.auroc), other.of_labels()
        features, values = np.flatnonzero(has_score), mine.auroc[has_score]
        if not len(others):
            return []
        name = f"{self.code} {self.name} percentile"
        return [
            Receipt(control=name, value=float(share), verdict=REPORTED, feature=int(feature), n=len(others))
            for feature, share in zip(features, percentiles(values, others), strict=True)
        ]


_: type[Control] = RandomDictionary
