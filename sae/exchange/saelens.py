"""SAELens 6: `cfg.json` and `sae_weights.safetensors`; also the keys of its versions before 6.

Layout in the file: `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_out], `W_skip` [d_out, d_in]. SAELens has no inference
class for batchtopk and matryoshka: both are saved as jumprelu, by SAELens and by us, with a note in the metadata.
Checkpoints of a training run (`topk_threshold`, `log_threshold`, `activation_scaler.json`) are read too.
"""

from pathlib import Path
from typing import Any

import torch

from .files import Config, TensorFile, read_config, read_safetensors, write_config, write_safetensors
from .weights import BATCH_ARCHITECTURES, GATED_VECTORS, DictionaryWeights, ExchangeError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"
#: SAELens drops all metadata of a dictionary that does not name a version of at least 6.
VERSION = "6.54.12"
#: Its architectures as ours: (architecture, form).
KINDS = {
    "standard": ("relu", "autoencoder"),
    "gated": ("gated", "autoencoder"),
    "topk": ("topk", "autoencoder"),
    "jumprelu": ("jumprelu", "autoencoder"),
    "batchtopk": ("batchtopk", "autoencoder"),
    "matryoshka_batchtopk": ("matryoshka", "autoencoder"),
    "transcoder": ("relu", "transcoder"),
    "skip_transcoder": ("relu", "skip_transcoder"),
    "jumprelu_transcoder": ("jumprelu", "transcoder"),
    "jumprelu_skip_transcoder": ("jumprelu", "skip_transcoder"),
}
#: Keys of the config, before version 6, that say where the dictionary comes from; later they are under `metadata`.
OLD_METADATA = (
    "model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_name_out", "hook_layer",
    "hook_head_index", "hook_head_index_out", "hf_hook_name", "hf_hook_name_out", "context_size", "prepend_bos",
    "seqpos_slice", "exclude_special_tokens", "dataset_path", "neuronpedia_id",
)  # fmt: skip
OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def read(folder: Path, *, allow_layer_norm: bool) -> DictionaryWeights:
    """A dictionary of the folder. Raises ExchangeError naming file and field."""
    config = read_config(folder / CONFIG_FILE)
    metadata = dict(config.section("metadata", {}).data)
    version = metadata.get("sae_lens_version") or config.data.get("sae_lens_version")
    if _major(version) < 6:
        config = _from_before_6(config)
        metadata = {key: config.data[key] for key in OLD_METADATA if config.data.get(key) is not None} | metadata
    file = read_safetensors(folder / WEIGHTS_FILE)
    architecture, form = config.choice("architecture", KINDS)
    d_in, d_sae = config.get("d_in", int), config.get("d_sae", int)
    d_out = d_in if form == "autoencoder" else config.get("d_out", int)
    k = None
    if architecture == "topk":
        k = config.get("k", int)
    elif architecture in BATCH_ARCHITECTURES:
        k = round(config.get("k", float))
    metadata = {key: value for key, value in metadata.items() if key != "sae_lens_version"}
    if config.get("reshape_activations", str, "none") != "none":
        metadata["reshape_activations"] = config.data["reshape_activations"]
    if architecture == "matryoshka" and "matryoshka_widths" in config.data:
        metadata["matryoshka_widths"] = config.data["matryoshka_widths"]
    weights = DictionaryWeights(
        architecture=architecture,
        form=form,
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        k=k,
        tensors=_tensors(config, file, architecture, form, (d_in, d_out, d_sae)),
        subtract_b_dec=config.get("apply_b_dec_to_input", bool, form == "autoencoder"),
        rescale_by_decoder_norm=config.get("rescale_acts_by_decoder_norm", bool, False),
        metadata=metadata,
        **_normalisation(folder, config, allow_layer_norm),
    )
    return weights.validate(config.path).folded(file.path)


def _major(version: Any) -> int:
    """Major number of a version; without one the file is from before versions were written."""
    head = str(version or "0").split(".")[0]
    return int(head) if head.isdigit() else 0


def _from_before_6(config: Config) -> Config:
    """The config of an older version under the keys of version 6."""
    data = {OLD_NAMES.get(key, key): value for key, value in config.data.items()}
    activation = data.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise ExchangeError(f"{config.path}: activation_fn {activation!r} cannot be represented, only relu and topk")
    data["architecture"] = data.get("architecture") or "standard"
    if activation == "topk":
        settings = Config(config.path, data).section("activation_fn_kwargs", {})
        data["architecture"] = "topk"
        data["k"] = data["k"] if data.get("k") is not None else settings.get("k", int)
    if isinstance(data.get("normalize_activations"), bool):
        data["normalize_activations"] = "expected_average_only_in" if data["normalize_activations"] else "none"
    if "reshape_activations" not in data and "hook_z" in str(data.get("hook_name", "")):
        data["reshape_activations"] = "hook_z"
    return Config(config.path, data)


