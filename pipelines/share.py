"""A store as Parquet, the form to share, with a Hugging Face dataset card; and such a folder taken in again.

A DuckDB file from somebody else is never opened: tables are read as Parquet of known columns, checked against the
hashes beside them, and the store is built here.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.integrity import FileHash, find_damage, hash_file
from saeql.store.records import TABLES

from .atomic import write_whole
from .metric_table import paired
from .pages import render

if TYPE_CHECKING:
    from .run import Run

HASHES_FILE = "hashes.json"
STORE_FILE = "features.duckdb"
_SAFE_PATH = re.compile(r"evidence/[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)?\.parquet")
#: Columns in which a local model or text stands with its path.
_NAMES_PATHS = {
    "documents": ("source",),
    "dictionaries": ("model_name", "config"),
    "runs": ("corpus", "model_name", "config"),
}
_PATH = re.compile(r"(?<![\w./:])/(?:[^/\s\"]+/)+([^/\s\"]*)")
_CARD_METRICS = ("fvu", "l0", "dead_share", "ce_increase", "ce_recovered")


class ShareError(ValueError):
    """A shared store is missing, damaged, or holds what a store does not have."""


def export_store(run: "Run", folder: Path) -> Path:
    """Copy the evidence of a run into `folder`, with README.md (a dataset card) and the hash of every file.

    Raises ShareError where the folder is in use, EvidenceError before the run was indexed.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ShareError(f"{folder} is not empty; choose another folder")
    run.evidence.files("dictionaries")  # raises where nothing was indexed
    hashes = {}
    for table in TABLES:
        for file in run.evidence.files(table) if run.evidence.has(table) else ():
            copy = folder / "evidence" / file.relative_to(run.evidence.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if table in _NAMES_PATHS:
                pq.write_table(_without_paths(pq.read_table(file), _NAMES_PATHS[table]), copy, compression="zstd")
            else:
                shutil.copyfile(file, copy)
            hashes[copy.relative_to(folder).as_posix()] = asdict(hash_file(copy))
    write_whole(folder / "README.md", dataset_card(run))
    write_whole(folder / HASHES_FILE, json.dumps(hashes, indent=2) + "\n")
    return folder


def import_store(source: Path, out: Path, *, on_step: Callable[[str, int, int], None] | None = None) -> Path:
    """Check a folder that `export_store` wrote and build `out/features.duckdb` from a copy of its evidence.

    Raises ShareError naming the file that is missing, damaged, or has other columns than its table.
    """
    if out.exists() and any(out.iterdir()):
        raise ShareError(f"{out} is not empty; choose another folder")
    hashes = _read_hashes(source)
    for name, expected in hashes.items():
        file = source / name
        damage = f"{file} is a link" if file.is_symlink() else find_damage(file, expected)
        if damage is not None:
            raise ShareError(f"{damage}; get it again")
        _check_columns(file, Path(name).parts[1].removesuffix(".parquet"))
    for name in hashes:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)
    if (source / "README.md").is_file():
        shutil.copyfile(source / "README.md", out / "README.md")
    return FeatureStore.build(out / STORE_FILE, Evidence(out / "evidence"), on_step=on_step)


def without_paths(text: str) -> str:
    """A text to share: absolute paths of this machine as their last part alone."""
    return _PATH.sub(lambda found: found[1], text)


def _without_paths(table: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    """Absolute paths of this machine as their last part alone."""
    for column in columns:
        texts = [None if t is None else without_paths(t) for t in table[column].to_pylist()]
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(place), pa.array(texts, table.schema.field(place).type))
    return table


def _read_hashes(source: Path) -> dict[str, FileHash]:
    path = source / HASHES_FILE
    try:
        hashes = json.loads(path.read_text(encoding="utf-8"))
        checked = {str(name): FileHash(**entry) for name, entry in hashes.items()}
    except FileNotFoundError:
        raise ShareError(f"{source} holds no shared store: {HASHES_FILE} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ShareError(f"{path} is not a list of files and hashes") from None
    for name in checked:
        if not _SAFE_PATH.fullmatch(name) or ".." in name:
            raise ShareError(f"{path} names {name!r}, which is no evidence file")
    return checked


def _check_columns(file: Path, table: str) -> None:
    if table not in TABLES:
        raise ShareError(f"{file}: there is no evidence table {table!r}")
    try:
        found = pq.read_schema(file)
    except pa.ArrowException as error:
        raise ShareError(f"{file} is not Parquet: {error}") from None
    wanted = TABLES[table]
    for column in wanted:
        if column.name not in found.names:
            raise ShareError(f"{file} has no column {column.name!r}")
        if found.field(column.name).type != column.type:
            raise ShareError(f"{file}: column {column.name!r} is {found.field(column.name).type}, not {column.type}")


def dataset_card(run: "Run") -> str:
    """README.md of a dataset on the Hugging Face hub: YAML front matter, what the tables hold, what was measured."""
    evidence, config = run.evidence, run.config
    tables = [table for table in TABLES if evidence.has(table)]
    found = {m.name: m for m in paired(evidence.read("metrics").to_pylist())} if evidence.has("metrics") else {}
    model = Path(config.model.name).name if Path(config.model.name).is_absolute() else config.model.name
    return render(
        "dataset_card.md",
        base_model=model if "/" in model and ":" not in model else "",
        tables=[
            (t, f"evidence/{t}.parquet" if evidence.path(t).exists() else f"evidence/{t}/*.parquet") for t in tables
        ],
        row=evidence.read("dictionaries").to_pylist()[0],
        model=model,
        megabytes=sum(file.stat().st_size for table in tables for file in evidence.files(table)) / 1e6,
        text=without_paths(config.corpus.title),
        context_tokens=config.harvest.context_tokens,
        seed=config.seed,
        metrics=[found[name] for name in _CARD_METRICS if name in found],
    )
