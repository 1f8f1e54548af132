"""transformers models from a folder: whole, truncated, quantised, spread over devices, or without weights.

Code that comes with a model runs only where it is trusted by the model's name.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from saeql.sae.hook_points import layer_stack, resolve_all

from .model_config import QUANTIZATIONS, ModelConfig, ModelError

#: Configuration entries with one value a layer have one of these in their names.
_PER_LAYER = ("layer", "block", "attention")


def one_line(error: BaseException) -> str:
    """The error's text without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300]


@contextmanager
def _named_errors(config: ModelConfig) -> Iterator[None]:
    """Turn what transformers raises into one ModelError that names the model and the way out."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, AssertionError) as error:
        if isinstance(error, ModelError):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model {config.name} comes with its own code, which is not run unless asked for by name: "
                f'model.trust_remote_code = "{config.name}"'
            ) from error
        raise ModelError(f"cannot load model {config.name}: {one_line(error)}") from error


def load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """The model's tokenizer. Raises ModelError."""
    from transformers import AutoTokenizer

    _check_foreign_code(folder, config)
    with _quiet(), _named_errors(config):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=bool(config.trust_remote_code))


def skeleton(folder: Path, config: ModelConfig) -> Any:
    """The model without weights: modules and shapes alone, on the device "meta". Raises ModelError."""
    model_config = _model_config(folder, config)
    with _quiet(), _named_errors(config), torch.device("meta"):
        build = _auto_class(model_config).from_config
        return build(model_config, dtype=torch.bfloat16, trust_remote_code=bool(config.trust_remote_code)).eval()


def build(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of `config`, in evaluation mode, without gradients; truncated where `config.truncate` says so.

    Raises ModelError where it cannot be loaded, HookPointError where a hook point does not exist.
    """
    model_config = _model_config(folder, config)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": bool(config.trust_remote_code)}
    if config.truncate:
        _truncate(model_config, skeleton(folder, config), config)
    if config.quantization:
        options["quantization_config"] = _quantization(config.quantization, dtype)
        options["device_map"] = {"": device}
    if config.device_map:
        options["device_map"] = config.device_map
        options["offload_folder"] = config.offload_folder
    if "device_map" in options and not importlib.util.find_spec("accelerate"):
        raise ModelError("model.device_map and model.quantization need accelerate: `pip install 'saeql[big]'`")
    with _quiet(), _named_errors(config):
        model, loaded = _auto_class(model_config).from_pretrained(
            folder, config=model_config, output_loading_info=True, **options
        )
    _require_weights(model, loaded["missing_keys"], config)
    if config.truncate:
        _drop_head(model)
    if "device_map" not in options:
        model.to(device)
    return model.eval().requires_grad_(False)


def is_causal(model: Any) -> bool:
    """Whether the model predicts the next token, so that it can write and has a cross-entropy."""
    return not _is_encoder(model.config)


def input_device(model: Any, default: torch.device) -> torch.device:
    """Where the model takes token ids: with its embedding, or `default` where that is not in memory."""
    device = model.get_input_embeddings().weight.device
    return default if device.type == "meta" else device


def trusted_code(folder: Path, config: ModelConfig) -> str:
    """What is recorded of code that came with the model and was run: its name and hash, or "" for none."""
    if not config.trust_remote_code or not _code_references(folder):
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{config.trust_remote_code} sha256:{digest.hexdigest()}"


def _model_config(folder: Path, config: ModelConfig) -> Any:
    from transformers import AutoConfig

    _check_foreign_code(folder, config)
    with _named_errors(config):
        return AutoConfig.from_pretrained(folder, trust_remote_code=bool(config.trust_remote_code))


def _code_references(folder: Path) -> list[str]:
    """Classes that the folder's configurations take from code files."""
    found = []
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if file.exists():
            with file.open(encoding="utf-8") as text:
                found += _strings(json.load(text).get("auto_map", {}))
    return found


def _strings(value: Any) -> list[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [str(value)] * bool(value) if values is None else [s for v in values for s in _strings(v)]


def _check_foreign_code(folder: Path, config: ModelConfig) -> None:
    """Trust in one repository is no trust in others that its configuration points to."""
    foreign = {ref.split("--")[0] for ref in _code_references(folder) if "--" in ref} - {config.name}
    if foreign and config.trust_remote_code:
        raise ModelError(
            f"model {config.name} asks for code of another repository, {sorted(foreign)[0]}, which is not run; "
            "download both into one local folder and name that"
        )


def _is_encoder(model_config: Any) -> bool:
    """Models that fill gaps; one of their families that says it is a causal model is taken as that."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    names = model_config.architectures or []
    says_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return type(model_config) in MODEL_FOR_MASKED_LM_MAPPING and not says_causal


def _auto_class(model_config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    if not _is_encoder(model_config):
        return AutoModelForCausalLM
    has_head = any(name.endswith("ForMaskedLM") for name in model_config.architectures or [])
    return AutoModelForMaskedLM if has_head else AutoModel


def _truncate(model_config: Any, whole: Any, config: ModelConfig) -> None:
    """Let `model_config` end with the layer of the deepest hook point."""
    points = [point for name in config.hook_points for point in resolve_all(whole, name)]
    outside = next((point for point in points if point.layer is None), None)
    if outside:
        raise ModelError(
            f'model.truncate keeps layers up to the deepest hook point, but "{outside.name}" is in no layer; '
            "leave model.truncate off"
        )
    old, new = len(layer_stack(whole)[1]), 1 + max(point.layer or 0 for point in points)
    text = model_config.get_text_config()
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == old and any(part in key for part in _PER_LAYER):
            setattr(text, key, value[:new])
    text.num_hidden_layers = new


def _require_weights(model: Any, missing: Any, config: ModelConfig) -> None:
    """transformers fills in missing weights at random; in a layer that would be silent nonsense."""
    stack, _ = layer_stack(model)
    inside = sorted(key for key in missing if key.startswith(f"{stack}."))
    if inside:
        raise ModelError(f"cannot load model {config.name}: its files lack {len(inside)} weights, such as {inside[0]}")


def _drop_head(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.set_output_embeddings(torch.nn.Identity())


def _quantization(name: str, dtype: torch.dtype) -> Any:
    package = QUANTIZATIONS[name]
    if not importlib.util.find_spec(package):
        raise ModelError(f'model.quantization = "{name}" needs the package {package}: `pip install {package}`')
    import transformers

    if package == "bitsandbytes":
        is_8bit = name == "bitsandbytes_8bit"
        return transformers.BitsAndBytesConfig(
            load_in_8bit=is_8bit,
            load_in_4bit=not is_8bit,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type="nf4",
        )
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and the table of weights that a truncated model leaves in its files."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
