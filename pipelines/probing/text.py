"""The text that a task is on: windows of tokens in three splits, which rows of them count, and their documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from saeql.store.evidence import Evidence
from saeql.store.records import SPLITS

from ..token_classes import RowTable, Vocabulary, pad_lists

#: A row of a text is window * T + position, as everywhere; -1 pads a window that is shorter than T.
PADDING = -1


@dataclass(frozen=True)
class TextSplit:
    """One split: W windows of T positions."""

    token_ids: np.ndarray  # [W, T] int32
    windows: RowTable  # the same as vocabulary indices
    window_ids: np.ndarray  # [W] ids of stored windows; their number where nothing is stored
    eligible: np.ndarray  # [W * T] bool: rows that may be cases
    documents: np.ndarray  # [W * T] int32 dense document numbers, -1 where the row does not count
    num_documents: int

    @cached_property
    def _by_document(self) -> tuple[np.ndarray, np.ndarray]:
        rows = np.flatnonzero(self.eligible)
        rows = rows[np.argsort(self.documents[rows], kind="stable")]
        counts = np.bincount(self.documents[rows], minlength=self.num_documents)
        return rows, np.concatenate([[0], np.cumsum(counts)])

    def rows_of(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All rows [R] of the documents [n], and which of the n each belongs to [R]."""
        rows, starts = self._by_document
        parts = [rows[starts[d] : starts[d + 1]] for d in documents]
        groups = np.repeat(np.arange(len(documents)), [len(p) for p in parts])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64), groups


@dataclass(frozen=True)
class ProbedText:
    """The three splits; no document is in two of them."""

    name: str
    vocabulary: Vocabulary
    splits: Mapping[str, TextSplit]

    @cached_property
    def types(self) -> np.ndarray:
        """[V] int64: the word type of every token text: texts that differ in case and blanks only are one."""
        texts = [t.strip().casefold() or t for t in self.vocabulary.texts]
        return np.unique(texts, return_inverse=True)[1]

    def word_types(self, split: str) -> np.ndarray:
        """[W * T] word type of every row, -1 behind the end of a window."""
        return np.append(self.types, -1)[self.splits[split].windows.tokens.ravel()]

    def word_pairs(self, split: str) -> np.ndarray:
        """[W * T] a number for every row's word type together with the one before it."""
        types = self.word_types(split).reshape(self.splits[split].token_ids.shape)
        before = np.concatenate([np.full((len(types), 1), -1), types[:, :-1]], axis=1)
        return ((before + 1) * (len(self.types) + 1) + types).ravel()


def run_text(evidence: Evidence, name: str) -> ProbedText:
    """The text of a run as its evidence has it; first positions of windows do not count.

    Raises EvidenceError before the run has harvested.
    """
    vocabulary = Vocabulary.from_table(evidence.read("vocabulary"))
    splits = {}
    for split in SPLITS:
        table = evidence.read("windows", split=split)
        token_ids = pad_lists(table["token_ids"])
        documents = pad_lists(table["document_ids"])
        splits[split] = split_of_windows(vocabulary, token_ids, documents, table["window_id"].to_numpy())
    return ProbedText(name, vocabulary, splits)


def split_of_windows(
    vocabulary: Vocabulary, token_ids: np.ndarray, documents: np.ndarray, window_ids: np.ndarray | None = None
) -> TextSplit:
    """A split of windows [W, T], each token with its document; rows after the first position count."""
    valid = token_ids != PADDING
    tokens = np.full(token_ids.shape, -1, np.int32)
    tokens[valid] = vocabulary.lookup(token_ids[valid])
    eligible = valid.copy()
    eligible[:, :1] = False
    eligible = eligible.ravel()
    dense = np.full(token_ids.size, -1, np.int32)
    names, dense[eligible] = np.unique(documents.ravel()[eligible], return_inverse=True)
    ids = np.arange(len(token_ids)) if window_ids is None else window_ids
    return TextSplit(token_ids, RowTable(vocabulary, tokens), ids, eligible, dense, len(names))


def without(split: TextSplit, rows: np.ndarray) -> TextSplit:
    """The split without some rows, [W * T] bool: they are no cases."""
    eligible = split.eligible & ~rows
    documents = np.where(eligible, split.documents, -1)
    return TextSplit(split.token_ids, split.windows, split.window_ids, eligible, documents, split.num_documents)


def padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    """Lists as [W, T] int32, T the longest, short ones padded."""
    out = np.full((len(lists), max((len(x) for x in lists), default=1)), PADDING, np.int32)
    for row, values in zip(out, lists, strict=True):
        row[: len(values)] = values
    return out
