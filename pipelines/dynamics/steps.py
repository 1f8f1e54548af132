"""What becomes of features from one checkpoint to the next: kept, turned, silent, born.

A feature is *alive* where it fires on at least `LEAST_ROWS` test rows. Of those alive before,

kept     the matching of encoder and of decoder rows gives the same partner, their decoder cosine reaches the threshold,
         and the partner is alive; its drift is that cosine and the change of its density
silent   so, but the partner fires no more
turned   no partner at that cosine: its direction is gone

Of those alive afterwards, *born* are the ones that are no kept feature's partner. Beside every step stands what chance
gives: the cosine with the nearest of as many random rows of the same covariance (`pipelines/matching.py`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from saeql.sae.model import SparseAutoencoder

from ..matching import LatentRows, Matching, match, null_cosines
from .firing import Firing

LEAST_ROWS = 5
KEPT, SILENT, TURNED, NOT_ALIVE = "kept", "silent", "turned", ""


@dataclass(frozen=True)
class Step:
    """Two dictionaries; arrays are [d_sae] of the first but for `born`, of the second."""

    matching: Matching
    chance: float  # 95th percentile of cosines with random rows
    fate: np.ndarray  # of str
    born: np.ndarray  # of bool

    def summary(self, first: Firing, second: Firing) -> dict[str, Any]:
        """Numbers of features, and how far kept ones drifted."""
        kept = self.fate == KEPT
        cosine = self.matching.decoder_cosine[kept]
        partner = self.matching.partner[kept]
        change = np.log2(second.density[partner] / first.density[kept]) if kept.any() else np.zeros(0)
        alive = int((self.fate != NOT_ALIVE).sum())
        return {
            "alive_before": alive,
            "alive_after": int((second.counts >= LEAST_ROWS).sum()),
            "kept": int(kept.sum()),
            "silent": int((self.fate == SILENT).sum()),
            "turned": int((self.fate == TURNED).sum()),
            "born": int(self.born.sum()),
            "kept_share": float(kept.sum() / max(alive, 1)),
            "cosine_median": float(np.median(cosine)) if len(cosine) else None,
            "cosine_p10": float(np.quantile(cosine, 0.1)) if len(cosine) else None,
            "density_doubled_or_halved": float((np.abs(change) >= 1).mean()) if len(change) else None,
            "chance_cosine_p95": self.chance,
        }


def step(first: SparseAutoencoder, second: SparseAutoencoder, before: Firing, after: Firing, *, cosine: float) -> Step:
    """What becomes of the features of `first`."""
    rows = [LatentRows.of(d.W_dec, d.W_enc) for d in (first, second)]
    matching = match(rows[0], rows[1])
    alive, alive_after = before.counts >= LEAST_ROWS, after.counts >= LEAST_ROWS
    shared = matching.shared(cosine)
    partner_alive = np.where(matching.partner >= 0, alive_after[matching.partner], False)
    fate = np.full(len(alive), NOT_ALIVE, object)
    fate[alive & shared & partner_alive] = KEPT
    fate[alive & shared & ~partner_alive] = SILENT
    fate[alive & ~shared] = TURNED
    born = alive_after.copy()
    born[matching.partner[fate == KEPT]] = False
    chance = float(np.quantile(null_cosines(rows[0].decoder, rows[1].decoder, "covariance"), 0.95))
    return Step(matching, chance, fate, born)
