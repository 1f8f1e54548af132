"""Features of a site, drawn and written file by file, by this process or by several."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

from saeql.store.feature_batch import FeatureBatch
from saeql.store.feature_store import FeatureStore

from ..browser.feature_page import feature_page, snippets
from .files import SiteFiles, Written
from .pages import Shown, SitePages

#: Features that are read at once.
BATCH_FEATURES = 512
#: Of every process, for the engine.
MEMORY = "1GB"
#: Where a feature's HTML is cut: like parts of neighbouring features stand together in a file and take a quarter less.
_PARTS = re.compile(r"<(?:section|figure|div class=\"(?:main|side)-column\")\b")


@dataclass(frozen=True)
class Job:
    """What a process needs to know to draw features of a site into `folder`."""

    store: Path
    folder: Path
    dictionaries: Sequence[Shown]
    shown_run: str
    features_per_file: int

    @property
    def batches(self) -> list[tuple[int, int, int]]:
        """(dictionary, first place, end) of what is drawn at once; whole files each."""
        step = max(BATCH_FEATURES // self.features_per_file, 1) * self.features_per_file
        return [
            (number, start, min(start + step, len(shown.features)))
            for number, shown in enumerate(self.dictionaries)
            for start in range(0, len(shown.features), step)
        ]


def write_features(job: Job, store: FeatureStore, workers: int) -> Iterator[tuple[int, Written]]:
    """Write all features; yields how many were drawn, and their files, batch by batch in order."""
    if workers <= 1 or len(job.batches) == 1:
        drawer = _Drawer(job, store)
        for batch in job.batches:
            yield batch[2] - batch[1], drawer.write(batch)
        return
    with ProcessPoolExecutor(
        min(workers, len(job.batches)), get_context("spawn"), initializer=_Drawer.start, initargs=(job,)
    ) as pool:
        for batch, written in zip(job.batches, pool.map(_Drawer.work, job.batches), strict=True):
            yield batch[2] - batch[1], written


class _Drawer:
    """Draws in one process."""

    _mine: ClassVar["_Drawer | None"] = None

    def __init__(self, job: Job, store: FeatureStore):
        self.job, self.store = job, store
        self.pages = SitePages(store, job.dictionaries, job.shown_run, job.features_per_file)
        self._whole = [store.receipts(None, dictionary=shown.name) for shown in job.dictionaries]

    @classmethod
    def start(cls, job: Job) -> None:
        cls._mine = cls(job, FeatureStore.open(job.store, threads=1, memory_limit=MEMORY))

    @classmethod
    def work(cls, batch: tuple[int, int, int]) -> Written:
        assert cls._mine is not None
        return cls._mine.write(batch)

    def write(self, batch: tuple[int, int, int]) -> Written:
        """Write the files of one batch."""
        number, start, stop = batch
        shown, size, files = self.job.dictionaries[number], self.job.features_per_file, SiteFiles(self.job.folder)
        found = FeatureBatch(self.store, shown.features[start:stop].tolist(), shown.name)
        for first in range(0, stop - start, size):
            cut = [self._parts(found, feature, number) for feature in found.features[first : first + size]]
            width = max(map(len, cut))
            together = [[parts[n] if n < len(parts) else "" for parts in cut] for n in range(width)]
            files.data(f"{number}/f{(start + first) // size}", {"parts": together})
        return files.written

    def _parts(self, batch: FeatureBatch, feature: int, number: int) -> list[str]:
        name = self.job.dictionaries[number].name
        page = feature_page(batch, feature, dictionary=name, whole=self._whole[number], shade=True, both=True)
        html = self.pages.card(page, name, snippets(page, self.job.shown_run))
        cuts = [0, *(found.start() for found in _PARTS.finditer(html)), len(html)]
        return [html[start:end] for start, end in pairwise(cuts)]
