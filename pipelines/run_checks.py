"""What a configuration must be before a run directory is made for it: a mistake found later would stay in there."""

from saeql.sae.architectures import architecture
from saeql.sae.frozen import check_frozen
from saeql.sae.hook_points import resolve
from saeql.sae.resample import check_resampling

from .config import RunConfig
from .dictionaries import specify
from .models import load_skeleton
from .text_sources import check_place


def check_training(config: RunConfig) -> None:
    """Raises ConfigError where dictionary and training do not go together, or where it reads what is not harvested."""
    kind = specify(config.dictionary, config.model, config.seed).config.architecture
    check_resampling(architecture(kind), config.train)
    check_frozen(config.dictionary, config.train)


def check_inputs(config: RunConfig) -> None:
    """Whether model, hook points and text are there; of the model only its configuration is read.

    Raises CorpusError for a missing text, ModelError for a missing model, HookPointError for a hook point that the
    model does not have.
    """
    for source in config.corpus.sources:
        check_place(source)
    whole = load_skeleton(config.model)
    for name in config.model.hook_points:
        resolve(whole, name)
