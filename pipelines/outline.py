"""A language model's outline: what its forward pass costs, counted without its weights.

The model is built from its config.json with tensors that have shapes but no data, and the forward pass that a stage
would run is run on them: widths, operations and the bytes that are alive at once come from the model's own code.
"""

import json
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from saeql.sae.hooks import capture, resolve

from .models import ModelConfig, ModelError, model_folder


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    tokens: int
    flops: float
    live_bytes: int  # peak of what it allocates, its outputs included


@dataclass(frozen=True)
class ModelOutline:
    """What a plan needs to know of a language model."""

    num_parameters: int
    vocabulary: int
    widths: dict[str, int]  # by hook point
    depth_share: dict[str, float]  # share of the layers that run, by hook point
    dtype: torch.dtype
    stored_dtype: torch.dtype | None  # of the weight files, None where unknown
    harvest: Pass  # stops at the deepest hook point
    full: Pass  # with logits

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are loaded."""
        return self.num_parameters * self.dtype.itemsize


def outline(
    config: ModelConfig,
    hook_points: Sequence[str],
    dtype: torch.dtype,
    harvest_shape: tuple[int, int],
    full_shape: tuple[int, int],
) -> ModelOutline:
    """Outline of `config` for batches of (windows, tokens). Nothing is downloaded but config.json.

    Raises ModelError where there is no config.json, HookPointError where a hook point does not exist.
    """
    model_config, folder = _read_config(config)
    with FakeTensorMode(), torch.no_grad():
        model = _build(config.name, model_config, dtype)
        parameters = {id(p): p for p in model.parameters()}.values()
        layers = model_config.get_text_config().num_hidden_layers
        points = [resolve(model, name) for name in hook_points]
        with capture(model, list(hook_points)) as reader, _count(harvest_shape) as harvest:
            acts = reader.run(torch.zeros(harvest_shape, dtype=torch.long))
        widths = {name: acts[name].shape[-1] for name in hook_points}
        reader.acts = {}
        del acts
        with _count(full_shape) as full:
            model(input_ids=torch.zeros(full_shape, dtype=torch.long), use_cache=False)
        return ModelOutline(
            num_parameters=sum(p.numel() for p in parameters),
            vocabulary=model.get_output_embeddings().weight.shape[0],
            widths=widths,
            depth_share={p.name: 1.0 if p.layer is None else (p.layer + 1) / layers for p in points},
            dtype=dtype,
            stored_dtype=_stored_dtype(folder) or _config_dtype(model_config),
            harvest=harvest[0],
            full=full[0],
        )


def _read_config(config: ModelConfig) -> tuple[Any, Path | None]:
    """The model's configuration, and its folder where it is on this machine."""
    from transformers import AutoConfig

    local = config.name.startswith("embedded:") or Path(config.name).expanduser().is_dir()
    folder = model_folder(config) if local else None
    try:
        return AutoConfig.from_pretrained(folder or config.name, revision=config.revision), folder
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no config.json of model {config.name}: {' '.join(str(error).split())[:300]}") from error


def _build(name: str, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except (ValueError, KeyError) as error:
        raise ModelError(f"cannot build model {name}: {' '.join(str(error).split())[:300]}") from error


def _stored_dtype(folder: Path | None) -> torch.dtype | None:
    """Type of the first tensor of the first safetensors file, from its header."""
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files:
        return None
    with files[0].open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return next((kinds.get(entry["dtype"]) for key, entry in header.items() if key != "__metadata__"), None)


def _config_dtype(config: Any) -> torch.dtype | None:
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else None


@contextmanager
def _count(shape: tuple[int, int]) -> Iterator[list[Pass]]:
    """Counts what runs inside; the list holds the Pass afterwards."""
    found: list[Pass] = []
    live = _LiveBytes()
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as flops, live:
        yield found
    found.append(Pass(shape[0] * shape[1], float(flops.get_total_flops()), live.peak))


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products of queries [B, H, T, d] with keys [B, H, S, d]; shapes or tensors."""
    q, k, v = (getattr(t, "shape", t) for t in (query, key, value))
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


class _LiveBytes(TorchDispatchMode):
    """Peak of the bytes of storages that were made inside and are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage(), given)
        self.peak = max(self.peak, self.now)
        return out

    def _track(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in given:  # a view, or a weight
            return
        self._seen.add(key)
        self.now += size

        def freed() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)
