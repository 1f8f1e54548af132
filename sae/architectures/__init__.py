"""Every architecture by name. One small file each, behind the interface of `sae/model.py`; each takes every form."""

from ..comm import ALONE, Comm
from ..config import ConfigError, DictionaryConfig, suggestion
from ..model import SparseAutoencoder
from ..sharding import part_config
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


def build(
    config: DictionaryConfig, d_in: int, d_out: int | None = None, *, seed: int = 0, comm: Comm = ALONE
) -> SparseAutoencoder:
    """A freshly initialised dictionary that reads `d_in` and writes `d_out` (default: the same) coordinates.

    Where several ranks hold the latents together it has this rank's, with the values that one process gives them; the
    others are never in memory. Raises CommError where they cannot be shared out.
    """
    dictionary = architecture(config.architecture)(part_config(config, comm), d_in, d_out)
    dictionary.comm = comm
    dictionary.initialise(seed)
    return dictionary
