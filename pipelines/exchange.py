"""Dictionaries in and out: folders and hub repositories of other libraries, runs and folders of ours."""

from pathlib import Path

from saeql.sae.convert import from_weights, to_weights
from saeql.sae.exchange import read, write
from saeql.sae.files import CONFIG_FILE, load_dictionary, save_dictionary

from .models import hub_folder
from .run import Run
from .share import import_store


def import_any(source: str, out: Path, *, format: str | None = None, revision: str | None = None) -> str:
    """Take in a shared store (format "parquet") or a dictionary; returns one line about it."""
    if format == "parquet":
        path = Path(source).expanduser()
        built = import_store(path if path.exists() else hub_folder(source, revision, ("*.parquet", "*.md")), out)
        return f"{built}: ask it with `saeql search {out} ...` and `saeql sql {out} ...`"
    return import_dictionary(source, out, format=format, revision=revision)


def import_dictionary(source: str, out: Path, *, format: str | None = None, revision: str | None = None) -> str:
    """Read a dictionary of another library into folder `out`; returns one line about it.

    A name that is no local path is taken as a hub repository. Raises ExchangeError for what cannot be read or
    represented, ModelError where the hub cannot be reached.
    """
    path = Path(source).expanduser()
    folder = path if path.exists() else hub_folder(source, revision, ("*.npz", "*.pt"))
    dictionary = from_weights(read(folder, format))
    save_dictionary(dictionary, out)
    kind = f"{dictionary.architecture} {dictionary.config.form}"
    return f"{out}: {kind}, d_in {dictionary.d_in}, d_out {dictionary.d_out}, d_sae {dictionary.d_sae}"


def export_dictionary(source: Path, out: Path, *, format: str = "saelens") -> str:
    """Write the dictionary of a run, or of a dictionary folder, in `format` into folder `out`; returns one line.

    Raises ExchangeError for what the format cannot say, DictionaryError where there is no dictionary.
    """
    is_folder = (source / CONFIG_FILE).exists()
    dictionary = load_dictionary(source) if is_folder else Run.open(source).dictionary()
    write(to_weights(dictionary), out, format)
    return f"{out}: {format}"
