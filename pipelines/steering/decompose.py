"""What is in a vector: a non-negative sum of few decoder rows, with what it leaves over.

Orthogonal matching pursuit with non-negative coefficients (Pati, Rezaiifar and Krishnaprasad 1993; Bruckstein, Elad and
Zibulevsky 2008): the row that points most along what is left joins, then all coefficients are fitted anew.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls


@dataclass(frozen=True)
class Part:
    """One feature of a decomposition."""

    feature: int
    coefficient: float
    """Of the feature's decoder row."""
    cosine: float
    """Of its decoder row with the whole vector."""


@dataclass(frozen=True)
class Decomposition:
    """A vector as features and a rest."""

    parts: tuple[Part, ...]  # largest share of the vector first
    residual: torch.Tensor  # [d]
    residual_share: tuple[float, ...]
    """Share of the vector's squared norm that is left after 1, 2, ... features."""


def decompose(vector: torch.Tensor, rows: torch.Tensor, *, max_features: int = 16, stop: float = 0.01) -> Decomposition:
    """`vector` [d] as a non-negative sum of at most `max_features` of the decoder `rows` [d_sae, d].

    Stops where less than `stop` of the squared norm is left, or no row points along it.
    Raises ValueError for a vector that is zero, not finite, or of another width.
    """
    if vector.dim() != 1 or vector.shape[0] != rows.shape[1]:
        raise ValueError(f"the vector is {list(vector.shape)}, decoder rows are {rows.shape[1]} wide")
    total = float(vector.double().square().sum())
    if not np.isfinite(total) or total == 0:
        raise ValueError("the vector is zero or not finite: there is nothing in it")
    norms = rows.norm(dim=1).clamp_min(1e-12)
    units = rows / norms[:, None]
    target, chosen = vector.double().cpu().numpy(), []
    left, coefficients, shares = vector.float().clone(), np.zeros(0), []
    for _ in range(min(max_features, len(rows))):
        along = units @ left.to(units.device)
        if chosen:
            along[torch.tensor(chosen, device=along.device)] = -torch.inf
        best = int(along.argmax())
        if float(along[best]) <= 1e-6 * total**0.5:
            break
        chosen.append(best)
        basis = rows[chosen].double().cpu().numpy().T  # [d, n]
        coefficients, _ = nnls(basis, target)
        left = torch.from_numpy(target - basis @ coefficients).float()
        shares.append(float(left.double().square().sum()) / total)
        if shares[-1] < stop:
            break
    cosines = (units[chosen] @ vector.to(units.device).float() / total**0.5).tolist() if chosen else []
    parts = [Part(f, float(c), x) for f, c, x in zip(chosen, coefficients, cosines, strict=True) if c > 0]
    parts.sort(key=lambda p: -p.coefficient * float(norms[p.feature]))
    return Decomposition(tuple(parts), left, tuple(shares))
