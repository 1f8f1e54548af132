"""C6: what labels score on random directions that fire as often as the trained features.

A dictionary of random rows, thresholds set to the trained firing rates, goes through the same labels and scores. What
trained features score above that is what training has to do with them (Heap et al. 2025, arXiv 2501.17727; Korznikov et
al. 2026, arXiv 2602.14111).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .control import Control, Labelled
from .control_gaps import ControlPair, permutation_share, share_receipt
from .control_scores import percentiles
from .receipt import REPORTED, Receipt

if TYPE_CHECKING:
    from ..run import Run

#: What the trained median has to be above the random one, set before any dictionary was scored.
LEAST_GAP = 0.05
#: The one that decides, and others that are only reported where they were made.
KIND, MORE_KINDS = "random", ("random-covariance", "neurons", "pca")


class RandomDictionary:
    """Trained labels against those of a random dictionary, as a whole and feature by feature."""

    code: ClassVar[str] = "C6"
    name: ClassVar[str] = "random dictionary"
    tier: ClassVar[str] = "full"

    @classmethod
    def of(cls, run: "Run") -> "RandomDictionary":
        """Needs nothing but the run."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """By what is on disk of the run and its control runs."""
        return self.compare(labelled.run)

    def compare(self, run: "Run") -> list[Receipt]:
        """Receipts of the whole, and the percentile of every labelled feature."""
        pair = ControlPair(run, KIND)
        title = f"{self.code} {self.name}"
        if pair.mine is None or pair.other is None:
            return [pair.absent(title, pair.missing)]
        mine, other = pair.mine, pair.other
        found = [
            pair.gap(title, mine.of(mine.is_labelled), other.of(other.is_labelled), at_least=LEAST_GAP),
            pair.gap(f"{title} alive", mine.with_silence(), other.with_silence(), asked=False),
            share_receipt(f"{title} labelled share", other, KIND),
            permutation_share(f"{title} C3", other, KIND),
        ]
        for kind in MORE_KINDS:
            more = ControlPair(run, kind)
            if more.mine is not None and more.other is not None:
                both = more.mine.of(more.mine.is_labelled), more.other.of(more.other.is_labelled)
                found += [
                    more.gap(f"{title} {kind}", *both, asked=False),
                    share_receipt(f"{title} {kind} labelled share", more.other, kind),
                ]
        return found + self._percentiles(pair)

    def _percentiles(self, pair: ControlPair) -> list[Receipt]:
        """Where every label's score lies among those of random features."""
        assert pair.mine is not None and pair.other is not None
        has_score = pair.mine.is_labelled & ~np.isnan(pair.mine.auroc)
        others = pair.other.of(pair.other.is_labelled).value
        features, values = np.flatnonzero(has_score), pair.mine.auroc[has_score]
        if not len(others):
            return []
        name = f"{self.code} {self.name} percentile"
        return [
            Receipt(control=name, value=float(share), verdict=REPORTED, feature=int(feature), n=len(others))
            for feature, share in zip(features, percentiles(values, others), strict=True)
        ]


_: type[Control] = RandomDictionary
