"""A dictionary in parts: every rank of a mesh holds some of its latents."""

from dataclasses import replace

import torch

from .comm import Comm, CommError
from .config import DictionaryConfig
from .model import SparseAutoencoder


def part_config(config: DictionaryConfig, comm: Comm) -> DictionaryConfig:
    """The configuration of this rank's latents of a dictionary; the same one where nothing is shared out.

    Raises CommError where the latents cannot be shared out evenly, or a rank would hold fewer than k.
    """
    own = comm.shard(config.d_sae)
    d_sae = own.stop - own.start
    if comm.feature_size > 1 and config.k > d_sae:
        raise CommError(
            f"dictionary.k {config.k} is more than the {d_sae} latents of a shard: use fewer train.feature_shards"
        )
    return replace(config, d_sae=d_sae)


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
