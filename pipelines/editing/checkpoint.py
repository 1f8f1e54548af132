"""An edited checkpoint beside the one it was made from, and the way back to its very bytes.

The undo file holds what the changed tensors were and the headers of the original files; it lies in a folder of its own,
because some programs read every safetensors file that lies beside a model's configuration.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .affine import EditError
from .tensor_files import INDEX_FILE, TensorFile, raw_bytes, weight_files, write_changed, write_with_header
from .weight_plan import WeightPlan

FORMAT = "saeql-undo-1"
EDIT_FILE = "saeql_edit.json"
UNDO_FILE = "saeql_undo/undo.safetensors"
CONFIG_FILE = "config.json"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".npz", ".h5", ".msgpack", ".onnx", ".ot")


def require_free(out: Path) -> None:
    """Raise EditError where `out` holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EditError(f"{out} is there already: name a new folder with --out")


def write_edited(source: Path, files: Mapping[str, TensorFile], plan: WeightPlan, out: Path, *, widen: bool) -> None:
    """Write the model of folder `source` with the tensors and switches of `plan` to `out`, with its undo file.

    `widen` stores changed tensors in float32, else they are rounded to what the files have. Untouched ones keep their
    bytes.
    """
    home = {name: file for file in files.values() for name in file.entries}
    by_file: dict[str, dict[str, torch.Tensor]] = {name: {} for name in files}
    old: dict[str, torch.Tensor] = {}
    for name, tensor in plan.tensors.items():
        beside = home[plan.beside.get(name, name)]
        stored = beside.tensor(plan.beside.get(name, name)).dtype
        by_file[beside.path.name][name] = tensor.to(torch.float32 if widen else stored)
        if name in home:
            old[name] = beside.tensor(name)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        name: (source / name).read_text(encoding="utf-8")
        for name in (CONFIG_FILE, INDEX_FILE)
        if (source / name).exists()
    }
    copied = [
        path.name
        for path in sorted(source.iterdir())
        if path.is_file() and path.suffix not in (*_OTHER_WEIGHTS, ".safetensors") and path.name not in texts
    ]
    for name in copied:
        shutil.copyfile(source / name, out / name)
    for name, file in files.items():
        if by_file[name]:
            write_changed(file, out / name, by_file[name])
        else:
            shutil.copyfile(file.path, out / name)
    config = {**json.loads(texts[CONFIG_FILE]), **plan.switches}
    if widen:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float32"
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if INDEX_FILE in texts:
        _write_index(out, json.loads(texts[INDEX_FILE]), files)
    about = {
        "format": FORMAT,
        "texts": json.dumps(texts),
        "headers": json.dumps({name: file.header.decode("utf-8") for name, file in files.items()}),
        "sha256": json.dumps({name: sha256(source / name) for name in (*copied, *texts, *files)}),
    }
    (out / UNDO_FILE).parent.mkdir()
    save_file(old, out / UNDO_FILE, metadata=about)


def undo(folder: Path, out: Path) -> list[str]:
    """Write the checkpoint that `folder` was edited from to `out`; returns the names of its files.

    Raises EditError where `folder` is no edited checkpoint, `out` is taken, or a file does not come out with the bytes
    that it had.
    """
    require_free(out)
    if not (folder / UNDO_FILE).is_file():
        raise EditError(f"{folder} has no {UNDO_FILE}: it is no checkpoint of `saeql edit`")
    try:
        with safe_open(folder / UNDO_FILE, framework="pt") as file:
            about: dict[str, str] = file.metadata() or {}
            old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise EditError(f"{folder / UNDO_FILE} is damaged: {error}") from None
    if about.get("format") != FORMAT:
        raise EditError(f"{folder / UNDO_FILE} is no undo file: its format is {about.get('format')!r}")
    headers, texts, hashes = (json.loads(about[key]) for key in ("headers", "texts", "sha256"))
    out.mkdir(parents=True, exist_ok=True)
    for name in hashes:
        if name in texts:
            (out / name).write_text(texts[name], encoding="utf-8")
        elif name not in headers:
            shutil.copyfile(folder / name, out / name)
    for name, header in headers.items():
        edited = TensorFile.open(folder / name)
        entries = json.loads(header)
        order = sorted((e["data_offsets"][0], n) for n, e in entries.items() if n != "__metadata__")
        pieces = (raw_bytes(old[n]) if n in old else edited for _, n in order)
        write_with_header(out / name, header.encode("utf-8"), pieces)
    for name, expected in hashes.items():
        if sha256(out / name) != expected:
            raise EditError(f"{out / name} did not come out as it was: was {folder} changed since it was made?")
    return list(hashes)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_index(out: Path, index: dict[str, Any], files: Mapping[str, TensorFile]) -> None:
    index["weight_map"] = {name: file for file in files for name in TensorFile.open(out / file).entries}
    index.setdefault("metadata", {})["total_size"] = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for file in files
        for entry in TensorFile.open(out / file).entries.values()
    )
    (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


__all__ = ["EDIT_FILE", "UNDO_FILE", "require_free", "sha256", "undo", "weight_files", "write_edited"]
