"""Llama Scope (arXiv 2410.20526): `hyperparams.json` and `checkpoints/final.safetensors`. Read only.

Layout in the file: `encoder.weight` [d_sae, d_in], `encoder.bias`, `decoder.weight` [d_in, d_sae], `decoder.bias`; the
config has one `jump_relu_threshold` for all latents and the average norms of activations in and out.

The weights work on activations scaled to an average norm of sqrt(d_in), but the threshold was measured after that scale
had been folded in and the decoder rows had been brought to norm 1, so it is in units of the raw output: here it is
multiplied by sqrt(d_in) / norm and divided by the row's norm. (SAELens multiplies likewise, by the factor of the input,
and leaves the rows' norms out: the same where rows have norm 1 and both hook points are one.)
"""

import math
from pathlib import Path

import torch

from .files import read_config, read_safetensors
from .llamascopium import scaled_dictionary
from .weights import DictionaryWeights, ExchangeError

CONFIG_FILE = "hyperparams.json"
WEIGHTS_FILES = ("checkpoints/final.safetensors", "final.safetensors")


def read(folder: Path) -> DictionaryWeights:
    """A dictionary of the folder. Raises ExchangeError naming file and field."""
    config = read_config(folder / CONFIG_FILE)
    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), folder / WEIGHTS_FILES[0])
    file = read_safetensors(path)
    d_in = config.get("d_model", int)
    d_sae = config.get("d_sae", int, 0) or d_in * config.get("expansion_factor", int)
    section = config.section("dataset_average_activation_norm", {})
    norms = {side: section.get(side, float) for side in ("in", "out") if side in section.data}
    threshold = None
    if config.get("act_fn", str, "jumprelu") == "jumprelu":
        scale = 1.0
        if config.get("norm_activation", str, "dataset-wise") == "dataset-wise":
            out = norms.get("out", norms.get("in"))
            if out is None or out <= 0:
                raise ExchangeError(f"{config.path}: dataset_average_activation_norm.out is {out}")
            scale = math.sqrt(d_in) / out
        threshold = torch.full((d_sae,), config.get("jump_relu_threshold", float) * scale)
    return scaled_dictionary(config, file, (d_in, d_sae), norms, threshold)
