"""Small files, and folders, that exist whole or not at all."""

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> Path:
    """Write text (UTF-8, as it is) or bytes under a temporary name, then rename; returns the path.

    `durable`: it also outlives the machine's next moment without power.
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it: one that is half removed has lost its name. Several may do so at once."""
    with suppress(FileNotFoundError):
        folder.rename(folder.with_name(f"{folder.name}.tmp.{os.getpid()}.{secrets.token_hex(4)}"))
    remove_half_removed(folder)


def remove_half_removed(folder: Path) -> None:
    """Remove what `remove_folder` left when it was interrupted."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that died left of files in `folder`; only for who alone writes there."""
    for file in folder.glob("*.tmp.*"):
        if file.is_file():
            file.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
