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
from saeql.store.errors import StoreError
from saeql.store.evidence import Evidence

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
    """Evidence of other runs that this run's store holds too."""
    file = run / STORE_FILE
    if not file.exists():
        return []
    return [Evidence(run / name) for name in json.loads(file.read_text(encoding="utf-8"))["add"]]


@contextmanager
def added_evidence(run: Path, others: list[Path]) -> Iterator[None]:
    """Let the store of `run` hold the evidence of other runs or evidence folders from now on, unless it is refused in
    the block that builds it.

    Raises ConfigError for a folder without evidence.
    """
    before = [str(e.folder.relative_to(run)) for e in more_evidence(run)]
    names = list(before)
    for other in others:
        folder = other / "evidence" if (other / "evidence").is_dir() else other
        if not Evidence(folder).has("dictionaries"):
            raise ConfigError(f"{other} has no evidence: name a run that is indexed, or its evidence folder")
        name = os.path.relpath(folder.resolve(), run.resolve())
        if name not in names and name != "evidence":
            names.append(name)
    if names != before:
        _write_added(run, names)
    try:
        yield
    except StoreError:
        if names != before:
            _write_added(run, before)
        raise


def _write_added(run: Path, names: list[str]) -> None:
    write_whole(run / STORE_FILE, json.dumps({"add": names}, indent=2) + "\n")
