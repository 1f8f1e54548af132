"""Where evidence comes from, and which other evidence a run's store holds."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa

from saeql.sae.config import ConfigError, to_dict
from saeql.store.evidence import Evidence
from saeql.store.names import name_apart

from .atomic import write_whole
from .config import RunConfig
from .harvest import HarvestInfo

#: Folders besides the run's own, relative to it.
STORE_FILE = "store.json"
_FOLDERS = re.compile(r"(?<![\w./:])/(?:[^/\s\"]+/)+")


def provenance(run: str, dictionary: str, config: RunConfig, info: HarvestInfo, evidence: Evidence) -> pa.Table:
    """The row of evidence table `runs` for a dictionary that was just indexed."""
    documents = evidence.read("documents", columns=["document_id", "sha256"]).sort_by("document_id")
    fingerprint = hashlib.sha256(",".join(h for h in documents["sha256"].to_pylist() if h).encode()).hexdigest()
    return pa.Table.from_pylist(
        [
            {
                "dictionary": dictionary,
                "run": run,
                "corpus": _without_folders(config.corpus.title),
                "model_name": _without_folders(info.identity.model_name),
                "model_revision": config.model.revision,
                "model_sha256": info.identity.model_sha256,
                "tokenizer_sha256": info.identity.tokenizer_sha256,
                "dataset_fingerprint": fingerprint,
                "code_version": _code_version(),
                "config": _without_folders(json.dumps(to_dict(config), default=str)),
                "indexed": datetime.now(UTC).replace(tzinfo=None, microsecond=0),
            }
        ]
    )


def _without_folders(text: str) -> str:
    """Absolute paths as their last part: a store is asked by others, whom folders of this machine do not concern."""
    return _FOLDERS.sub("", text)


def _code_version() -> str:
    try:
        return version("saeql")
    except PackageNotFoundError:  # linked sources, not installed
        return "unknown"


def more_evidence(run: Path) -> list[Evidence]:
    """Evidence of other runs that this run's store holds too, with the names that their dictionaries have in it."""
    file = run / STORE_FILE
    if not file.exists():
        return []
    held = json.loads(file.read_text(encoding="utf-8"))
    return [_evidence_at(run, name, held.get("names", {}).get(name)) for name in held["add"]]


def _evidence_at(run: Path, place: str, names: dict[str, str] | None = None) -> Evidence:
    return Evidence(os.path.normpath(run / place), names)


@contextmanager
def added_evidence(run: Path, others: list[Path], name: str | None = None) -> Iterator[list[Evidence]]:
    """Let the store of `run` hold the evidence of other runs or evidence folders from now on, unless it is refused in
    the block that builds it, which is given what is new.

    A dictionary whose name another one has already is called NAME@RUN in the store; `name` is what the only dictionary
    of the only one of `others` is to be called. Raises ConfigError for a folder without evidence, StoreError where
    `name` cannot be given.
    """
    before = more_evidence(run)
    held, new = list(before), []
    if name is not None and len(others) != 1:
        raise ConfigError(f"a name is for the dictionary of one run, and {len(others)} are to be added")
    for other in others:
        folder = other / "evidence" if (other / "evidence").is_dir() else other
        if not Evidence(folder).has("dictionaries"):
            raise ConfigError(f"{other} has no evidence: name a run that is indexed, or its evidence folder")
        place = os.path.relpath(folder.resolve(), run.resolve())
        known = next((n for n, e in enumerate(held) if os.path.relpath(e.folder, run) == place), None)
        if place == "evidence" and name is not None:
            raise ConfigError(f"{other} is the run of this store: its dictionary keeps its name")
        if place == "evidence" or (known is not None and name is None):
            continue
        rest = [Evidence(run / "evidence"), *(e for n, e in enumerate(held) if n != known)]
        found = name_apart(rest, _evidence_at(run, place), other.resolve().name, name)
        held = [*held, found] if known is None else [*held[:known], found, *held[known + 1 :]]
        new.append(found)
    if new:
        _write_added(run, held)
    try:
        yield new
    except Exception:
        if new:
            _write_added(run, before)
        raise


def _write_added(run: Path, held: list[Evidence]) -> None:
    places = {os.path.relpath(e.folder, run): e.names for e in held}
    names = {place: own for place, own in places.items() if own}
    content = {"add": list(places)} | ({"names": names} if names else {})
    write_whole(run / STORE_FILE, json.dumps(content, indent=2) + "\n")
