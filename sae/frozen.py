"""Weights that training leaves where they started, and the decoder that may not leave its start by far.

Baselines that a trained dictionary has to beat: Korznikov et al. 2026, "Sanity Checks for Sparse Autoencoders", arXiv
2602.14111. Frozen are the rows of a weight; biases and thresholds learn.
"""

import torch

from .config import ConfigError, DictionaryConfig, TrainConfig

#: Least cosine of a decoder row with its start where `dictionary.freeze` is "soft_decoder".
SOFT_COSINE = 0.8
_WEIGHTS = {"none": (), "soft_decoder": (), "decoder": ("W_dec",), "encoder": ("W_enc",)}


def frozen_weights(freeze: str) -> frozenset[str]:
    """Names of the weights that a value of `dictionary.freeze` keeps from learning, where something else learns."""
    return frozenset(_WEIGHTS[freeze])


def check_frozen(config: DictionaryConfig, train: TrainConfig) -> None:
    """Raises ConfigError where a dictionary is frozen and its training would overwrite rows all the same."""
    if config.freeze != "none" and train.resample_every_steps:
        raise ConfigError(
            f'train.resample_every_steps gives dead latents new rows, which dictionary.freeze = "{config.freeze}" '
            "forbids: leave one of them out"
        )


@torch.no_grad()
def keep_near(rows: torch.Tensor, start: torch.Tensor, cosine: float = SOFT_COSINE) -> None:
    """Turn unit rows [n, d], in place, that point too far from the unit rows `start` back to exactly that cosine.

    A row keeps the direction in which it left: it is put on the edge of the cone, in the plane of itself and its start.
    """
    cosines = torch.linalg.vecdot(rows, start)
    far = (cosines < cosine).nonzero()[:, 0]
    if not len(far):
        return
    centre = start[far]
    away = torch.nn.functional.normalize(rows[far] - cosines[far, None] * centre, dim=1, eps=1e-12)
    rows[far] = torch.nn.functional.normalize(cosine * centre + (1 - cosine**2) ** 0.5 * away, dim=1)
