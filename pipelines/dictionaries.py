"""Which dictionaries a run trains: their configuration, seed, and the hook points that they read and write."""

from dataclasses import dataclass, replace
from pathlib import Path

from saeql.sae.architectures import build
from saeql.sae.comm import ALONE, Comm
from saeql.sae.config import ConfigError, DictionaryConfig, suggestion
from saeql.sae.convert import from_weights
from saeql.sae.exchange import read
from saeql.sae.files import CONFIG_FILE, load_dictionary, read_config
from saeql.sae.model import SparseAutoencoder
from saeql.sae.trainer import Places

from .models import ModelConfig

SWEEP_FOLDER = "sweep"
_FROZEN_NAMES = {
    "decoder": "frozen_decoder",
    "soft_decoder": "soft_frozen",
    "encoder": "frozen_encoder",
    "all": "fixed",
}


@dataclass(frozen=True)
class DictionarySpec:
    """One dictionary to be trained. `reads` and `writes` are hook points; several make a crosscoder."""

    name: str
    config: DictionaryConfig
    seed: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def places(self) -> Places:
        """The same for the trainer."""
        return Places(self.reads, self.writes)


def dictionary_name(config: DictionaryConfig) -> str:
    """Name of a dictionary's folder and of its rows in the store."""
    form = "" if config.form == "autoencoder" else f"_{config.form}"
    end = "" if config.freeze == "none" else f"_{_FROZEN_NAMES[config.freeze]}"
    end += "" if config.start == "random" else f"_{config.start}"
    return f"{config.architecture}{form}_{config.d_sae}_k{config.k}{end}"


def dictionary_homes(run: Path) -> tuple[Path, Path]:
    """Folders of a run directory in which dictionaries lie: its own, and those of its sweep."""
    return run / "dictionaries", run / SWEEP_FOLDER / "dictionaries"


def load_any(path: Path) -> SparseAutoencoder:
    """A dictionary of ours or of another library. Raises DictionaryError or ExchangeError where it cannot be read."""
    is_ours = (path / CONFIG_FILE).exists() and "saeql" in (read_config(path).get("metadata") or {})
    return load_dictionary(path) if is_ours else from_weights(read(path))


def specify(config: DictionaryConfig, model: ModelConfig, seed: int, name: str | None = None) -> DictionarySpec:
    """Settle what a dictionary reads and writes. Raises ConfigError where that does not fit its form or the harvest."""
    several = config.form == "crosscoder"
    reads = config.reads or (model.hook_points if several else (model.hook_point,))
    if config.form in ("transcoder", "skip_transcoder"):
        writes = config.writes
        if len(writes) != 1:
            raise ConfigError(f"dictionary.writes must name one hook point for a {config.form}, got {list(writes)}")
    else:
        writes = reads
        if config.writes and config.writes != reads:
            raise ConfigError(f"dictionary.writes: form {config.form} writes what it reads, {list(reads)}")
    if not several and len(reads) != 1:
        raise ConfigError(f"dictionary.reads must name one hook point for form {config.form}, got {list(reads)}")
    for hook_point in (*reads, *writes):
        if hook_point not in model.hook_points:
            raise ConfigError(
                f"dictionary reads or writes {hook_point!r}, which is not harvested; model.hook_point and "
                f"model.more_hook_points are {', '.join(model.hook_points)}{suggestion(hook_point, model.hook_points)}"
            )
    settled = replace(config, reads=reads, writes=writes)
    return DictionarySpec(name or dictionary_name(config), settled, seed, reads, writes)


def start_dictionary(spec: DictionarySpec, d_in: int, d_out: int, comm: Comm = ALONE) -> SparseAutoencoder:
    """The dictionary as its training starts: freshly initialised, or the one of `start_from`; the latents that this
    rank of `comm` holds.

    Raises DictionaryError where that cannot be read, ConfigError where it is of another kind or size, CommError where
    its latents cannot be shared out.
    """
    fresh = build(spec.config, d_in, d_out, seed=spec.seed, comm=comm)
    source = spec.config.start_from
    if not source:
        return fresh
    loaded = load_dictionary(source, comm)
    whole = replace(loaded.config, d_sae=loaded.d_sae * comm.feature_size)
    for field in ("architecture", "form", "d_sae", "k"):
        mine, theirs = getattr(spec.config, field), getattr(whole, field)
        if mine != theirs:
            raise ConfigError(f"dictionary.start_from {source} has {field} {theirs!r}, this asks for {mine!r}")
    if (loaded.d_in, loaded.d_out) != (d_in, d_out):
        raise ConfigError(
            f"dictionary.start_from {source} reads {loaded.d_in} and writes {loaded.d_out} coordinates, "
            f"the hook points have {d_in} and {d_out}"
        )
    fresh.load_state_dict(loaded.state_dict())
    return fresh
