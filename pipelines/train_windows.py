"""Windows of the train split in the order of the text, and the place in it: what training reads from a live model.

They are those that a harvest would store: the same reader makes them.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .corpus import CorpusConfig
from .harvest_config import HarvestConfig
from .models import LanguageModel
from .reading import WindowReader


@dataclass(frozen=True)
class TrainBatch:
    """Windows that go through the model together."""

    token_ids: NDArray[np.int32]  # [B, T]
    document_ids: NDArray[np.int32]  # [B, T]
    first: int  # place of the first of them among the windows of the epoch


class TrainWindows:
    """One pass over the train split; `state()` between two calls of `take` is where another pass goes on.

    `part` of `parts` reads its own rows of every source, with its share of `corpus.max_tokens`.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        corpus: CorpusConfig,
        config: HarvestConfig,
        state: Mapping[str, Any] | None = None,
        *,
        part: int = 0,
        parts: int = 1,
    ):
        self.num_taken = state["num_taken"] if state else 0
        self.reader = WindowReader(
            language_model,
            corpus,
            replace(config, max_train_tokens=0, parts=parts),
            part=part,
            state=dict(state["reader"]) if state else None,
            seen=[np.frombuffer(base64.b64decode(state["seen"]), "<u8")] if state else (),
            splits=("train",),
        )
        self._windows = self.reader.windows()

    def take(self, count: int) -> TrainBatch | None:
        """The next windows, fewer than `count` where the text ends; None where it has ended."""
        taken = [(ids, documents) for _, ids, documents in islice(self._windows, count)]
        if not taken:
            return None
        self.reader.take_read()  # which nobody asks for here
        first, self.num_taken = self.num_taken, self.num_taken + len(taken)
        ids, documents = (np.stack(column) for column in zip(*taken, strict=True))
        return TrainBatch(ids, documents, first)

    def state(self) -> dict[str, Any]:
        """Plain form of the place after the last window taken, for JSON."""
        seen = base64.b64encode(self.reader.reader.seen.sorted().tobytes()).decode()
        return {"reader": self.reader.state(), "seen": seen, "num_taken": self.num_taken}
