"""Every architecture by name. One small file each, behind the interface of `sae/model.py`."""

from ..config import ConfigError, DictionaryConfig, suggestion
from ..model import SparseAutoencoder
from .topk import TopKAutoencoder

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {"topk": TopKAutoencoder}


def architecture(name: str) -> type[SparseAutoencoder]:
    """Class of an architecture. Raises ConfigError, listing those that exist, for an unknown name."""
    if name not in ARCHITECTURES:
        raise ConfigError(
            f'unknown architecture "{name}"; there is {", ".join(ARCHITECTURES)}{suggestion(name, list(ARCHITECTURES))}'
        )
    return ARCHITECTURES[name]


def build(config: DictionaryConfig, d_in: int, *, seed: int = 0) -> SparseAutoencoder:
    """A freshly initialised dictionary for activations of width `d_in`."""
    dictionary = architecture(config.architecture)(config, d_in)
    dictionary.initialise(seed)
    return dictionary
