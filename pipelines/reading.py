"""Documents -> windows in batches, from any place on: the reading side of a harvest.

Reading goes in *sets*: a set ends with the batch after which some split has `windows_per_shard` windows. That batch
carries a `Mark`, from which another reader goes on with exactly the windows that follow, without reading or tokenising
again what lies before: the place in every source, the tokens that wait for their window to be full, and the counters.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from saeql.store.records import SPLITS

from .corpus import CorpusConfig, CorpusReader, Document
from .harvest_config import HarvestConfig
from .models import LanguageModel
from .windows import WindowPacker, WindowRules

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Mark:
    """The end of a set: where to go on, and what was read in the set."""

    state: dict[str, Any]  # for JSON
    seen: np.ndarray  # [n] uint64, digests of the set's documents, those without a token included
    documents: list[dict[str, Any]]  # rows of the evidence table `documents`
    is_last: bool


@dataclass(frozen=True)
class WindowBatch:
    """W windows of T positions; W may be 0 where nothing but the mark is left to say."""

    splits: np.ndarray  # [W] of str
    token_ids: np.ndarray  # [W, T] int32
    document_ids: np.ndarray  # [W, T] int32
    window_ids: np.ndarray  # [W] int32
    mark: Mark | None  # set on the last batch of a set

    def of_split(self, split: str) -> np.ndarray:
        """Numbers [w] of the windows of a split."""
        return np.flatnonzero(self.splits == split)


class WindowReader:
    """Reads one part of a corpus. `state` and `seen` are those of the marks up to where it goes on."""

    def __init__(
        self,
        lm: LanguageModel,
        corpus: CorpusConfig,
        config: HarvestConfig,
        *,
        part: int = 0,
        state: dict[str, Any] | None = None,
        seen: Iterator[np.ndarray] | None = None,
    ):
        self.lm, self.corpus, self.config, self.part = lm, corpus, config, part
        self.rules = WindowRules.of(corpus, lm)
        self.packers = {s: WindowPacker(config.context_tokens, self.rules) for s in SPLITS}
        self.num_windows = 0
        shares, budget = corpus.split_shares(), corpus.max_tokens / config.parts
        self.left = {s: budget * share for s, share in shares.items()} if corpus.max_tokens else None
        self.reader = CorpusReader(
            corpus,
            lm.tokenizer,
            tokenizer_sha256=lm.identity.tokenizer_sha256,
            state=state and state["reader"],
            part=part,
            parts=config.parts,
        )
        for digests in seen or ():
            self.reader.seen.update(digests)
        self.reader.seen.take_new()
        self._documents: list[dict[str, Any]] = []
        if state is not None:
            self.left, self.num_windows = state["left"], state["num_windows"]
            for split, packer in self.packers.items():
                packer.restore(state["packers"][split])

    def batches(self) -> Iterator[WindowBatch]:
        """Windows in batches, until every split has its share of `max_tokens` or the text ends."""
        found: list[tuple[str, np.ndarray, np.ndarray]] = []
        counts: Counter[str] = Counter()
        for window in self._windows():
            found.append(window)
            counts[window[0]] += 1
            if len(found) == self.config.batch_windows:
                is_end = max(counts.values()) >= self.config.windows_per_shard
                yield self._batch(found, is_end=is_end)
                found = []
                if is_end:
                    counts.clear()
        yield self._batch(found, is_end=True, is_last=True)

    def _batch(
        self, found: list[tuple[str, np.ndarray, np.ndarray]], *, is_end: bool, is_last: bool = False
    ) -> WindowBatch:
        shape = (len(found), self.config.context_tokens)
        numbers = np.arange(self.num_windows, self.num_windows + len(found), dtype=np.int32)
        self.num_windows += len(found)
        return WindowBatch(
            splits=np.array([split for split, _, _ in found], dtype=str),
            token_ids=np.array([ids for _, ids, _ in found], np.int32).reshape(shape),
            document_ids=np.array([owners for _, _, owners in found], np.int32).reshape(shape),
            window_ids=numbers * self.config.parts + self.part,
            mark=self._mark(is_last) if is_end else None,
        )

    def _mark(self, is_last: bool) -> Mark:
        state = {
            "reader": self.reader.position(),
            "left": None if self.left is None else dict(self.left),
            "packers": {split: packer.state() for split, packer in self.packers.items()},
            "num_windows": self.num_windows,
            "report": self.reader.report(),
        }
        documents, self._documents = self._documents, []
        return Mark(state, self.reader.seen.take_new(), documents, is_last)

    def _windows(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for split, packer in self.packers.items():  # what a document that was begun before the mark still has
            yield from ((split, *window) for window in packer.windows())
        if self._is_full():
            return
        for document in self.reader:
            split = document.split
            if self.left is not None and self.left[split] <= 0:
                continue
            ids = self._token_ids(document, None if self.left is None else int(self.left[split]))
            if not ids:
                continue
            if self.left is not None:
                self.left[split] -= len(ids)
            self._documents.append(self._row(document, len(ids)))
            self.packers[split].push(ids, document.document_id)
            yield from ((split, *window) for window in self.packers[split].windows())
            if self._is_full():
                return

    def _is_full(self) -> bool:
        return self.left is not None and max(self.left.values()) <= 0

    def _token_ids(self, document: Document, room: int | None) -> list[int]:
        heldout = document.split != "train"
        limit = self.config.max_heldout_document_tokens if heldout else self.corpus.max_document_tokens
        ids = document.token_ids
        if ids is None:
            ids = self.lm.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        taken = list(ids[: limit if room is None else min(limit, max(1, room))])
        self.reader.credit(document, len(taken), is_cut=len(ids) > limit)
        return taken

    def _row(self, document: Document, num_tokens: int) -> dict[str, Any]:
        return {
            "document_id": document.document_id,
            "split": document.split,
            "title": document.title,
            "source": self.corpus.sources[document.source].source,
            "num_tokens": num_tokens,
            "sha256": document.sha256,
        }


def one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items; while one is used a thread makes the next."""
    end: Any = object()
    with ThreadPoolExecutor(1, "reader") as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item
