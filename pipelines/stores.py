"""The store that a path means: of a run, of a folder that was imported, a folder in Parquet, or a store's own file."""

from pathlib import Path
from typing import TYPE_CHECKING

from saeql.store.parquet_store import is_parquet_store

if TYPE_CHECKING:
    from saeql.store.feature_store import FeatureStore

    from .run import Run

_FILE, _PARQUET = "features.duckdb", "features.parquet"


def store_path(path: Path) -> Path:
    """The file, or the folder in Parquet, that holds the store at `path`.

    Raises RunError where there is none: what a run without one lacks, its store's own errors say.
    """
    is_run = (path / "config.toml").is_file()
    if path.is_file() or (not is_run and is_parquet_store(path) and not (path / _FILE).is_file()):
        return path
    if is_run or (path / _FILE).is_file():
        return path / (_FILE if (path / _FILE).is_file() or not is_parquet_store(path / _PARQUET) else _PARQUET)
    from .run import RunError  # slow to import, and rarely needed

    raise RunError(
        f"no run and no store in {path}: it has neither config.toml nor {_FILE} nor a store in Parquet (start a run "
        "with `saeql run` or `saeql demo`)"
    )


def open_store(path: Path) -> "tuple[FeatureStore, Run | None]":
    """The opened store at `path`, and the run that it is of; None where there is only the store.

    Raises RunError where there is neither, StoreError where the file is no store.
    """
    from saeql.store.feature_store import FeatureStore

    if not (path / "config.toml").is_file():
        return for_notebooks(FeatureStore.open(store_path(path))), None
    from .run import Run

    run = Run.open(path)
    return run.store(), run


def for_notebooks(store: "FeatureStore") -> "FeatureStore":
    """The store, whose features a notebook shows as cards."""

    def draw(store: "FeatureStore", feature: int, dictionary: str) -> str:
        from .browser.notebook import feature_html

        return feature_html(store, feature, dictionary)

    store.draw = draw
    return store
