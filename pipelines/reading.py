"""Documents -> windows in batches, from any place on: the reading side of a harvest.

Reading goes in *sets*: a set ends with the batch after which some split has `windows_per_shard` windows. That batch
carries a `Mark`, from which another reader goes on with exactly the windows that follow, without reading or tokenising
again what lies before: the place in every source, the tokens that wait for their window to be full, and the counters.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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


def wanted_tokens(corpus: CorpusConfig, config: HarvestConfig) -> dict[str, float]:
    """Tokens to be read of every split; infinite where the text decides."""
    shares = corpus.split_shares()
    wanted = {split: corpus.max_tokens * share if corpus.max_tokens else math.inf for split, share in shares.items()}
    return {**wanted, "train": min(wanted["train"], config.max_train_tokens or math.inf)}


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
    """Reads one part of a corpus. `state` and `seen` are those of the marks up to where it goes on.

    Only windows of `splits` are made. Of a mixture the other documents are tokenised all the same: which source comes
    next depends on what was taken of all.
    """

    def __init__(
        self,
        lm: LanguageModel,
        corpus: CorpusConfig,
        config: HarvestConfig,
        *,
        part: int = 0,
        state: dict[str, Any] | None = None,
        seen: Iterable[np.ndarray] = (),
        splits: Sequence[str] = SPLITS,
    ):
        self.splits = splits
        self.lm, self.corpus, self.config, self.part = lm, corpus, config, part
        self.rules = WindowRules.of(corpus, lm)
        self.packers = {s: WindowPacker(config.context_tokens, self.rules) for s in SPLITS}
        self.num_windows = 0
        self.left = {split: tokens / config.parts for split, tokens in wanted_tokens(corpus, config).items()}
        self.reader = CorpusReader(
            corpus,
            lm.tokenizer,
            tokenizer_sha256=lm.identity.tokenizer_sha256,
            state=state and state["reader"],
            part=part,
            parts=config.parts,
        )
        for digests in seen:
            self.reader.seen.update(digests)
        self.reader.seen.take_new()
        self._documents: list[dict[str, Any]] = []
        if state is not None:
            self.left = {split: math.inf if left is None else left for split, left in state["left"].items()}
            self.num_windows = state["num_windows"]
            for split, packer in self.packers.items():
                packer.restore(state["packers"][split])

    def batches(self) -> Iterator[WindowBatch]:
        """Windows in batches, until every split has its share of `max_tokens` or the text ends."""
        found: list[tuple[str, np.ndarray, np.ndarray]] = []
        counts: Counter[str] = Counter()
        for window in self.windows():
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
        return Mark({**self.state(), "report": self.reader.report()}, *self.take_read(), is_last)

    def take_read(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Digests [n] and rows of the documents that were read since the last call."""
        documents, self._documents = self._documents, []
        return self.reader.seen.take_new(), documents

    def state(self) -> dict[str, Any]:
        """Where another reader goes on after the last window, for JSON; what was seen is not in it."""
        return {
            "reader": self.reader.position(),
            "left": {split: None if left == math.inf else left for split, left in self.left.items()},
            "packers": {split: packer.state() for split, packer in self.packers.items()},
            "num_windows": self.num_windows,
        }

    def windows(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Split, token ids [T] and document ids [T] of one window after the other."""
        for split, packer in self.packers.items():  # what a document that was begun before the mark still has
            yield from ((split, *window) for window in packer.windows())
        if self._is_full():
            return
        for document in self.reader:
            split = document.split
            if self.left[split] <= 0 or (split not in self.splits and len(self.corpus.sources) == 1):
                continue
            ids = self._token_ids(document)
            self.left[split] -= len(ids)
            if not ids or split not in self.splits:
                continue
            self._documents.append(self._row(document, len(ids)))
            self.packers[split].push(ids, document.document_id)
            yield from ((split, *window) for window in self.packers[split].windows())
            if self._is_full():
                return

    def _is_full(self) -> bool:
        return max(self.left[split] for split in self.splits) <= 0

    def _token_ids(self, document: Document) -> list[int]:
        heldout = document.split != "train"
        limit = self.config.max_heldout_document_tokens if heldout else self.corpus.max_document_tokens
        ids = document.token_ids
        if ids is None:
            ids = self.lm.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        left = self.left[document.split]
        taken = list(ids[: limit if left == math.inf else min(limit, max(1, int(left)))])
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
