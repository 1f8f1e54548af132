"""`saeql export --format site`: a store as a folder of pages, data and scripts, written whole or not at all."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from saeql.store.feature_store import FeatureStore

from ..progress import progress
from ..stores import store_path
from .feature_files import Job, write_features
from .files import MARK, SiteError, SiteFiles, new_folder
from .list_data import write_list_data
from .pages import Shown, SitePages
from .token_index import write_token_index
from .word_index import write_word_index

FEATURES_PER_FILE = 16


@dataclass(frozen=True)
class WrittenSite:
    """What was written."""

    folder: Path
    num_features: int
    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: site, {self.num_features:,} features in {self.num_files:,} files, "
            f"{self.num_bytes / 1e6:.1f} MB; look at it with `python -m http.server -d {self.folder}`"
        )


def export_site(
    source: Path,
    out: Path,
    *,
    dictionary: Sequence[str] = (),
    only: str | None = None,
    top: int | None = None,
    features_per_file: int = FEATURES_PER_FILE,
    workers: int = 1,
) -> WrittenSite:
    """Write the store at `source` (a run, or a store alone) as a site into folder `out`.

    `dictionary` names those to show, all unless named; `only` is a SQL condition on the view `features`; `top` as many
    features, those of the best labels; `workers` processes draw. Raises SiteError for a folder in use or nothing to
    show, StoreError and FeatureNotFound for what the store has not, SQLError for a condition that is none.
    """
    if min(features_per_file, workers, 1 if top is None else top) < 1:
        raise SiteError("--features-per-file, --workers and --top count from 1")
    path = store_path(source)
    run = source if (source / "config.toml").is_file() else None
    with FeatureStore.open(path, threads=1) as store, new_folder(out) as folder:
        known = [row["dictionary"] for row in store.dictionaries()]
        for name in dictionary:
            store.cards(name)  # raises where it is not there
        shown = [_shown(store, name, only, top) for name in known if not dictionary or name in dictionary]
        if not shown or not any(len(one.features) for one in shown):
            raise SiteError(f"{source} has no feature to show" + (" that meets --only" if only else ""))
        files = SiteFiles(folder)
        job = Job(path, folder, shown, source.resolve().name, features_per_file)
        for number, one in enumerate(shown):
            write_list_data(files, str(number), store.cards(one.name), one.features, one.kinds)
            write_word_index(files, str(number), store, one.name, one.features)
            write_token_index(files, str(number), store, one.name, one.features)
        num_features = sum(len(one.features) for one in shown)
        with progress("features", num_features, "features") as advance:
            for drawn, written in write_features(job, store, workers):
                files.written |= written
                advance(drawn)
        pages = SitePages(store, shown, job.shown_run, features_per_file)
        pages.write_static(files)
        pages.write(files, run)
        files.write(".nojekyll", b"")
        mark = {"saeql": version("saeql"), "features": num_features, "version": files.version}
        files.write(MARK, (json.dumps(mark) + "\n").encode())
    return WrittenSite(out, num_features, len(files.written), files.num_bytes)


def _shown(store: FeatureStore, name: str, only: str | None, top: int | None) -> Shown:
    cards = store.cards(name)
    features = cards.features.astype(np.int64)
    if only is not None or top is not None:
        features = np.array(
            sorted(store.matching(only or "true", limit=top or len(features), dictionary=name)), np.int64
        )
    kinds = sorted(set(cards.column("kind").take(cards.rows(features)).to_pylist()))
    return Shown(name, features, len(cards.features), kinds)
