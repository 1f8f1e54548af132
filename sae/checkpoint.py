"""Atomic checkpoints: `checkpoints/step-00000500/` holds tensors, state and their hashes, or does not exist.

One process writes one safetensors file. Ranks that share a dictionary out write their parts side by side through
torch.distributed.checkpoint, in its safetensors layout: nothing here is a pickle. Its reader puts the parts together
for any other number of ranks; it does not notice a flipped byte, which is why every file is hashed here. It is imported
where it is used: that takes a second, and one process does without.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .comm import ALONE, Comm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

CHECKPOINT_VERSION = 2
#: Hashes of a checkpoint's other files, in the form of store/integrity.py: what `saeql verify` names damage by.
HASHES_FILE = "hashes.json"
_BLOCK_BYTES = 2**20
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint is damaged or belongs to another training; the message names the file and both values."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a resume needs. Of the tensors named in `sharded` a rank holds its own rows."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    sharded: frozenset[str] = frozenset()


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, comm: Comm = ALONE, keep: int = 2) -> Path:
    """Write under a temporary name, fsync, rename; then drop all but the last `keep` checkpoints. All ranks call it.

    Killed at any moment, it leaves the checkpoints before it as they are. Raises CheckpointError where a rank cannot
    write its part.
    """
    path = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / comm.on_first(lambda: _start(path))
    if comm.size > 1:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save as save_parts

        placed = _placed(checkpoint.tensors, checkpoint.sharded, comm)
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        _together(comm, temporary, lambda: save_parts(placed, storage_writer=writer))
    else:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()},
            temporary / "tensors.safetensors",
        )
    comm.on_first(lambda: _publish(temporary, path, checkpoint, comm, keep))
    return path


def _start(path: Path) -> str:
    """An empty folder for a checkpoint's files; what killed writers left is removed. Returns its name."""
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    if path.parent.is_dir():
        for left in path.parent.glob("step-*.tmp.*"):
            shutil.rmtree(left)
    temporary.mkdir(parents=True)
    return temporary.name


def _publish(temporary: Path, path: Path, checkpoint: Checkpoint, comm: Comm, keep: int) -> None:
    """Add state and hashes to the files of all ranks, give them their name, drop the oldest checkpoints."""
    hashes = {file.name: _file_hash(file) for file in sorted(temporary.iterdir())}
    files = {name: found["sha256"] for name, found in hashes.items()}
    shape = {"ranks": [comm.data_size, comm.feature_size], "files": files}
    state = {"version": CHECKPOINT_VERSION, "step": checkpoint.step, **shape, **checkpoint.state}
    (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    hashes["state.json"] = _file_hash(temporary / "state.json")
    (temporary / HASHES_FILE).write_text(json.dumps({"files": hashes}) + "\n", encoding="utf-8")
    for file in (*temporary.iterdir(), temporary):
        _fsync(file)
    if path.exists():
        _discard(path)
    temporary.replace(path)
    _fsync(path.parent)
    for old in checkpoints(path.parent)[:-keep]:
        _discard(old)


def _discard(path: Path) -> None:
    """Remove a checkpoint: at no moment is there one that lacks some of its files."""
    unnamed = path.with_name(f"{path.name}.tmp.old")
    path.replace(unnamed)
    shutil.rmtree(unnamed)


def _together(comm: Comm, path: Path, work: Callable[[], object]) -> None:
    """Do what all ranks do with a checkpoint's parts; one that fails fails for all, with its own reason."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with comm.talking():
            work()
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{path}: rank {rank}: {type(reason).__name__}: {reason}") from None


def _placed(tensors: Mapping[str, torch.Tensor], sharded: Collection[str], comm: Comm) -> dict[str, "DTensor"]:
    """Every tensor as a part, or a copy, of one over the whole mesh."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    rows = {True: (Replicate(), Shard(0)), False: (Replicate(), Replicate())}
    return {
        name: DTensor.from_local(t.detach(), comm.mesh, rows[name in sharded], run_check=False)
        for name, t in tensors.items()
    }


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint with its `path`, or None where there is none.

    Raises CheckpointError where it is damaged: every file is compared with its hash.
    """
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    try:
        hashes = json.loads((path / HASHES_FILE).read_text(encoding="utf-8")) if (path / HASHES_FILE).exists() else None
        if hashes and _sha256(path / "state.json") != hashes["files"]["state.json"]["sha256"]:
            raise CheckpointError(
                f"{path / 'state.json'} does not match {HASHES_FILE}; remove {path} to go on without it"
            )
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, LookupError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: {error}; remove {path} to go on without it") from None
    if state.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(f"{path} has version {state.get('version')}, this saeql reads {CHECKPOINT_VERSION}")
    for name, digest in state["files"].items():
        if not (path / name).exists() or _sha256(path / name) != digest:
            raise CheckpointError(
                f"{path / name} does not match its hash in state.json; remove {path} to go on without it"
            )
    return {**state, "path": path}


def load_tensors(
    state: Mapping[str, Any], wanted: Mapping[str, torch.Tensor], sharded: Collection[str], comm: Comm
) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint in the shapes of `wanted`, on the CPU; of those in `sharded` this rank's rows.

    The checkpoint may come from another number of ranks. Raises CheckpointError where a tensor is missing or of
    another shape.
    """
    path, whole = state["path"], state["ranks"] == [1, 1]
    rows = {name: comm.feature_size if name in sharded else 1 for name in wanted}
    shapes = {name: torch.Size([t.shape[0] * rows[name], *t.shape[1:]]) if t.dim() else t.shape
              for name, t in wanted.items()}  # fmt: skip
    stored = _stored_shapes(path)
    for name, shape in shapes.items():
        if stored.get(name) != shape:
            raise CheckpointError(f"{path}: the checkpoint does not hold {name} {tuple(shape)}")
    if whole:
        with safe_open(path / "tensors.safetensors", "pt") as file:
            return {
                name: file.get_slice(name)[comm.shard(shapes[name][0])] if rows[name] > 1 else file.get_tensor(name)
                for name in wanted
            }
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    reader = HuggingFaceStorageReader(str(path))
    if comm.size == 1:
        found = {name: torch.empty(shapes[name], dtype=t.dtype) for name, t in wanted.items()}
        load_parts(found, storage_reader=reader, no_dist=True)
        return found
    empty = {name: torch.empty_like(t) for name, t in wanted.items()}
    placed = _placed(empty, sharded, comm)
    _together(comm, path, lambda: load_parts(placed, storage_reader=reader))
    return {name: t.to_local().cpu() for name, t in placed.items()}


def _stored_shapes(path: Path) -> dict[str, torch.Size]:
    """Shapes of the whole tensors of a checkpoint."""
    file = path / "tensors.safetensors"
    if file.exists():
        with safe_open(file, "pt") as opened:
            return {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def _file_hash(path: Path) -> dict[str, Any]:
    digest, blocks, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            digest.update(block)
            blocks.append(zlib.crc32(block))
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest(), "block_bytes": _BLOCK_BYTES, "block_crc32": blocks}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
