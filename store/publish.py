"""Changing a store file: one writer, on a copy that becomes the store by one rename.

Whoever reads keeps the file that it opened. A writer that is killed leaves the store as it was, and a temporary file
that the next one removes. Beside the store lies `<name>.hash.json`: the hashes of its content. Around the rename it
holds both contents, so that at no moment a whole store contradicts it.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .errors import StoreError
from .integrity import FileHash, find_damage, hash_file

#: Ending of the file with the hashes of a store, after the store's name.
HASHES_ENDING = ".hash.json"


@contextmanager
def writing(path: Path, *, from_previous: bool = False) -> Iterator[Path]:
    """A temporary file for the block to fill, a copy of the store where asked; published when the block ends well.

    Raises StoreError at once, naming the other's pid, while another process writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        _remove_leftovers(path)
        temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        try:
            if from_previous:
                shutil.copyfile(path, temporary)
            yield temporary
            _publish(temporary, path)
        finally:
            _remove(temporary)


def find_store_damage(path: Path) -> str | None:
    """What is wrong with a store file by its recorded hashes, with its bytes; None where it is whole or unrecorded."""
    known = _recorded(path)
    found = [find_damage(path, expected) for expected in known]
    return None if not found or None in found else found[0]


def hash_path(path: Path) -> Path:
    """Where the hashes of a store are."""
    return path.with_name(f"{path.name}{HASHES_ENDING}")


def _recorded(path: Path) -> list[FileHash]:
    try:
        return [FileHash(**value) for value in json.loads(hash_path(path).read_text(encoding="utf-8"))["contents"]]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, LookupError) as error:
        raise StoreError(f"{hash_path(path)} is damaged ({error}): remove it, or rebuild the store") from None


def _record(path: Path, contents: list[FileHash]) -> None:
    target = hash_path(path)
    temporary = target.with_name(f"{target.name}.tmp.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"contents": [asdict(c) for c in contents]}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


def _publish(temporary: Path, path: Path) -> None:
    """Make the bytes durable, then the name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    made = hash_file(temporary)
    try:
        previous = _recorded(path) if path.exists() else []
    except StoreError:
        previous = []
    _record(path, [made, *previous])
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    _record(path, [made])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(f"{path.name}.tmp.lock")
    while True:
        file = lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip()
            file.close()
            raise StoreError(f"{path} is being written by another process (pid {pid or 'unknown'})") from None
        # whoever held the lock before may have removed the file between our opening and locking it
        try:
            if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        file.close()
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _remove(temporary: Path) -> None:
    """Remove a writer's temporary file and what is put beside it."""
    temporary.unlink(missing_ok=True)
    Path(f"{temporary}.wal").unlink(missing_ok=True)
    shutil.rmtree(f"{temporary}.spill", ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writers left: whoever still writes would hold the lock."""
    name = re.compile(rf"{re.escape(path.name)}(\.hash\.json)?\.tmp\.(\d+)")
    for file in list(path.parent.iterdir()):
        found = name.match(file.name)
        if found is not None:
            _remove(path.with_name(found.group(0)))
