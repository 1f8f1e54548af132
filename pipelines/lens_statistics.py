"""Is a list of promoted tokens more than chance? Statistics of the logit lens beside those of random directions.

Any direction has a top of its logits, and with embeddings that are tied or nearly so the tokens of such a top resemble
each other: ten random tokens are too easy a comparison. So every statistic is read of random directions too, and p is
the share of those (itself counted) that do as well.
"""

from dataclasses import dataclass

import numpy as np
import torch

from saeql.sae.config import ConfigError

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
def lens_statistics(directions: torch.Tensor, lm: LanguageModel, k: int, among: np.ndarray) -> LensStatistics:
    """Statistics of directions [n, d] over the logits of the token ids `among` [m], distinct.

    Raises ModelError for a model that was loaded without its last layers, ConfigError where m is less than k.
    """
    if len(among) < k:
        raise ConfigError(f"lists of {k} tokens cannot be drawn from the {len(among)} that the text has often enough")
    tops, entropies, kurtoses, chosen = [], [], [], torch.from_numpy(among).long()
    for _, every in direction_logits(directions, lm):
        logits = every[:, chosen.to(every.device)]
        tops.append(chosen[logits.topk(k).indices.cpu()])
        log_probs = logits.log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).cpu())
        spread = logits - logits.mean(-1, keepdim=True)
        square = spread.square()
        kurtoses.append((square.square().mean(-1) / square.mean(-1).square().clamp_min(1e-12)).cpu())
    top = torch.cat(tops).numpy()
    return LensStatistics(top, torch.cat(entropies).numpy(), torch.cat(kurtoses).numpy(), coherence(lm, top, among))


@torch.no_grad()
def coherence(lm: LanguageModel, tokens: np.ndarray, among: np.ndarray) -> np.ndarray:
    """[n] how much nearer the k tokens of every list [n, k] are to each other than tokens are in their neighbourhood.

    Mean pairwise cosine of the centred embeddings, less the mean over the tokens of the cosine with their
    `NEIGHBOURS` nearest of the token ids `among`: the local scaling of Lample et al. 2018 (arXiv 1710.04087). Without
    it lists of function words always win, since these lie in a cluster that many directions meet.
    """
    unit, k = centred_embedding(lm), tokens.shape[1]
    distinct, place = np.unique(tokens, return_inverse=True)
    density = _density(unit, distinct, among)[place.reshape(tokens.shape)].mean(-1)
    sums = torch.stack([unit[torch.from_numpy(row).long().to(unit.device)].sum(0) for row in tokens])
    return ((sums.square().sum(-1) - k) / (k * (k - 1))).cpu().numpy() - density


def _density(unit: torch.Tensor, tokens: np.ndarray, among: np.ndarray) -> np.ndarray:
    """[m] mean cosine of each of `tokens` with the nearest others of `among`; `unit` [V, d] are unit rows."""
    others = torch.from_numpy(among).long().to(unit.device)
    num, found = min(NEIGHBOURS, len(among) - 1), []
    for part in torch.from_numpy(tokens).long().to(unit.device).split(max(1, NEIGHBOUR_COSINES // len(among))):
        cosines = unit[part] @ unit[others].t()
        cosines[part[:, None] == others] = -2  # itself
        found.append(cosines.topk(num).values.mean(1).cpu())
    return torch.cat(found).numpy()


def random_token_coherence(lm: LanguageModel, k: int, num: int, seed: int, among: np.ndarray) -> np.ndarray:
    """[num] coherence of lists of k tokens drawn from `among`."""
    rng = np.random.default_rng(seed)
    return coherence(lm, np.stack([rng.choice(among, k, replace=False) for _ in range(num)]), among)


def frequent_tokens(token_ids: np.ndarray, min_count: int) -> np.ndarray:
    """Ids that occur at least `min_count` times in `token_ids`, entries below 0 left out.

    Pieces that a model hardly ever saw lie together in the embedding, and lists of them look coherent for that.
    """
    return np.flatnonzero(np.bincount(token_ids[token_ids >= 0]) >= min_count)


def chance(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """[n] share of the m `null` values, and the value itself, that are as large: the p of a permutation test."""
    below = np.searchsorted(np.sort(null), values, side="left")
    return (1 + len(null) - below) / (1 + len(null))
