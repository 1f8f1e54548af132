"""Every architecture by name. One small file each, behind the interface of `sae/model.py`; each takes every form."""

from ..config import ConfigError, DictionaryConfig, suggestion
from ..model import SparseAutoencoder
from .batchtopk import BatchTopKAutoencoder
from .gated import GatedAutoencoder
from .jumprelu import JumpReluAutoencoder
from .matryoshka import MatryoshkaAutoencoder
from .relu import ReluAutoencoder
from .topk import TopKAutoencoder

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    made.architecture: made
    for made in (
        TopKAutoencoder,
        BatchTopKAutoencoder,
        MatryoshkaAutoencoder,
        ReluAutoencoder,
        GatedAutoencoder,
        JumpReluAutoencoder,
    )
}


def architecture(name: str) -> type[SparseAutoencoder]:
    """Class of an architecture. Raises ConfigError, listing those that exist, for an unknown name."""
    if name not in ARCHITECTURES:
        raise ConfigError(
            f'unknown architecture "{name}"; there is {", ".join(ARCHITECTURES)}{suggestion(name, list(ARCHITECTURES))}'
        )
    return ARCHITECTURES[name]


def build(config: DictionaryConfig, d_in: int, d_out: int | None = None, *, seed: int = 0) -> SparseAutoencoder:
    """A freshly initialised dictionary that reads `d_in` and writes `d_out` (default: the same) coordinates."""
    dictionary = architecture(config.architecture)(config, d_in, d_out)
    dictionary.initialise(seed)
    return dictionary
