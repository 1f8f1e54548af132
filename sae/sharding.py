"""A dictionary in parts: every rank of a mesh holds some of its latents."""

from dataclasses import replace

import torch

from .comm import Comm, CommError
from .model import SparseAutoencoder


@torch.no_grad()
def shard_dictionary(whole: SparseAutoencoder, comm: Comm) -> SparseAutoencoder:
    """This rank's latents of a dictionary that every rank has made alike; the whole one where nothing is shared out.

    Raises CommError where the latents cannot be shared out evenly, or a rank would hold fewer than k.
    """
    if comm.feature_size == 1:
        return whole
    own = comm.shard(whole.d_sae)
    d_sae = own.stop - own.start
    if whole.config.k > d_sae:
        raise CommError(
            f"dictionary.k {whole.config.k} is more than the {d_sae} latents of a shard: use fewer train.feature_shards"
        )
    part = type(whole)(replace(whole.config, d_sae=d_sae), whole.d_in, whole.d_out)
    for name, tensor in part.state_dict().items():
        full = whole.state_dict()[name]
        tensor.copy_(full[own] if name in whole.by_latent else full)
    return part


@torch.no_grad()
def gather_dictionary(part: SparseAutoencoder) -> SparseAutoencoder | None:
    """The whole dictionary of the parts that the ranks hold; where there are several, in the first rank's host memory.

    None on the others. No rank's device ever holds more than one whole tensor.
    """
    comm = part.comm
    if comm.feature_size == 1:
        return part if comm.is_first else None
    whole = None
    if comm.is_first:
        whole = type(part)(replace(part.config, d_sae=part.d_sae * comm.feature_size), part.d_in, part.d_out)
    for name, own in part.state_dict().items():
        full = torch.cat(comm.gather_features(own)) if name in part.by_latent else own
        if whole is not None:
            whole.state_dict()[name].copy_(full)
    return whole
