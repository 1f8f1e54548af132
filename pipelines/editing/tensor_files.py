"""safetensors files rewritten tensor by tensor: what does not change is copied byte for byte, and nothing is unpickled.

The format: 8 bytes with the length of a JSON header, the header (name -> dtype, shape, place), then all bytes.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .affine import EditError

INDEX_FILE = "model.safetensors.index.json"
_COPIED_BYTES = 2**24


@dataclass(frozen=True)
class TensorFile:
    """One file: its header as it stands there, and where its tensors are."""

    path: Path
    header: bytes

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Raises EditError for a file that is none."""
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(size)
            if len(header) != size or not isinstance(json.loads(header), dict):
                raise ValueError("its header is cut off")
        except (OSError, ValueError) as error:
            raise EditError(f"{path} is no safetensors file: {error}") from None
        return cls(path, header)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """dtype, shape and data_offsets by name, in the order of the header."""
        return {name: entry for name, entry in json.loads(self.header).items() if name != "__metadata__"}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        return load(_alone(name, self.entries[name], self._bytes(name)))[name]

    def _bytes(self, name: str) -> bytes:
        start, end = self.entries[name]["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(8 + len(self.header) + start)
            return file.read(end - start)

    def copy(self, name: str, to: BinaryIO) -> None:
        """Copy a tensor's bytes."""
        start, end = self.entries[name]["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(8 + len(self.header) + start)
            left = end - start
            while left > 0:
                left -= to.write(file.read(min(left, _COPIED_BYTES)))


def write_changed(source: TensorFile, path: Path, new: Mapping[str, torch.Tensor]) -> None:
    """Write `source` as `path` with tensors of `new` in place of those of their names, or added at the end."""
    old, header, place = source.entries, {}, 0
    metadata = json.loads(source.header).get("__metadata__")
    if metadata is not None:
        header["__metadata__"] = metadata
    made = {name: _raw(tensor) for name, tensor in new.items()}
    for name in (*old, *(n for n in made if n not in old)):
        dtype, shape, size = made[name][:3] if name in made else (*_kind(old[name]), _size(old[name]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    write_with_header(
        path,
        text + b" " * (-len(text) % 8),
        ((made[n][3] if n in made else source) for n in header if n != "__metadata__"),
    )


def write_with_header(path: Path, header: bytes, pieces: "Iterable[bytes | TensorFile]") -> None:
    """Write a file of a given header; each of its tensors, in order of place, is bytes or is copied from a file."""
    names = sorted(
        ((entry["data_offsets"][0], name) for name, entry in json.loads(header).items() if name != "__metadata__")
    )
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for (_, name), piece in zip(names, pieces, strict=True):
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                piece.copy(name, file)
        file.flush()
        os.fsync(file.fileno())


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes as a file holds them."""
    return _raw(tensor)[3]


def weight_files(folder: Path) -> dict[str, TensorFile]:
    """The safetensors files of a model's folder by name. Raises EditError where it has none."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / INDEX_FILE).exists():
        names = sorted(set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()))
    elif "model.safetensors" in names:
        names = ["model.safetensors"]
    if not names:
        raise EditError(
            f"{folder} has no safetensors weights: load the model with transformers and save_pretrained it once, then "
            "name that folder in model.name"
        )
    return {name: TensorFile.open(folder / name) for name in names}


def _alone(name: str, entry: dict[str, Any], content: bytes) -> bytes:
    header = json.dumps({name: {**entry, "data_offsets": [0, len(content)]}}).encode()
    return len(header).to_bytes(8, "little") + header + content


def _raw(tensor: torch.Tensor) -> tuple[str, list[int], int, bytes]:
    """dtype as the format calls it, shape, size and bytes."""
    try:
        packed = save({"x": tensor.contiguous().cpu()})
    except (SafetensorError, KeyError) as error:
        raise EditError(f"a tensor of {tensor.dtype} cannot be written: {error}") from None
    size = int.from_bytes(packed[:8], "little")
    entry = json.loads(packed[8 : 8 + size])["x"]
    return entry["dtype"], entry["shape"], len(packed) - 8 - size, packed[8 + size :]


def _kind(entry: dict[str, Any]) -> tuple[str, list[int]]:
    return entry["dtype"], entry["shape"]


def _size(entry: dict[str, Any]) -> int:
    return entry["data_offsets"][1] - entry["data_offsets"][0]
