"""A dictionary from anywhere, and where in a run's model it belongs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeql.sae.config import ConfigError, suggestion
from saeql.sae.files import DictionaryError
from saeql.sae.hook_points import resolve
from saeql.sae.model import SparseAutoencoder
from saeql.sae.trainer import Places

from .dictionaries import dictionary_homes, load_any
from .models import ModelIdentity, load_skeleton

if TYPE_CHECKING:
    from .run import Run

#: Metadata keys of other libraries that say where a dictionary reads; with `_out` behind them, where it writes.
HOOK_KEYS = ("hook_name", "hf_hook_name", "hook_point")


def find_dictionary(
    run: "Run",
    source: str,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    *,
    allow_mismatch: bool = False,
) -> tuple[str, SparseAutoencoder, Places]:
    """Name, dictionary and hook points of `source`: a name in the run or its sweep, or a folder or file.

    `reads` and `writes` unset are what the dictionary's metadata says, or the run's only hook point.
    Raises DictionaryError where there is none or it is damaged, ExchangeError for another library's that cannot be
    read, ModelMismatch where it was trained on another model, ConfigError where it does not fit what is harvested.
    """
    path = dictionary_path(run, source)
    dictionary = load_any(path)
    places = _places(run, dictionary, tuple(reads), tuple(writes))
    _require_fit(run, dictionary, places, source)
    identity = dictionary.metadata.get("saeql", {}).get("identity")
    if identity:
        here = run.harvest_info.identity.at(places.reads)
        ModelIdentity(**identity).require(here, allow_mismatch=allow_mismatch)
    return path.name, dictionary, places


def dictionary_path(run: "Run", source: str) -> Path:
    """Where `source` lies: a name in the run or its sweep, or a folder or file. Raises DictionaryError for neither."""
    homes = dictionary_homes(run.path)
    for path in (*(home / source for home in homes), Path(source).expanduser()):
        if path.exists():
            return path
    known = sorted(path.name for home in homes if home.exists() for path in home.iterdir())
    raise DictionaryError(
        f"no dictionary {source!r}: neither a path nor one of {', '.join(known) or 'the run (it has none yet)'}"
        f"{suggestion(source, known)}"
    )


def _places(run: "Run", dictionary: SparseAutoencoder, reads: tuple[str, ...], writes: tuple[str, ...]) -> Places:
    one_place = dictionary.reads_what_it_writes
    reads = reads or dictionary.config.reads or _named_in_metadata(run, dictionary.metadata, "")
    writes = writes or dictionary.config.writes or _named_in_metadata(run, dictionary.metadata, "_out")
    harvested = run.config.model.hook_points
    if not reads and one_place and len(harvested) == 1:
        reads = harvested
    if one_place:
        reads = writes = reads or writes
    if not reads or not writes:
        missing = "--reads" if not reads else "--writes"
        raise ConfigError(
            f"the dictionary does not say at which hook point it belongs: name it with {missing}; "
            f"harvested are {', '.join(harvested)}"
        )
    return Places(reads, writes)


def _named_in_metadata(run: "Run", metadata: dict[str, Any], suffix: str) -> tuple[str, ...]:
    """The harvested hook point that another library's metadata means; none where it names none of them."""
    named = {metadata.get(key + suffix) for key in HOOK_KEYS} - {None}
    if not named:
        return ()
    whole = load_skeleton(run.config.model)
    for name in run.config.model.hook_points:
        point = resolve(whole, name)
        aliases = {name, point.transformer_lens_name} | ({point.module_path} if point.side == "out" else set())
        if named & aliases:
            return (name,)
    return ()


def _require_fit(run: "Run", dictionary: SparseAutoencoder, places: Places, source: str) -> None:
    widths = run.harvest_info.widths
    for name in (*places.reads, *places.writes):
        if name not in widths:
            raise ConfigError(
                f"{source} reads or writes {name!r}, which {run.path} has not harvested; it has {', '.join(widths)}"
                f"{suggestion(name, list(widths))}"
            )
    for what, names, wanted in (("reads", places.reads, dictionary.d_in), ("writes", places.writes, dictionary.d_out)):
        found = sum(widths[name] for name in names)
        if found != wanted:
            raise ConfigError(f"{source} {what} {wanted} coordinates, {' + '.join(names)} has {found}")
