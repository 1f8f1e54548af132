"""All formats by name, detection from the files, and the two functions that everybody calls: `read` and `write`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import dictionary_learning, gemma_scope, gemma_scope_2, llama_scope, llamascopium, openai, saelens, sparsify
from .weights import DictionaryWeights, ExchangeError, check_choice


@dataclass(frozen=True)
class Format:
    """How to recognise, read and perhaps write one format."""

    files: tuple[str, ...]
    """A folder with all of these holds it; "*.pt" stands for any file of that ending."""
    read: Callable[[Path, bool], DictionaryWeights]
    """Reads a path, given `allow_layer_norm`."""
    write: Callable[[DictionaryWeights, Path], None] | None = None


FORMATS: dict[str, Format] = {
    "saelens": Format(
        (saelens.CONFIG_FILE, saelens.WEIGHTS_FILE),
        lambda path, allow: saelens.read(path, allow_layer_norm=allow),
        saelens.write,
    ),
    "sparsify": Format(
        (sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE), lambda path, _: sparsify.read(path), sparsify.write
    ),
    "dictionary_learning": Format(
        (dictionary_learning.CONFIG_FILE, dictionary_learning.WEIGHTS_FILE),
        lambda path, _: dictionary_learning.read(path),
        dictionary_learning.write,
    ),
    "gemma_scope": Format((gemma_scope.WEIGHTS_FILE,), lambda path, _: gemma_scope.read(path)),
    "gemma_scope_2": Format(
        (gemma_scope_2.CONFIG_FILE, gemma_scope_2.WEIGHTS_FILE), lambda path, _: gemma_scope_2.read(path)
    ),
    "openai": Format(("*.pt",), lambda path, allow: openai.read(_only_pt(path), allow_layer_norm=allow)),
    "llama_scope": Format((llama_scope.CONFIG_FILE,), lambda path, _: llama_scope.read(path)),
    "llamascopium": Format(
        (llamascopium.CONFIG_FILE, llamascopium.WEIGHTS_FILE), lambda path, _: llamascopium.read(path)
    ),
}
READABLE = tuple(FORMATS)
WRITABLE = tuple(name for name, form in FORMATS.items() if form.write is not None)


def read(
    path: str | os.PathLike[str], format: str | None = None, *, allow_layer_norm: bool = False
) -> DictionaryWeights:
    """The dictionary of a folder (or of one of its files), in float32, working on raw activations.

    `format` is one of READABLE; without it the files decide. A dictionary that normalises every row itself is refused
    unless `allow_layer_norm` is set; what you get then has `input_norm` = "layer_norm". Raises ExchangeError naming the
    file and the field that is missing, damaged or cannot be represented.
    """
    path = Path(path)
    if not path.exists():
        raise ExchangeError(f"{path} does not exist")
    if format is None:
        format = detect(path)
    check_choice(path, "format", format, READABLE)
    names_a_file = path.suffix == ".pt" and format in ("openai", "dictionary_learning")
    place = path if path.is_dir() or names_a_file else _folder(path)
    return FORMATS[format].read(place, allow_layer_norm)


def write(weights: DictionaryWeights, folder: str | os.PathLike[str], format: str = "saelens") -> Path:
    """Write a dictionary into a folder (made if missing) in one of the WRITABLE formats, and return the folder.

    Each file is written whole and then renamed, the config last. Raises ExchangeError for what the format has no way
    to say, and where the folder holds a dictionary of another format.
    """
    folder = Path(folder)
    check_choice(folder, "format", format, WRITABLE)
    weights.validate("dictionary to write")
    others = [name for name in _matches(folder) if name != format] if folder.is_dir() else []
    if others:
        raise ExchangeError(f"{folder} already holds a dictionary in the format {others[0]}; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    writer = FORMATS[format].write
    assert writer is not None
    writer(weights, folder)
    return folder


def detect(path: str | os.PathLike[str]) -> str:
    """Name of the format that a folder, or the folder of a file, holds. Raises ExchangeError listing all formats."""
    path = Path(path)
    if path.is_file() and path.suffix == ".pt":
        has_config = (_folder(path) / dictionary_learning.CONFIG_FILE).is_file()
        return "dictionary_learning" if has_config and path.name.startswith("ae") else "openai"
    folder = path if path.is_dir() else _folder(path)
    found = _matches(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise ExchangeError(f"{folder} could be {' or '.join(found)}; say which with format=...")
    wanted = "; ".join(f"{name}: {', '.join(form.files)}" for name, form in FORMATS.items())
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"
    raise ExchangeError(f"{folder} holds no dictionary in a known format. Looked for {wanted}. Found {there}")


def _folder(path: Path) -> Path:
    """Folder of the dictionary that a file belongs to."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _matches(folder: Path) -> list[str]:
    found = [name for name, form in FORMATS.items() if all(any(folder.glob(file)) for file in form.files)]
    specific = [name for name in found if name != "openai"]  # any folder of .pt files looks like OpenAI's
    return specific or found


def _only_pt(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.pt"))
    if len(files) != 1:
        raise ExchangeError(f"{path} holds {len(files)} .pt files; name one")
    return files[0]
