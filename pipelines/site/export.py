"""`saeql export --format site`: a store as a folder of pages, data and scripts, written whole or not at all."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from saeql.store.feature_batch import FeatureBatch
from saeql.store.feature_store import FeatureStore

from ..browser.feature_page import feature_page, snippets
from ..progress import progress
from ..stores import store_path
from .files import MARK, SiteError, SiteFiles, new_folder
from .list_data import write_list_data
from .pages import Shown, SitePages
from .token_index import write_token_index
from .word_index import write_word_index

#: Features that are read at once.
BATCH_FEATURES = 512
FEATURES_PER_FILE = 16
#: Where a feature's HTML is cut: like parts of neighbouring features stand together in a file and take a third less.
_PARTS = re.compile(r"(?=<(?:section|figure|div class=\"(?:main|side)-column\")\b)")


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
) -> WrittenSite:
    """Write the store at `source` (a run, or a store alone) as a site into folder `out`.

    `dictionary` names those to show, all unless named; `only` is a SQL condition on the view `features`; `top` as many
    features, those of the best labels. Raises SiteError for a folder in use or nothing to show, StoreError and
    FeatureNotFound for what the store has not, SQLError for a condition that is none.
    """
    if features_per_file < 1 or (top is not None and top < 1):
        raise SiteError("--features-per-file and --top count from 1")
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
        pages = SitePages(store, shown, source.resolve().name, features_per_file)
        for number, one in enumerate(shown):
            write_list_data(files, str(number), store.cards(one.name), one.features, one.kinds)
            write_word_index(files, str(number), store, one.name, one.features)
            write_token_index(files, str(number), store, one.name, one.features)
            _write_features(files, str(number), store, pages, one)
        pages.write_static(files)
        pages.write(files, run)
        num_features = sum(len(one.features) for one in shown)
        files.write(".nojekyll", b"")
        mark = {"saeql": version("saeql"), "features": num_features, "version": files.version}
        files.write(MARK, (json.dumps(mark) + "\n").encode())
    return WrittenSite(out, num_features, files.num_files, files.num_bytes)


def _shown(store: FeatureStore, name: str, only: str | None, top: int | None) -> Shown:
    cards = store.cards(name)
    features = cards.features.astype(np.int64)
    if only is not None or top is not None:
        features = np.array(
            sorted(store.matching(only or "true", limit=top or len(features), dictionary=name)), np.int64
        )
    kinds = sorted(set(cards.column("kind").take(cards.rows(features)).to_pylist()))
    return Shown(name, features, len(cards.features), kinds)


def _write_features(files: SiteFiles, place: str, store: FeatureStore, pages: SitePages, shown: Shown) -> None:
    """Files of features, as they stand in the page that a script fills."""
    size = pages.features_per_file
    whole = store.receipts(None, dictionary=shown.name)
    step = max(BATCH_FEATURES // size, 1) * size
    with progress(shown.name, len(shown.features), "features") as advance:
        for start in range(0, len(shown.features), step):
            batch = FeatureBatch(store, shown.features[start : start + step].tolist(), shown.name)
            for first in range(0, len(batch.features), size):
                cut = [_parts(pages, batch, f, shown.name, whole) for f in batch.features[first : first + size]]
                width = max(map(len, cut))
                together = [[parts[n] if n < len(parts) else "" for parts in cut] for n in range(width)]
                files.data(f"{place}/f{(start + first) // size}", {"parts": together})
            advance(len(batch.features))


def _parts(pages: SitePages, batch: FeatureBatch, feature: int, name: str, whole: list) -> list[str]:
    page = feature_page(batch, feature, dictionary=name, whole=whole, shade=True)
    return _PARTS.split(pages.card(page, name, snippets(page, pages.shown_run)))
