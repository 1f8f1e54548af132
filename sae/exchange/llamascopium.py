"""Llamascopium (OpenMOSS): `config.json` and `sae_weights.safetensors`. Read only.

Layout in the file: `W_E` [d_in, d_sae], `b_E`, `W_D` [d_sae, d_in], `b_D`, for jumprelu the logarithm of the threshold,
and `dataset_average_activation_norm.<hook point>`; the releases before it (Llama Scope R1) have `encoder.weight`
[d_sae, d_in], `decoder.weight` [d_in, d_sae] and their biases instead.

With `norm_activation` "dataset-wise" the weights work on activations scaled to an average norm of sqrt(d_in); the scale
is folded in, and latents keep the size that the library's own `encode` gives them. With
`sparsity_include_decoder_norm` a latent is compared after multiplication with its decoder row's norm: for jumprelu the
threshold is divided by that norm (the latents stay), for top-k the norms are folded into both weights (latents come out
multiplied by them).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .files import Config, TensorFile, read_config, read_safetensors
from .weights import DictionaryWeights, ExchangeError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae_weights.safetensors"
ACTIVATIONS = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk", "batchtopk": "batchtopk"}
LOG_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
NORM_PREFIX = "dataset_average_activation_norm."


def read(folder: Path) -> DictionaryWeights:
    """A dictionary of the folder. Raises ExchangeError naming file and field."""
    config = read_config(folder / CONFIG_FILE)
    config.choice("sae_type", {"sae": "sae"}, "sae")
    file = read_safetensors(folder / WEIGHTS_FILE)
    d_in = config.get("d_model", int)
    d_sae = config.get("d_sae", int, 0) or round(d_in * config.get("expansion_factor", float))
    stored = [name for name in file.data if name.startswith(NORM_PREFIX)]
    if config.get("norm_activation", str, "dataset-wise") != "dataset-wise":
        stored = []  # the library then writes them uninitialised
    norms = {name.removeprefix(NORM_PREFIX): float(file.take(name, ())) for name in stored}
    log_threshold = None
    if config.choice("act_fn", ACTIVATIONS, "relu") == "jumprelu":
        name = next((n for n in LOG_THRESHOLDS if n in file), LOG_THRESHOLDS[0])
        log_threshold = file.take(name, (d_sae,))
    threshold = None if log_threshold is None else log_threshold.exp()
    return scaled_dictionary(config, file, (d_in, d_sae), norms, threshold)


def scaled_dictionary(
    config: Config, file: TensorFile, sizes: tuple[int, int], norms: Mapping[str, float], threshold: Any
) -> DictionaryWeights:
    """A dictionary of activations scaled by `norms` (average norm at a hook point), folded to work on raw ones.

    `threshold` [d_sae] or None is compared with pre-activations times decoder norm if the config says so. Raises
    ExchangeError naming file and field.
    """
    d_in, d_sae = sizes
    config.require("use_glu_encoder", False)
    architecture = config.choice("act_fn", ACTIVATIONS, "relu")
    tensors = _tensors(file, d_in, d_sae, config.get("use_decoder_bias", bool, True))
    by_norm = config.get("sparsity_include_decoder_norm", bool, True)
    if threshold is not None:
        rows = tensors["W_dec"].norm(dim=1)
        never = torch.full_like(rows, torch.finfo(torch.float32).max)  # a latent of norm 0 passes no threshold
        tensors["threshold"] = torch.where(rows > 0, threshold / rows, never) if by_norm else threshold
    hooks = [config.get("hook_point_in", str, "in")]
    hooks.append(config.get("hook_point_out", str, hooks[0]))
    metadata = {"model_name": config.data.get("model_name"), "hook_name": config.data.get("hook_point_in")}
    if hooks[1] != hooks[0]:
        metadata["hook_name_out"] = hooks[1]
    weights = DictionaryWeights(
        architecture=architecture,
        form="autoencoder" if hooks[0] == hooks[1] else "transcoder",
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        k=config.get("top_k", int) if architecture in ("topk", "batchtopk") else None,
        tensors=tensors,
        subtract_b_dec=config.get("apply_decoder_bias_to_pre_encoder", bool, False),
        rescale_by_decoder_norm=by_norm and architecture in ("topk", "batchtopk"),
        input_scaling=_scale(config, norms, hooks[0], "in", d_in),
        output_scaling=_scale(config, norms, hooks[1], "out", d_in),
        metadata={name: value for name, value in metadata.items() if value is not None},
    )
    return weights.validate(file.path).folded(file.path)


def _tensors(file: TensorFile, d_in: int, d_sae: int, use_decoder_bias: bool) -> dict[str, torch.Tensor]:
    new = "W_E" in file or "encoder.weight" not in file
    if new:
        tensors = {"W_enc": file.take("W_E", (d_in, d_sae), transpose=True), "W_dec": file.take("W_D", (d_sae, d_in))}
    else:
        tensors = {
            "W_enc": file.take("encoder.weight", (d_sae, d_in)),
            "W_dec": file.take("decoder.weight", (d_in, d_sae), transpose=True),
        }
    tensors["b_enc"] = file.take("b_E" if new else "encoder.bias", (d_sae,))
    tensors["b_dec"] = torch.zeros(d_in)
    if use_decoder_bias:
        tensors["b_dec"] = file.take("b_D" if new else "decoder.bias", (d_in,))
    return tensors


def _scale(config: Config, norms: Mapping[str, float], hook: str, side: str, d_in: int) -> float | None:
    """Factor that brings activations of a hook point to an average norm of sqrt(d_in)."""
    kind = config.get("norm_activation", str, "dataset-wise")
    if kind == "inference":
        return None
    if kind != "dataset-wise":
        raise ExchangeError(f"{config.path}: norm_activation {kind!r} depends on every row and cannot be folded")
    norm = norms.get(hook, norms.get(side))
    if norm is None or not (math.isfinite(norm) and norm > 0):
        raise ExchangeError(f"{config.path}: norm_activation is dataset-wise, but the average norm at {hook} is {norm}")
    return math.sqrt(d_in) / norm
