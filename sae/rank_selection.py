"""Selection among latents that several ranks hold: what goes over the wire is candidates, never pre-activations."""

import torch
from torch import Tensor

from saeql.kernels.sparse_matmul import SparseLatents
from saeql.kernels.topk import row_topk

from .comm import Comm


def keep_among_ranks(comm: Comm, latents: SparseLatents, k: int) -> SparseLatents:
    """Of each row's k largest on every rank [N, k] the k largest of all: those that this rank holds."""
    if comm.feature_size == 1:
        return latents
    candidates = torch.cat(comm.gather_features(latents.values), dim=1)
    at = row_topk(candidates, k)[1] - comm.feature_rank * k
    elsewhere = (at < 0) | (at >= k)
    kept = torch.zeros(len(at), k + 1, dtype=torch.bool, device=at.device)
    kept = kept.scatter_(1, at.masked_fill(elsewhere, k), True)[:, :k] & (latents.values > 0)
    width = max(1, int(kept.sum(1).max())) if len(at) else 1
    values, at = row_topk(latents.values * kept, width)
    return SparseLatents(values, latents.indices.gather(1, at), latents.d_sae)


def smallest_kept(comm: Comm, values: Tensor, k: int) -> Tensor:
    """[N, 1]: the k-th largest of each row's values [N, at most k] on all ranks."""
    padded = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)
    candidates = torch.cat(comm.gather_features(padded), dim=1)
    return row_topk(candidates, k)[0].amin(1, keepdim=True)
