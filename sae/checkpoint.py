"""Atomic checkpoints: `checkpoints/step-00000500/` holds tensors, state and their hash, or does not exist."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CHECKPOINT_VERSION = 1
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint is damaged or belongs to another training; the message names the file and both values."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a resume needs."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write under a temporary name, fsync, rename; then drop all but the last `keep` checkpoints."""
    path = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f"{path.name}.tmp.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = temporary / "tensors.safetensors"
    save_file({name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}, tensors)
    state = {"version": CHECKPOINT_VERSION, "step": checkpoint.step, "sha256": _sha256(tensors), **checkpoint.state}
    (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        _fsync(file)
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)
    _fsync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none. Raises CheckpointError where it is damaged."""
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: {error}; remove {path} to go on without it") from None
    if state.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(f"{path} has version {state.get('version')}, this saeql reads {CHECKPOINT_VERSION}")
    tensors = path / "tensors.safetensors"
    if not tensors.exists() or _sha256(tensors) != state["sha256"]:
        raise CheckpointError(f"{tensors} does not match its hash in state.json; remove {path} to go on without it")
    return Checkpoint(state["step"], load_file(tensors), state)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
