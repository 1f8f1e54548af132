"""Gemma Scope 2: `config.json` and `params.safetensors`, jumprelu autoencoders and (skip) transcoders. Read only.

Layout in the file: `w_enc` [d_in, d_sae], `w_dec` [d_sae, d_out], `b_enc`, `b_dec`, `threshold`, and for transcoders
with an affine connection `affine_skip_connection` [d_in, d_out]. The encoder reads x itself.
"""

from pathlib import Path

from .files import read_config, read_safetensors
from .weights import DictionaryWeights, ExchangeError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "params.safetensors"
METADATA = {"model_name": "model_name", "hf_hook_point_in": "hf_hook_name", "hf_hook_point_out": "hf_hook_name_out"}


def read(folder: Path) -> DictionaryWeights:
    """A dictionary of the folder. Raises ExchangeError naming file and field."""
    config = read_config(folder / CONFIG_FILE)
    architecture = config.choice("architecture", {"jump_relu": "jumprelu"})
    file = read_safetensors(folder / WEIGHTS_FILE)
    d_in, d_sae = file.shape("w_enc", 2)
    if len(getattr(file.data.get("w_dec"), "shape", ())) == 3:
        raise ExchangeError(f"{file.path}: w_dec has 3 axes: a cross-layer transcoder cannot be represented")
    d_out = file.shape("w_dec", 2)[1]
    tensors = {
        "W_enc": file.take("w_enc", (d_in, d_sae), transpose=True),
        "b_enc": file.take("b_enc", (d_sae,)),
        "W_dec": file.take("w_dec", (d_sae, d_out)),
        "b_dec": file.take("b_dec", (d_out,)),
        "threshold": file.take("threshold", (d_sae,)),
    }
    skip = "affine_skip_connection" in file
    if config.get("affine_connection", bool, skip) != skip:
        raise ExchangeError(f"{file.path}: affine_skip_connection disagrees with affine_connection of {CONFIG_FILE}")
    if skip:
        tensors["W_skip"] = file.take("affine_skip_connection", (d_in, d_out), transpose=True)
    metadata = {ours: config.data[key] for key, ours in METADATA.items() if config.data.get(key) is not None}
    points = metadata.get("hf_hook_name"), metadata.get("hf_hook_name_out")
    two_points = d_in != d_out or (points[1] is not None and points[0] != points[1])
    weights = DictionaryWeights(
        architecture=architecture,
        form="skip_transcoder" if skip else "transcoder" if two_points else "autoencoder",
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        tensors=tensors,
        metadata=metadata,
    )
    return weights.validate(file.path)
