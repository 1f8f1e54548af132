"""Online code length: how many bits it takes to send the labels to someone who has the vectors and the same probe.

Labels are sent in growing portions, each coded with the probe that the portions before it taught (prequential coding;
Voita and Titov 2020, arXiv 2003.12298): L = sum of -log2 p(y_i | what came before). A probe that is good because it
found the property early makes a short code; one that needs all of the data, or memorises, does not.
"""

import math
from itertools import pairwise

import numpy as np

from .probes import Matrix, Probe, log_loss

#: Shares of the cases after which the probe learns anew.
PORTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def compression(probe: Probe, setting: float, x: Matrix, y: np.ndarray, seed: int) -> float:
    """Length of the uniform code (one bit a label) over that of the online code, in a random order of the n cases.

    1: nothing is known of the labels beyond their number; below 1: the probe misleads. NaN below 2 cases.
    """
    n = len(y)
    if n < 2:
        return math.nan
    order = np.random.default_rng(seed).permutation(n)
    x, y = x[order], y[order]
    ends = sorted({max(1, round(share * n)) for share in PORTIONS})
    bits = float(ends[0])
    for seen, end in pairwise(ends):
        fitted = probe.fit(x[:seen], y[:seen], setting)
        bits += float(log_loss(fitted.log_odds(x[seen:end]), y[seen:end]).sum()) / math.log(2)
    return n / bits
