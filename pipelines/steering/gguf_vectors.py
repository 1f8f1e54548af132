"""Control vectors of llama.cpp: GGUF files with a tensor `direction.N` [d] a layer, added to that layer's output.

N counts layers as hook points do: `direction.N` is `resid_post.N`. llama.cpp has no place for layer 0.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..atomic import write_whole
from .vectors import SteeringVector, VectorError

ARCHITECTURE = "controlvector"
_PLACE = re.compile(r"resid_post\.(\d+)")
_TENSOR = re.compile(r"direction\.(\d+)")


def save_gguf(vector: SteeringVector, path: Path, *, model_type: str, num_layers: int, strength: float = 1.0) -> Path:
    """Write a control vector; llama.cpp adds what the file holds, `strength` times the rows, times its own scale.

    Args: `model_type` as llama.cpp names the architecture ("llama"), `num_layers` of the model.
    Raises VectorError where a hook point is not the output of a layer from 1 on, or gguf is not installed.
    """
    gguf = _gguf()
    layers = {}
    for place, row in vector.rows.items():
        found = _PLACE.fullmatch(place)
        if found is None or not 1 <= int(found[1]) < num_layers:
            raise VectorError(
                f"llama.cpp adds control vectors to the outputs of layers 1 to {num_layers - 1} (resid_post.N), "
                f"not at {place}"
            )
        layers[int(found[1])] = row
    with TemporaryDirectory() as folder:
        made = Path(folder) / "vector.gguf"
        _write(gguf.GGUFWriter(str(made), ARCHITECTURE), vector.name, layers, model_type, strength)
        return write_whole(path, made.read_bytes())


def _write(writer: Any, name: str, layers: Mapping[int, torch.Tensor], model_type: str, strength: float) -> None:
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(layers))
    writer.add_name(name)
    for layer, row in sorted(layers.items()):
        writer.add_tensor(f"direction.{layer}", (strength * row).float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf(path: Path) -> SteeringVector:
    """Read a control vector of llama.cpp. Raises VectorError for any other file."""
    gguf = _gguf()
    if not path.is_file():
        raise VectorError(f"no control vector at {path}")
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, OSError, IndexError) as error:
        raise VectorError(f"{path} is no GGUF file: {error}") from None
    kind = reader.get_field("general.architecture")
    if kind is None or kind.contents() != ARCHITECTURE:
        raise VectorError(f"{path} is no control vector: its architecture is {kind.contents() if kind else 'missing'}")
    rows = {}
    for tensor in reader.tensors:
        found = _TENSOR.fullmatch(tensor.name)
        if found is None or len(tensor.shape) != 1:
            raise VectorError(f"{path}: tensor {tensor.name} is no direction of a layer")
        rows[f"resid_post.{int(found[1])}"] = torch.from_numpy(np.array(tensor.data, np.float32))
    if not rows:
        raise VectorError(f"{path} holds no direction")
    name = reader.get_field("general.name")
    return SteeringVector(str(name.contents()) if name else path.stem, rows, {}, made_by="llama.cpp")


def _gguf():
    try:
        import gguf
    except ImportError:
        raise VectorError("control vectors of llama.cpp need the package gguf: pip install 'saeql[demo]'") from None
    return gguf
