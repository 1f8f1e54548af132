"""Windows of the train split in the order of the text, and the place in it: what training reads from a live model.

They are those that a harvest would store: the same documents, cut and packed under the same rules.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .corpus import CorpusConfig, CorpusReader, Document
from .harvest import HarvestConfig
from .models import LanguageModel
from .windows import WindowPacker, WindowRules


@dataclass(frozen=True)
class WindowBatch:
    """Windows that go through the model together."""

    token_ids: NDArray[np.int32]  # [B, T]
    document_ids: NDArray[np.int32]  # [B, T]
    first: int  # place of the first of them among the windows of the epoch


class TrainWindows:
    """One pass over the train split; `state()` between two calls of `take` is where another pass goes on."""

    def __init__(
        self,
        language_model: LanguageModel,
        corpus: CorpusConfig,
        config: HarvestConfig,
        state: Mapping[str, Any] | None = None,
    ):
        self.lm, self.corpus, self.config = language_model, corpus, config
        self.packer = WindowPacker(config.context_tokens, WindowRules.of(corpus, language_model))
        self.num_taken = 0
        self._num_read = dict.fromkeys(corpus.split_shares(), 0)  # tokens, by split
        self.reader = CorpusReader(
            corpus,
            language_model.tokenizer,
            tokenizer_sha256=language_model.identity.tokenizer_sha256,
            state=state["corpus"] if state is not None else None,
        )
        if state is not None:
            self.num_taken, self._num_read = state["num_taken"], dict(state["num_read"])
            self.packer.restore(state["packer"])
        self._windows = self._packed()

    def take(self, count: int) -> WindowBatch | None:
        """The next windows, fewer than `count` where the text ends; None where it has ended."""
        taken = list(islice(self._windows, count))
        if not taken:
            return None
        first, self.num_taken = self.num_taken, self.num_taken + len(taken)
        ids, documents = (np.stack(column) for column in zip(*taken, strict=True))
        return WindowBatch(ids, documents, first)

    def state(self) -> dict[str, Any]:
        """Plain form of the place after the last window taken, for JSON."""
        return {
            "corpus": self.reader.state(),
            "packer": self.packer.state(),
            "num_taken": self.num_taken,
            "num_read": dict(self._num_read),
        }

    def _packed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(token_ids [T], document_ids [T]) of every window; what waits in the packer comes first."""
        yield from self.packer.windows()
        documents = iter(self.reader)
        is_mixture = len(self.reader.progress) > 1
        while self._left("train") > 0 and (document := next(documents, None)) is not None:
            split = document.split
            # what a mixture reads next depends on the tokens taken of all splits
            if self._left(split) <= 0 or (split != "train" and not is_mixture):
                continue
            ids = self._token_ids(document)
            self._num_read[split] += len(ids)
            if ids and split == "train":
                self.packer.push(ids, document.document_id)
                yield from self.packer.windows()

    def _left(self, split: str) -> float:
        """Tokens of a split that are still to be read."""
        if not self.corpus.max_tokens:
            return math.inf
        return self.corpus.max_tokens * self.corpus.split_shares()[split] - self._num_read[split]

    def _token_ids(self, document: Document) -> list[int]:
        limit = self.corpus.max_document_tokens
        if document.split != "train":
            limit = self.config.max_heldout_document_tokens
        ids = document.token_ids
        if ids is None:
            ids = self.lm.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        left = self._left(document.split)
        taken = list(ids[: limit if left == math.inf else min(limit, max(1, int(left)))])
        self.reader.credit(document, len(taken), is_cut=len(ids) > limit)
        return taken
