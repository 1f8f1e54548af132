"""Which latents of two dictionaries are the same: a one-to-one matching by cosine, and what chance would give.

Matched are decoder rows and, apart from them, encoder rows. Up to `HUNGARIAN_LATENTS` latents the pairs are those of
the largest sum of cosines (Kuhn 1955; scipy's Jonker-Volgenant); above, mutual nearest neighbours, found block by
block. Two latents are *shared* where both matchings give each other and the cosine of their decoder rows reaches a
threshold (Paulo and Belrose 2025, arXiv:2501.16615). What chance gives is the cosine with the nearest of as many
random rows: no matching can give a latent more.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

#: Most latents of the wider dictionary for which the assignment is solved: at 16,384 it takes 3.2 GB and minutes.
HUNGARIAN_LATENTS = 16384
#: Cosines in memory at once where no assignment is solved.
BLOCK_COSINES = 2**24

Method = Literal["hungarian", "mutual_nearest"]
NullKind = Literal["isotropic", "covariance"]
NULL_KINDS: tuple[NullKind, ...] = ("isotropic", "covariance")
#: Far from the seeds of trainings: a latent that never learned still has the random row that its seed gave it.
_NULL_SEED = 0x5AE0_0000


@dataclass(frozen=True)
class LatentRows:
    """Unit rows of a dictionary: decoder [d_sae, d_out] and encoder [d_sae, d_in]."""

    decoder: torch.Tensor
    encoder: torch.Tensor

    @classmethod
    def of(cls, decoder: torch.Tensor, encoder: torch.Tensor) -> "LatentRows":
        """Rows scaled to norm 1; rows of zeros stay zero and match nothing."""
        return cls(*(torch.nn.functional.normalize(w.detach().float(), dim=1, eps=1e-12) for w in (decoder, encoder)))

    def __len__(self) -> int:
        return len(self.decoder)


@dataclass(frozen=True)
class Matching:
    """For every latent of the first dictionary its partner in the second, -1 where it has none; arrays are [d_sae]."""

    method: Method
    partner: NDArray[np.int64]  # by decoder rows
    decoder_cosine: NDArray[np.float32]  # with the partner; 0 where there is none
    encoder_cosine: NDArray[np.float32]
    encoder_agrees: NDArray[np.bool_]  # encoder rows give the same partner
    nearest: NDArray[np.int64]  # by decoder rows, not one-to-one
    nearest_cosine: NDArray[np.float32]
    nearest_of_other: NDArray[np.int64]  # [d_sae of the second]: its nearest latent of the first
    nearest_of_other_cosine: NDArray[np.float32]

    def shared(self, threshold: float) -> NDArray[np.bool_]:
        """Latents whose partner is the same for encoder and decoder, with a decoder cosine of at least `threshold`."""
        return self.encoder_agrees & (self.decoder_cosine >= threshold)


def match(first: LatentRows, second: LatentRows, method: Method | None = None) -> Matching:
    """Match two dictionaries of one space; `method` unset is by the wider one's size."""
    method = method or ("hungarian" if max(len(first), len(second)) <= HUNGARIAN_LATENTS else "mutual_nearest")
    nearest, nearest_cosine, back, back_cosine = nearest_rows(first.decoder, second.decoder)
    if method == "hungarian":
        partner, by_encoder = (_assign(a, b) for a, b in _pairs(first, second))
    else:
        partner = _mutual(nearest, back)
        there, _, back_again, _ = nearest_rows(first.encoder, second.encoder)
        by_encoder = _mutual(there, back_again)
    found = torch.from_numpy(partner >= 0)
    cosines = [np.zeros(len(first), np.float32) for _ in range(2)]
    for cosine, (a, b) in zip(cosines, _pairs(first, second), strict=True):
        others = torch.from_numpy(partner)[found]
        cosine[found.numpy()] = (a[found.to(a.device)] * b[others.to(b.device)]).sum(1).cpu().numpy()
    return Matching(
        method=method,
        partner=partner,
        decoder_cosine=cosines[0],
        encoder_cosine=cosines[1],
        encoder_agrees=(partner >= 0) & (partner == by_encoder),
        nearest=nearest,
        nearest_cosine=nearest_cosine,
        nearest_of_other=back,
        nearest_of_other_cosine=back_cosine,
    )


def null_cosines(first: torch.Tensor, second: torch.Tensor, kind: NullKind, seed: int = 0) -> NDArray[np.float32]:
    """Cosine of every row of `first` with the nearest of as many random rows as `second` has, [len(first)].

    `isotropic` rows point anywhere; `covariance` gives them the covariance of the rows of `second`, which is harder to
    beat, for dictionaries crowd into the directions in which activations vary.
    """
    noise = torch.randn(second.shape, generator=torch.Generator().manual_seed(_NULL_SEED + seed)).to(second.device)
    if kind == "covariance":
        root = torch.linalg.qr(second, mode="r").R  # root' root = second' second
        noise = noise[:, : len(root)] @ root
    return nearest_rows(first, torch.nn.functional.normalize(noise, dim=1))[1]


def nearest_rows(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Nearest row of `b` for every row of `a` with its cosine, then of `a` for every row of `b`; never all at once."""
    best_a, best_b = torch.empty(len(a), dtype=torch.int64), torch.zeros(len(b), dtype=torch.int64)
    cosine_a, cosine_b = torch.empty(len(a)), torch.full((len(b),), -torch.inf)
    block = max(1, BLOCK_COSINES // len(b))
    for start in range(0, len(a), block):
        cosines = a[start : start + block] @ b.T  # [block, len(b)]
        largest, where = cosines.max(1)
        cosine_a[start : start + block], best_a[start : start + block] = largest.cpu(), where.cpu()
        largest, where = (t.cpu() for t in cosines.max(0))
        better = largest > cosine_b
        cosine_b[better], best_b[better] = largest[better], where[better] + start
    return best_a.numpy(), cosine_a.numpy(), best_b.numpy(), cosine_b.numpy()


def _pairs(first: LatentRows, second: LatentRows) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return (first.decoder, second.decoder), (first.encoder, second.encoder)


def _assign(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.int64]:
    rows, columns = linear_sum_assignment((a @ b.T).cpu().numpy(), maximize=True)
    partner = np.full(len(a), -1, np.int64)
    partner[rows] = columns
    return partner


def _mutual(nearest: NDArray[np.int64], back: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(back[nearest] == np.arange(len(nearest)), nearest, -1)
