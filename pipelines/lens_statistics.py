"""Is a list of promoted tokens more than chance? Statistics of the logit lens beside those of random directions.

Any direction has a top of its logits, and with embeddings that are tied or nearly so the tokens of such a top resemble
each other: ten random tokens are too easy a comparison. So every statistic is read of random directions too, and p is
the share of those (itself counted) that do as well.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .index import NEIGHBOUR_COSINES, direction_logits
from .models import LanguageModel
from .output_labels import centred_embedding

#: Tokens that make the neighbourhood of one.
NEIGHBOURS = 10


@dataclass(frozen=True)
class LensStatistics:
    """Of n directions; logits are `W_U norm(d)`."""

    top: np.ndarray  # [n, k] ids of the tokens with the largest logits
    entropy: np.ndarray  # [n] of softmax(logits), nats
    kurtosis: np.ndarray  # [n] of the logits over the vocabulary, 3 for a normal distribution
    coherence: np.ndarray  # [n] of the k tokens, see `coherence`


@torch.no_grad()
def lens_statistics(directions: torch.Tensor, lm: LanguageModel, k: int) -> LensStatistics:
    """Statistics of directions [n, d]. Raises ModelError for a model that was loaded without its last layers."""
    tops, entropies, kurtoses = [], [], []
    for _, logits in direction_logits(directions, lm):
        tops.append(logits.topk(k).indices.cpu())
        log_probs = logits.log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).cpu())
        spread = logits - logits.mean(-1, keepdim=True)
        square = spread.square()
        kurtoses.append((square.square().mean(-1) / square.mean(-1).square().clamp_min(1e-12)).cpu())
    top = torch.cat(tops).numpy()
    return LensStatistics(top, torch.cat(entropies).numpy(), torch.cat(kurtoses).numpy(), coherence(lm, top))


@torch.no_grad()
def coherence(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """[n] how much nearer the k tokens of every list [n, k] are to each other than tokens are in their neighbourhood.

    Mean pairwise cosine of the centred embeddings, less the mean over the tokens of the cosine with their
    `NEIGHBOURS` nearest: the local scaling of Lample et al. 2018 (arXiv 1710.04087). Without it lists of rarely trained
    pieces and of function words always win, since these lie in clusters that many directions meet.
    """
    unit, k = centred_embedding(lm), tokens.shape[1]
    distinct, place = np.unique(tokens, return_inverse=True)
    density = _density(unit, distinct)[place.reshape(tokens.shape)].mean(-1)
    sums = torch.stack([unit[torch.from_numpy(row).long().to(unit.device)].sum(0) for row in tokens])
    return ((sums.square().sum(-1) - k) / (k * (k - 1))).cpu().numpy() - density


def _density(unit: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
    """[m] mean cosine of each of `tokens` with its nearest other tokens; `unit` [V, d] are unit rows."""
    num, found = min(NEIGHBOURS, len(unit) - 1), []
    for part in torch.from_numpy(tokens).long().to(unit.device).split(max(1, NEIGHBOUR_COSINES // len(unit))):
        found.append((unit[part] @ unit.t()).topk(num + 1).values[:, 1:].mean(1).cpu())
    return torch.cat(found).numpy()


def random_token_coherence(lm: LanguageModel, k: int, num: int, seed: int) -> np.ndarray:
    """[num] coherence of lists of k tokens drawn from the whole vocabulary."""
    rng = np.random.default_rng(seed)
    size = lm.model.get_input_embeddings().weight.shape[0]
    return coherence(lm, np.stack([rng.choice(size, k, replace=False) for _ in range(num)]))


def chance(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """[n] share of the m `null` values, and the value itself, that are as large: the p of a permutation test."""
    below = np.searchsorted(np.sort(null), values, side="left")
    return (1 + len(null) - below) / (1 + len(null))
