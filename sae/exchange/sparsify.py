"""EleutherAI sparsify: `cfg.json` and `sae.safetensors` in a folder named after the hook point.

Layout in the file: `encoder.weight` [d_sae, d_in], `encoder.bias`, `W_dec` [d_sae, d_in], `b_dec`, `W_skip`
[d_in, d_in].
Only top-k dictionaries whose input and output have one width. An autoencoder reads x - b_dec, a transcoder reads x.
"""

import re
from pathlib import Path
from typing import Any

from .files import Config, read_config, read_safetensors, write_config, write_safetensors
from .weights import DictionaryWeights, ExchangeError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
RUN_FILE = "config.json"
NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}


def read(folder: Path) -> DictionaryWeights:
    """A dictionary of the folder. Raises ExchangeError naming file and field."""
    config = read_config(folder / CONFIG_FILE)
    config.choice("activation", {"topk": "topk"}, "topk")
    config.require("signed", False)
    d_in = config.get("d_in", int)
    d_sae = config.get("num_latents", int, 0) or d_in * config.get("expansion_factor", int)
    transcode, skip = config.get("transcode", bool, False), config.get("skip_connection", bool, False)
    file = read_safetensors(folder / WEIGHTS_FILE)
    tensors = {
        "W_enc": file.take(NAMES["W_enc"], (d_sae, d_in)),
        "b_enc": file.take(NAMES["b_enc"], (d_sae,)),
        "W_dec": file.take(NAMES["W_dec"], (d_sae, d_in)),
        "b_dec": file.take(NAMES["b_dec"], (d_in,)),
    }
    if skip:
        tensors["W_skip"] = file.take(NAMES["W_skip"], (d_in, d_in))
    weights = DictionaryWeights(
        architecture="topk",
        form="skip_transcoder" if skip else "transcoder" if transcode else "autoencoder",
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        k=config.get("k", int),
        tensors=tensors,
        subtract_b_dec=not transcode,
        metadata=_metadata(folder, config),
    )
    return weights.validate(config.path)


def _metadata(folder: Path, config: Config) -> dict[str, Any]:
    """Our own key if there is one; else the folder's name (the hook point) and the run's config one level up."""
    found: dict[str, Any] = {}
    if re.search(r"\.\d+(\.|$)|embed", folder.name):
        found["hf_hook_name"] = folder.name
    if (folder.parent / RUN_FILE).is_file():
        run = read_config(folder.parent / RUN_FILE)
        for key, name in (("model", "model_name"), ("dataset", "dataset_path"), ("ctx_len", "context_size")):
            if run.data.get(key) is not None:
                found[name] = run.data[key]
    return found | dict(config.section("metadata", {}).data)


def write(weights: DictionaryWeights, folder: Path) -> None:
    """Write both files. Raises ExchangeError for what sparsify cannot hold."""
    if weights.architecture != "topk" or weights.form == "crosscoder":
        raise ExchangeError(f"{folder}: sparsify holds topk only, not a {weights.architecture} {weights.form}")
    if weights.d_in != weights.d_out:
        raise ExchangeError(f"{folder}: sparsify needs d_in = d_out, got {weights.d_in} and {weights.d_out}")
    if weights.input_norm != "none":
        raise ExchangeError(f"{folder}: sparsify has no {weights.input_norm}")
    weights = weights.folded(folder)
    if weights.form != "skip_transcoder":  # with a skip connection both are possible, and the file says which
        weights = weights.with_subtraction(weights.form == "autoencoder")
    unit_rows = bool(((weights.tensors["W_dec"].norm(dim=1) - 1).abs() < 1e-4).all())
    write_safetensors(folder / WEIGHTS_FILE, {NAMES[name]: tensor for name, tensor in weights.tensors.items()})
    write_config(
        folder / CONFIG_FILE,
        {
            "activation": "topk",
            "expansion_factor": max(1, weights.d_sae // weights.d_in),
            "normalize_decoder": unit_rows,
            "num_latents": weights.d_sae,
            "k": weights.k,
            "multi_topk": False,
            "skip_connection": weights.form == "skip_transcoder",
            "transcode": not weights.subtract_b_dec,
            "d_in": weights.d_in,
            **({"metadata": weights.metadata} if weights.metadata else {}),  # sparsify drops it with a note
        },
    )