def _normalisation(folder: Path, config: Config, allow_layer_norm: bool) -> dict[str, Any]:
    """Fields of the container for `normalize_activations`."""
    kind = config.get("normalize_activations", str, "none")
    if kind == "none":
        return {}
    if kind == "layer_norm" and allow_layer_norm:
        return {"input_norm": "layer_norm"}
    if kind == "layer_norm":
        raise ExchangeError(
            f'{config.path}: normalize_activations = "layer_norm" depends on every row and cannot be folded into the '
            "weights; read it with allow_layer_norm=True and keep the input_norm of what you get"
        )
    if kind == "expected_average_only_in":
        if not (folder / SCALER_FILE).exists():
            raise ExchangeError(
                f"{config.path}: normalize_activations = {kind!r} without its factor ({SCALER_FILE} is missing): the "
                "scale of the activations is unknown; save it with the factor folded in"
            )
        return {"input_scaling": read_config(folder / SCALER_FILE).get("scaling_factor", float)}
    raise ExchangeError(f"{config.path}: normalize_activations = {kind!r} cannot be represented; fold it before saving")


def _tensors(
    config: Config, file: TensorFile, architecture: str, form: str, sizes: tuple[int, int, int]
) -> dict[str, torch.Tensor]:
    d_in, d_out, d_sae = sizes
    tensors = {
        "W_enc": file.take("W_enc", (d_in, d_sae), transpose=True),
        "W_dec": file.take("W_dec", (d_sae, d_out)),
        "b_dec": file.take("b_dec", (d_out,)),
    }
    for name in GATED_VECTORS if architecture == "gated" else ("b_enc",):
        tensors[name] = file.take(name, (d_sae,))
    if architecture in ("jumprelu", *BATCH_ARCHITECTURES):
        if "threshold" in file:
            tensors["threshold"] = file.take("threshold", (d_sae,))
        elif "log_threshold" in file:
            tensors["threshold"] = file.take("log_threshold", (d_sae,)).exp()
        elif "topk_threshold" in file:
            tensors["threshold"] = file.take("topk_threshold", ()).repeat(d_sae)
        else:
            tensors["threshold"] = file.take("threshold", (d_sae,))
    if form == "skip_transcoder":
        tensors["W_skip"] = file.take("W_skip", (d_out, d_in))
    if "scaling_factor" in file:
        factor = file.take("scaling_factor", (d_sae,))
        if not (factor == 1).all() and not config.get("finetuning_scaling_factor", bool, False):
            raise ExchangeError(f"{file.path}: scaling_factor is set, but {CONFIG_FILE} does not say that it applies")
        tensors["W_dec"] = tensors["W_dec"] * factor[:, None]
    return tensors


def write(weights: DictionaryWeights, folder: Path) -> None:
    """Write both files. Raises ExchangeError for what SAELens has no class for."""
    saved = weights
    if weights.architecture != "topk" or weights.input_scaling or weights.output_scaling:
        saved = weights.folded(folder)  # only its topk class rescales by the decoder's norms
    kind = (saved.architecture, saved.form)
    metadata = dict(saved.metadata)
    if saved.architecture in BATCH_ARCHITECTURES:
        if "threshold" not in saved.tensors:
            raise ExchangeError(f"{folder}: SAELens saves {saved.architecture} as jumprelu, which needs a threshold")
        metadata |= {"trained_architecture": saved.architecture, "trained_k": saved.k}
        kind = ("jumprelu", saved.form)
    names = {kind: name for name, kind in KINDS.items()}
    if kind not in names:
        raise ExchangeError(f"{folder}: SAELens has no class for a {saved.architecture} {saved.form}")
    if saved.form != "autoencoder":
        saved = saved.with_subtraction(False)
    config: dict[str, Any] = {
        "architecture": names[kind],
        "d_in": saved.d_in,
        "d_sae": saved.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": saved.subtract_b_dec,
        "normalize_activations": saved.input_norm,
        "reshape_activations": metadata.pop("reshape_activations", "none"),
        "metadata": {"sae_lens_version": VERSION, **metadata},
    }
    if saved.architecture == "topk":
        config |= {"k": saved.k, "rescale_acts_by_decoder_norm": saved.rescale_by_decoder_norm}
    if saved.form != "autoencoder":
        config["d_out"] = saved.d_out
    write_safetensors(folder / WEIGHTS_FILE, {**saved.tensors, "W_enc": saved.tensors["W_enc"].t()})
    write_config(folder / CONFIG_FILE, config)
