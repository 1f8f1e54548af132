"""dictionary_learning: `ae.pt`, a PyTorch state dict, and `config.json` with the class name under `trainer`.

Tensor names differ from class to class; `nn.Linear` weights are [out, in], plain parameters [in, out]. BatchTopK and
Matryoshka keep latents above one learned threshold. Its loader scales the decoder rows of an AutoEncoder to norm 1
unless told not to; here the file's own latents are kept.
"""

from pathlib import Path
from typing import Any

import torch

from .files import Config, TensorFile, read_config, read_pt, write_config, write_pt
from .weights import BATCH_ARCHITECTURES, DictionaryWeights, ExchangeError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"
LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
#: Its classes: our architecture, and the names in the state dict of the tensors whose names differ.
CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("relu", {**LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"}),
    "AutoEncoderNew": ("relu", {**LINEAR, "b_enc": "encoder.bias", "b_dec": "decoder.bias"}),
    "AutoEncoderTopK": ("topk", {**LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", {**LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        {**LINEAR, "b_gate": "gate_bias", "r_mag": "r_mag", "b_mag": "mag_bias", "b_dec": "decoder_bias"},
    ),
    "JumpReluAutoEncoder": ("jumprelu", {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}),
}
#: Classes whose encoder reads x and not x minus the decoder's bias.
NO_SUBTRACTION = ("AutoEncoderNew", "JumpReluAutoEncoder")
WRITTEN = {architecture: name for name, (architecture, _) in CLASSES.items() if name != "AutoEncoderNew"}


def read(path: Path) -> DictionaryWeights:
    """A dictionary of a folder, or of a checkpoint `checkpoints/ae_<step>.pt` in it. Raises ExchangeError."""
    folder = folder_of(path)
    config = read_config(folder / CONFIG_FILE)
    trainer = config.section("trainer")
    architecture, names = trainer.choice("dict_class", CLASSES)
    name = trainer.get("dict_class", str)
    d_in, d_sae = trainer.get("activation_dim", int), trainer.get("dict_size", int)
    file = read_pt(path if path.suffix == ".pt" else folder / WEIGHTS_FILE)
    tensors = _tensors(file, architecture, names, d_in, d_sae)
    metadata = _metadata(config, trainer)
    k = None
    if architecture in ("topk", *BATCH_ARCHITECTURES):
        k = trainer.get("k", int)
        if "k" in file and int(file.take("k", ())) != k:
            raise ExchangeError(f"{file.path}: k is {int(file.take('k', ()))}, {CONFIG_FILE} says {k}")
    if architecture == "topk" and "threshold" in file:
        metadata["threshold"] = float(file.take("threshold", ()))
    if architecture == "matryoshka":
        metadata["group_sizes"] = _group_sizes(file, d_sae)
    two_points = config.section("buffer", {}).get("io", str, "out") == "in_and_out"
    weights = DictionaryWeights(
        architecture=architecture,
        form="transcoder" if two_points else "autoencoder",
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        k=k,
        tensors=tensors,
        subtract_b_dec=name not in NO_SUBTRACTION,
        metadata=metadata,
    )
    return weights.validate(config.path)


def folder_of(path: Path) -> Path:
    """The folder with the config of a folder, of its `ae.pt`, or of one of its checkpoints."""
    if path.suffix != ".pt":
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _tensors(
    file: TensorFile, architecture: str, names: dict[str, str], d_in: int, d_sae: int
) -> dict[str, torch.Tensor]:
    linear = names["W_enc"] == LINEAR["W_enc"]
    tensors = {}
    for name, stored in names.items():
        if name == "W_enc":
            tensors[name] = file.take(stored, (d_sae, d_in) if linear else (d_in, d_sae), transpose=not linear)
        elif name == "W_dec":
            tensors[name] = file.take(stored, (d_in, d_sae) if linear else (d_sae, d_in), transpose=linear)
        else:
            tensors[name] = file.take(stored, (d_in,) if name == "b_dec" else (d_sae,))
    if architecture == "jumprelu":
        tensors["threshold"] = file.take("threshold", (d_sae,))
    elif architecture in BATCH_ARCHITECTURES:
        tensors["threshold"] = file.take("threshold", ()).repeat(d_sae)
    return tensors


def _group_sizes(file: TensorFile, d_sae: int) -> list[int]:
    shape = file.shape("group_sizes", 1)
    sizes = [int(size) for size in file.take("group_sizes", shape)]
    if sum(sizes) != d_sae or min(sizes, default=0) < 1:
        raise ExchangeError(f"{file.path}: group_sizes {sizes} must be positive and sum to {d_sae}")
    return sizes


def _metadata(config: Config, trainer: Config) -> dict[str, Any]:
    found = {}
    pairs = (("lm_name", "model_name"), ("submodule_name", "hf_hook_name"), ("layer", "hook_layer"))
    for key, name in pairs:
        if trainer.data.get(key) is not None:
            found[name] = trainer.data[key]
    if (context := config.section("buffer", {}).data.get("ctx_len")) is not None:
        found["context_size"] = context
    return found | dict(config.section("metadata", {}).data)


def write(weights: DictionaryWeights, folder: Path) -> None:
    """Write both files. Raises ExchangeError for what dictionary_learning has no class for."""
    if weights.form not in ("autoencoder", "transcoder") or weights.d_in != weights.d_out:
        what = f"a {weights.architecture} {weights.form} from {weights.d_in} to {weights.d_out}"
        raise ExchangeError(f"{folder}: dictionary_learning has no class for {what}")
    if weights.input_norm != "none":
        raise ExchangeError(f"{folder}: dictionary_learning has no {weights.input_norm}")
    name = WRITTEN[weights.architecture]
    weights = weights.folded(folder).with_subtraction(name not in NO_SUBTRACTION)
    names = CLASSES[name][1]
    linear = names["W_enc"] == LINEAR["W_enc"]
    state = {stored: weights.tensors[ours] for ours, stored in names.items()}
    transposed = names["W_dec"] if linear else names["W_enc"]
    state[transposed] = state[transposed].t()
    metadata = dict(weights.metadata)
    trainer: dict[str, Any] = {
        "dict_class": name,
        "activation_dim": weights.d_in,
        "dict_size": weights.d_sae,
        "lm_name": metadata.get("model_name"),
        "submodule_name": metadata.get("hf_hook_name"),
        "layer": metadata.get("hook_layer"),
    }
    if weights.architecture in ("topk", *BATCH_ARCHITECTURES):
        if weights.k is None:
            raise ExchangeError(f"{folder}: a {name} needs k")
        trainer["k"] = weights.k
        state |= {"k": torch.tensor(weights.k, dtype=torch.int), "threshold": _scalar_threshold(weights, folder)}
    if weights.architecture == "jumprelu":
        state["threshold"] = weights.tensors["threshold"]
    if weights.architecture == "matryoshka":
        sizes = metadata.get("group_sizes") or _differences(metadata.get("matryoshka_widths")) or [weights.d_sae]
        if sum(sizes) != weights.d_sae:
            raise ExchangeError(f"{folder}: metadata group_sizes {sizes} must sum to d_sae ({weights.d_sae})")
        state["group_sizes"] = torch.tensor(sizes)
    buffer = {"io": "in_and_out" if weights.form == "transcoder" else "out", "ctx_len": metadata.get("context_size")}
    write_pt(folder / WEIGHTS_FILE, state)
    write_config(folder / CONFIG_FILE, {"trainer": trainer, "buffer": buffer, "metadata": metadata})


def _scalar_threshold(weights: DictionaryWeights, folder: Path) -> torch.Tensor:
    if weights.architecture == "topk":  # a statistic that its encoder does not read by default; -1 means never measured
        return torch.tensor(weights.metadata.get("threshold", -1.0), dtype=torch.float32)
    threshold = weights.tensors.get("threshold")
    if threshold is None or not (threshold == threshold[0]).all():
        what = "none is set" if threshold is None else "latents differ in theirs; write it as jumprelu"
        raise ExchangeError(f"{folder}: {WRITTEN[weights.architecture]} needs one threshold for all latents: {what}")
    return threshold[0]


def _differences(widths: list[int] | None) -> list[int]:
    """Sizes of the groups that end at `widths`."""
    ends = widths or []
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []
