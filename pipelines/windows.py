"""Windows: token ids of documents laid out as model inputs, under explicit rules for BOS, separators and borders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .corpus import CorpusConfig


@dataclass(frozen=True)
class WindowRules:
    """What stands between and before documents; ids are None where nothing does."""

    window_bos_id: int | None  # first token of every window, not doubled where its text begins with it
    document_bos_id: int | None  # before every document that does not begin with it
    separator_id: int | None  # after every document that does not end with it
    pack: bool  # windows run on over document borders

    @classmethod
    def of(cls, corpus: CorpusConfig, language_model: Any) -> "WindowRules":
        """Rules of a configuration with the ids of a model's tokenizer."""
        bos = language_model.bos_id if corpus.bos != "never" else None
        separators = {"eos": "separator_id", "bos": "bos_id"}
        name = separators.get(corpus.separator)
        return cls(
            window_bos_id=bos if corpus.bos == "window" else None,
            document_bos_id=bos if corpus.bos == "document" else None,
            separator_id=getattr(language_model, name) if name else None,
            pack=corpus.pack,
        )


class WindowPacker:
    """Packs token ids of documents of one split into windows, each token with its document."""

    def __init__(self, context_tokens: int, rules: WindowRules):
        self.context_tokens, self.rules = context_tokens, rules
        self.num_dropped_tokens = 0  # tails of documents that are not packed
        self._ids: list[int] = []
        self._documents: list[int] = []

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that wait for their window to be full."""
        return len(self._ids)

    def add(self, token_ids: Sequence[int], document_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Append a document; yields every full window as (token_ids [T], document_ids [T])."""
        self.push(token_ids, document_id)
        yield from self.windows()

    def push(self, token_ids: Sequence[int], document_id: int) -> None:
        """Append a document."""
        added = [*token_ids]
        rules = self.rules
        if rules.document_bos_id is not None and added[:1] != [rules.document_bos_id]:
            added.insert(0, rules.document_bos_id)
        if rules.separator_id is not None and added[-1:] != [rules.separator_id]:
            added.append(rules.separator_id)
        self._ids += added
        self._documents += [document_id] * len(added)

    def windows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every full window of what was appended; what is left of a document is dropped where they are not packed."""
        rules = self.rules
        while self._ids:
            bos = [] if rules.window_bos_id in (None, self._ids[0]) else [rules.window_bos_id]
            n = self.context_tokens - len(bos)
            if len(self._ids) < n:
                break
            ids, owners = self._ids[:n], self._documents[:n]
            del self._ids[:n], self._documents[:n]
            yield np.array([*bos, *ids], np.int32), np.array([*owners[: len(bos)], *owners], np.int32)
        if not rules.pack:
            self.num_dropped_tokens += len(self._ids)
            self._ids, self._documents = [], []

    def state(self) -> dict[str, Any]:
        """Plain form of what waits, for JSON; also right between two windows of one document."""
        return {"token_ids": [*self._ids], "document_ids": [*self._documents], "num_dropped": self.num_dropped_tokens}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; `windows` gives what its document still has."""
        self._ids, self._documents = [*state["token_ids"]], [*state["document_ids"]]
        self.num_dropped_tokens = state["num_dropped"]
