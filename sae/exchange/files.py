"""Files of foreign dictionaries, read with suspicion: every error is one ExchangeError with the file and the field.

Nothing here runs code from a file: JSON, safetensors, NumPy without pickles, and PyTorch's `weights_only` loader, which
builds tensors and plain containers and refuses everything else.
"""

import json
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .weights import ExchangeError, check_tensor

_REQUIRED: Any = object()
#: What NumPy's and PyTorch's loaders raise for bytes that are not what they claim to be.
_UNREADABLE = (ValueError, TypeError, OSError, EOFError, LookupError, AttributeError, RuntimeError, MemoryError)


class Config:
    """A JSON object that knows its file, so that a missing or mistyped key is an error that names both."""

    def __init__(self, path: Path, data: Mapping[str, Any], where: str = ""):
        self.path, self.data, self.where = path, data, where

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Value of `key`, an instance of `kind`; without a default it must be there. Raises ExchangeError."""
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ExchangeError(f'{self.path} has no key "{self.where}{key}"')
            return default
        is_whole_float = kind is int and isinstance(value, float) and value.is_integer()
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if is_whole_float:
            return int(value)
        if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
            raise ExchangeError(f'{self.path}: "{self.where}{key}" must be a {kind.__name__}, got {value!r}')
        return value

    def section(self, key: str, default: Any = _REQUIRED) -> "Config":
        """The object under `key`; its errors name the path `key.inner`. Raises ExchangeError."""
        return Config(self.path, self.get(key, dict, default), f"{self.where}{key}.")

    def require(self, key: str, expected: Any) -> None:
        """Raise ExchangeError where `key` is set to anything but `expected`, which is what absence means."""
        value = self.data.get(key, expected)
        if value != expected:
            raise ExchangeError(f"{self.path}: {self.where}{key} = {value!r} cannot be represented, only {expected!r}")

    def choice(self, key: str, choices: Mapping[str, Any], default: str | None = None) -> Any:
        """`choices[value of key]`. Raises ExchangeError listing them."""
        value = self.get(key, str) if default is None else self.get(key, str, default)
        if value not in choices:
            raise ExchangeError(f"{self.path}: unknown {self.where}{key} {value!r}; there is {', '.join(choices)}")
        return choices[value]


class TensorFile:
    """Tensors by the names that their file gives them."""

    def __init__(self, path: Path, data: Mapping[str, Any]):
        self.path, self.data = path, data

    def __contains__(self, name: str) -> bool:
        return name in self.data

    def take(self, name: str, shape: tuple[int, ...], *, transpose: bool = False) -> Tensor:
        """Tensor `name` as contiguous float32. Raises ExchangeError if missing, of another shape, or not finite.

        `shape` is the shape in the file; `transpose` swaps the two axes after the check.
        """
        if name not in self.data:
            raise ExchangeError(f"{self.path} has no tensor {name}; it has {', '.join(sorted(map(str, self.data)))}")
        tensor = self.data[name]
        if not isinstance(tensor, Tensor) or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ExchangeError(f"{self.path}: {name} is not a tensor of numbers")
        tensor = tensor.detach().float()
        check_tensor(self.path, name, tensor, shape)
        return (tensor.t() if transpose else tensor).contiguous()

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Shape of tensor `name`. Raises ExchangeError where it is missing or does not have `ndim` axes."""
        if name not in self.data:
            raise ExchangeError(f"{self.path} has no tensor {name}; it has {', '.join(sorted(map(str, self.data)))}")
        tensor = self.data[name]
        if not isinstance(tensor, Tensor) or tensor.ndim != ndim:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ExchangeError(f"{self.path}: {name} must have {ndim} axes, found {found}")
        return tuple(tensor.shape)


def read_config(path: Path) -> Config:
    """A JSON object. Raises ExchangeError where the file is missing or holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExchangeError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ExchangeError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ExchangeError(f"{path} is not a JSON object")
    return Config(path, data)


def read_safetensors(path: Path) -> TensorFile:
    """Tensors of a safetensors file. Raises ExchangeError where it is missing or damaged."""
    try:
        return TensorFile(path, load_file(path))
    except FileNotFoundError:
        raise ExchangeError(f"{path} is missing") from None
    except (SafetensorError, *_UNREADABLE) as error:
        raise ExchangeError(f"{path} is damaged: {_reason(error)}") from None


def read_npz(path: Path) -> TensorFile:
    """Arrays of a NumPy archive, pickled ones refused. Raises ExchangeError where it is missing or damaged."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ExchangeError(f"{path} is not an archive of arrays (.npz)")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
        return TensorFile(path, {name: torch.from_numpy(array) for name, array in arrays.items()})
    except FileNotFoundError:
        raise ExchangeError(f"{path} is missing") from None
    except ExchangeError:
        raise
    except (*_UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
        raise ExchangeError(f"{path} is damaged or holds more than arrays of numbers: {_reason(error)}") from None


def read_pt(path: Path) -> TensorFile:
    """A state dict saved by PyTorch; pickled code is refused, never run. Raises ExchangeError."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ExchangeError(f"{path} is missing") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ExchangeError(f"{path} was not loaded: it is damaged or holds more than tensors") from None
        what = f"asks to run or build {named[1]}; only tensors are loaded"
        raise ExchangeError(f"{path} was not loaded: its pickle {what}") from None
    except _UNREADABLE as error:
        raise ExchangeError(f"{path} is damaged: {_reason(error)}") from None
    if not isinstance(data, dict):
        raise ExchangeError(f"{path} is not a state dict but a {type(data).__name__}")
    return TensorFile(path, data)


def _reason(error: BaseException) -> str:
    """First sentence of an error: the rest is advice about other loaders."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]


def write_config(path: Path, data: Mapping[str, Any]) -> None:
    """JSON under a temporary name, then renamed. Raises ExchangeError for metadata that JSON cannot hold."""
    try:
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{path}: metadata cannot be written as JSON: {error}") from None
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors under a temporary name, then renamed."""
    temporary = _temporary(path)
    save_file({name: _own(tensor) for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def write_pt(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A PyTorch state dict under a temporary name, then renamed."""
    temporary = _temporary(path)
    torch.save({name: _own(tensor) for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _own(tensor: Tensor) -> Tensor:
    """A contiguous tensor on the CPU that shares no storage: a view would be saved with all that it looks at."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp.{os.getpid()}")
