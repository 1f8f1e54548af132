"""Dictionaries that are not trained (`dictionary.freeze = "all"`): their thresholds, from the stored train rows."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from saeql.sae.architectures.jumprelu import JumpReluAutoencoder
from saeql.sae.comm import CommError
from saeql.sae.config import DictionaryConfig
from saeql.sae.files import SPARSITY_FILE, DictionaryError
from saeql.sae.match_rates import match_rates
from saeql.sae.trainer import Trainer

from .dictionaries import DictionarySpec
from .harvest import open_source
from .progress import progress

if TYPE_CHECKING:
    from .run import Run

#: Rows read at once.
_BATCH_TOKENS = 4096


def fit_fixed(run: "Run", trainer: Trainer, specs: Sequence[DictionarySpec], device: torch.device) -> None:
    """Set the thresholds of those of `specs` that nothing is trained of; a trainer holds them, input measured.

    Raises CommError with several ranks, DictionaryError where the dictionary that rates come from was not indexed.
    """
    learners = {learner.name: learner for learner in trainer.learners}
    for spec in specs:
        learner = learners[spec.name]
        if not learner.is_fixed:
            continue
        if trainer.comm.size > 1:
            raise CommError(f'{spec.name}: dictionary.freeze = "all" works in one process only')
        dictionary, scaling = learner.dictionary, trainer.scaling
        assert isinstance(dictionary, JumpReluAutoencoder) and scaling is not None
        widths = list(trainer.source.widths)
        source = open_source(run.activations, "train", run.harvest_info, widths, _BATCH_TOKENS, device)
        rates = firing_rates(spec.config)
        with progress("thresholds", None, "tok") as advance:

            def batches(source=source, learner=learner, scaling=scaling, advance=advance) -> Iterable[torch.Tensor]:
                for batch in source.batches():
                    yield scaling.apply(batch.acts)[:, learner.reads]
                    advance(len(batch.acts))

            match_rates(dictionary, rates, batches, source.num_rows)


def firing_rates(config: DictionaryConfig) -> torch.Tensor:
    """Share of rows on which every latent is to fire, [d_sae]: those of `rates_from`, else k / d_sae each.

    Of a dictionary of another size, as many of its rates are taken, evenly spaced in order of size.
    Raises DictionaryError where they are not known.
    """
    if not config.rates_from:
        return torch.full((config.d_sae,), config.k / config.d_sae)
    file = Path(config.rates_from) / SPARSITY_FILE
    if not file.exists():
        raise DictionaryError(
            f"dictionary.rates_from: {config.rates_from} has no {SPARSITY_FILE}, which `saeql index` writes"
        )
    # log10(density + 1e-10), as SAELens has it
    rates = (10 ** load_file(file)["sparsity"].double() - 1e-10).clamp(0, 1)
    rates = torch.where(rates < 1e-9, 0.0, rates)
    if len(rates) == config.d_sae:
        return rates
    at = torch.linspace(0, len(rates) - 1, config.d_sae, dtype=torch.float64).round().long()
    return rates.sort().values[at]
