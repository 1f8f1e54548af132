"""A dictionary on disk: `cfg.json` and `sae_weights.safetensors` with the names that SAELens 6 reads.

It works on raw activations: scaling and centring are folded into the weights before saving. Our own keys stand under
`metadata.saeql`. Where SAELens has no class for an architecture and form, its name here is `<architecture>_<form>`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .architectures import architecture
from .comm import ALONE, Comm, CommError
from .config import ConfigError, DictionaryConfig, from_dict, to_dict
from .exchange.files import write_config, write_safetensors
from .model import SparseAutoencoder
from .sharding import part_config

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"
#: SAELens drops all metadata of a dictionary that does not name a version of at least 6.
SAELENS_VERSION = "6.54.12"
#: Our architecture -> SAELens's name by form.
_NAMES = {
    "autoencoder": {
        "topk": "topk",
        "relu": "standard",
        "gated": "gated",
        "jumprelu": "jumprelu",
        "batchtopk": "jumprelu",
    },
    "transcoder": {"relu": "transcoder", "jumprelu": "jumprelu_transcoder", "batchtopk": "jumprelu_transcoder"},
    "skip_transcoder": {"relu": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"},
}
_OURS = {"topk": "topk", "standard": "relu", "gated": "gated", "jumprelu": "jumprelu"}


class DictionaryError(ValueError):
    """A dictionary folder is missing, damaged, or its config and weights disagree; the message names file and field."""


def saelens_architecture(config: DictionaryConfig) -> str:
    """SAELens's name for an architecture and form, or `<architecture>_<form>` where it has none."""
    kind = config.architecture
    if kind == "matryoshka":
        kind = config.matryoshka_selection
    return _NAMES.get(config.form, {}).get(kind, f"{config.architecture}_{config.form}")


def saelens_config(dictionary: SparseAutoencoder) -> dict[str, Any]:
    """The keys SAELens 6 reads, and ours under metadata."""
    name = saelens_architecture(dictionary.config)
    ours = {**dictionary.metadata.get("saeql", {}), "dictionary": to_dict(dictionary.config)}
    config = {
        "architecture": name,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.reads_what_it_writes,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if name.startswith("topk"):
        config |= {"k": dictionary.config.k, "rescale_acts_by_decoder_norm": False}
    if not dictionary.reads_what_it_writes:
        config["d_out"] = dictionary.d_out
    config["metadata"] = {"sae_lens_version": SAELENS_VERSION, **dictionary.metadata, "saeql": ours}
    return config


def save_dictionary(dictionary: SparseAutoencoder, folder: str | Path) -> Path:
    """Write the dictionary folder: weights and configuration."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    extra = dictionary.extra_tensors()
    weights = {"W_enc": dictionary.W_enc.t(), "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec, **extra}
    if "b_gate" not in extra:
        weights["b_enc"] = dictionary.b_enc
    if dictionary.W_skip is not None:
        weights["W_skip"] = dictionary.W_skip
    write_safetensors(folder / WEIGHTS_FILE, {name: tensor.float() for name, tensor in weights.items()})
    write_config(folder / CONFIG_FILE, saelens_config(dictionary))
    return folder


def save_density(folder: str | Path, density: torch.Tensor) -> None:
    """Write how often latents fire, `density` [d_sae] (share of rows), beside a dictionary, as SAELens does: log10."""
    write_safetensors(Path(folder) / SPARSITY_FILE, {"sparsity": torch.log10(density.float() + 1e-10)})


def load_dictionary(folder: str | Path, comm: Comm = ALONE) -> SparseAutoencoder:
    """Read a dictionary folder; of one that several ranks hold together this rank's latents.

    Raises DictionaryError naming the file and field that is wrong, CommError where latents cannot be shared out.
    """
    folder = Path(folder)
    config = read_config(folder)
    dictionary = _from_config(folder, config, comm)
    weights, file = _read_safetensors(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE
    d_in, d_out, d_sae = dictionary.d_in, dictionary.d_out, dictionary.d_sae * comm.feature_size
    extra = dict.fromkeys(dictionary.extra_tensors(), (d_sae,))
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), **extra}
    if "b_gate" not in extra:
        shapes["b_enc"] = (d_sae,)
    if dictionary.W_skip is not None:
        shapes["W_skip"] = (d_out, d_in)
    for name, shape in shapes.items():
        if name not in weights:
            raise DictionaryError(f"{file} has no tensor {name}")
        if tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape)
            raise DictionaryError(f"{file}: {name} has shape {found}, {CONFIG_FILE} says {shape}")
        if name not in ("b_dec", "W_skip"):  # a view: the file is mapped
            own = comm.shard(d_sae)
            weights[name] = weights[name][:, own] if name == "W_enc" else weights[name][own]
        if not torch.isfinite(weights[name]).all():
            raise DictionaryError(f"{file}: {name} holds values that are not finite")
    weights = {name: weights[name].float() for name in shapes}
    with torch.no_grad():
        dictionary.load_extra(weights)
        dictionary.W_enc.copy_(weights["W_enc"].t())
        for name in {"b_enc", "W_dec", "b_dec", "W_skip"} & weights.keys():
            getattr(dictionary, name).copy_(weights[name])
    dictionary.metadata = {k: v for k, v in config.get("metadata", {}).items() if k != "sae_lens_version"}
    return dictionary


def read_config(folder: str | Path) -> dict[str, Any]:
    """cfg.json of a dictionary folder. Raises DictionaryError where it is missing or not a JSON object."""
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DictionaryError(f"no dictionary in {folder}: {CONFIG_FILE} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DictionaryError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} is not a JSON object")
    return config


def _from_config(folder: Path, config: dict[str, Any], comm: Comm) -> SparseAutoencoder:
    path = folder / CONFIG_FILE
    for key in ("architecture", "d_in", "d_sae"):
        if key not in config:
            raise DictionaryError(f'{path} has no key "{key}"')
    expected = {"normalize_activations": "none", "reshape_activations": "none", "rescale_acts_by_decoder_norm": False}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise DictionaryError(f"{path}: {key} = {config[key]!r} is not supported, only {value!r}")
    try:
        settings = _settings(config)
        made = architecture(settings.architecture)(
            part_config(settings, comm), int(config["d_in"]), int(config.get("d_out", config["d_in"]))
        )
        made.comm = comm
    except CommError:
        raise
    except (ConfigError, TypeError, ValueError) as error:
        raise DictionaryError(f"{path}: {error}") from None
    if bool(config.get("apply_b_dec_to_input", made.reads_what_it_writes)) != made.reads_what_it_writes:
        raise DictionaryError(f"{path}: apply_b_dec_to_input does not fit the form {settings.form}")
    return made


def _settings(config: dict[str, Any]) -> DictionaryConfig:
    """Ours where we wrote it, else what SAELens's own keys say."""
    shared = {"d_sae": int(config["d_sae"]), **({"k": int(config["k"])} if "k" in config else {})}
    ours = config.get("metadata", {}).get("saeql", {}).get("dictionary")
    if ours is not None:
        made = from_dict(DictionaryConfig, {**ours, **shared})
        if saelens_architecture(made) != config["architecture"]:
            architecture(config["architecture"])  # names it where it is unknown
            raise ConfigError(f"architecture {config['architecture']!r} and metadata.saeql.dictionary disagree")
        return made
    name = config["architecture"]
    return from_dict(DictionaryConfig, {"architecture": _OURS.get(name, name), **shared})


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DictionaryError(f"{path} is missing") from None
    except SafetensorError as error:
        raise DictionaryError(f"{path} is damaged: {error}") from None
