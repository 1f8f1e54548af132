"""Dead latents start anew from inputs that are reconstructed badly: for architectures without an auxiliary loss.

After Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling", with the rows of the present batch
as candidates. What is drawn is a function of the optimizer step alone, so that a resume draws the same.
"""

from typing import TYPE_CHECKING

import torch

from .config import ConfigError, TrainConfig
from .model import SparseAutoencoder

if TYPE_CHECKING:
    from .learner import Learner

#: Norm of a new encoder row, as a share of the mean norm of those alive.
_ENCODER_SHARE = 0.2


def check_resampling(dictionary: type[SparseAutoencoder] | SparseAutoencoder, config: TrainConfig) -> None:
    """Raises ConfigError where resampling is asked for and the architecture has another way to revive latents."""
    if config.resample_every_steps and dictionary.has_auxk:
        raise ConfigError(
            f"train.resample_every_steps: {dictionary.architecture} revives dead latents by its auxiliary loss "
            "(train.auxk_coefficient); resampling is for relu and gated, leave it at 0"
        )


def is_due(steps: int, config: TrainConfig) -> bool:
    """Whether latents are resampled after this optimizer step: never while the learning rate decays."""
    every = config.resample_every_steps
    return bool(every) and steps % every == 0 and steps <= (1 - config.decay_share) * config.num_steps


@torch.no_grad()
def resample(learner: "Learner", x: torch.Tensor, y: torch.Tensor) -> int:
    """Give every dead latent a row of the batch, drawn in proportion to its squared loss; returns how many.

    Rows x [N, d_in] and targets y [N, d_out] of the step just taken. A latent writes its row's direction, reads it at a
    fifth of the mean norm of the living encoder rows, and has no bias, no moments and no past. No row is given twice:
    dead latents beyond the number of rows wait for the next time.
    """
    dictionary, is_dead = learner.dictionary, learner.idle_tokens >= learner.config.dead_after_tokens
    chances = (y - dictionary(x)).square().sum(1).square()
    dead = is_dead.nonzero()[: int(chances.count_nonzero()), 0]
    if not len(dead) or bool(is_dead.all()):  # without a living latent there is no norm to go by
        return 0
    generator = torch.Generator().manual_seed(learner.steps)
    drawn = torch.multinomial((chances / chances.max()).cpu().double(), len(dead), generator=generator).to(x.device)
    taken_off = dictionary.encoder_b_dec
    read = x[drawn] if taken_off is None else x[drawn] - taken_off
    norm = _ENCODER_SHARE * dictionary.W_enc[~is_dead].norm(dim=1).mean()
    new = {name: torch.zeros(len(dead), device=x.device) for name in dictionary.latent_biases}
    new["W_enc"] = norm * torch.nn.functional.normalize(read, dim=1)
    new["W_dec"] = torch.nn.functional.normalize(y[drawn] - dictionary.b_dec, dim=1)
    for name, rows in new.items():
        learner.dictionary.get_parameter(name).data[dead] = rows
        for moment in learner.moments[name]:
            moment[dead] = 0
        if name in learner.averages:
            learner.averages[name][dead] = rows
    learner.idle_tokens[dead] = 0
    return len(dead)
