"""What a probing task is: a yes/no label on the cases of a text, and the balanced cases that are drawn of it.

A case is a row (one token in its window) or a document. Splits are those of the text, decided by document before
anything else: probes learn from train, take their hyper-parameters from calibration, and are scored on test.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from saeql.store.records import SPLITS

from .text import ProbedText

LEVELS = ("token", "document")
YES, NO, OUT = 1, 0, -1
#: Cases of either label without which a split says nothing, and documents that they must lie in.
LEAST_CASES = {"train": 20, "calibration": 5, "test": 10}
LEAST_DOCUMENTS = 2
#: Negatives of the test split are drawn up to this number where there are fewer positives: they cost nothing there.
TEST_NEGATIVES = 200
#: With fewer word types than this among its cases, a task is one about a word's use: its units are pairs of words.
LEAST_UNITS = 20


class TaskError(ValueError):
    """A task cannot be read, or has too few cases to say anything."""


@dataclass(frozen=True)
class Task:
    """One yes/no question about the cases of a text."""

    name: str
    level: str  # 'token' | 'document'
    labels: Mapping[str, np.ndarray]  # split -> [C] int8: YES, NO, or OUT where the case has no part in the task
    units: Mapping[str, np.ndarray]  # split -> [C] int64: what a control task gives one label at random
    documents: Mapping[str, np.ndarray]  # split -> [C] int64: document of every case
    unit: str  # 'word type' | 'pair of word types' | 'document'
    planted: bool = False  # one of the concepts that come with saeql

    def relabelled(self, name: str, labels: Mapping[str, np.ndarray]) -> "Task":
        """The same cases with other labels."""
        return replace(self, name=name, labels=labels)


def token_task(
    name: str,
    text: ProbedText,
    positive: Mapping[str, np.ndarray],
    among: Mapping[str, np.ndarray] | None = None,
    *,
    planted: bool = False,
) -> Task:
    """A task on rows: `positive` and `among` (where the question is asked at all) are split -> [W * T] bool."""
    labels, documents = {}, {}
    for split, part in text.splits.items():
        asked = part.eligible if among is None else part.eligible & among[split]
        labels[split] = np.where(asked, positive[split].astype(np.int8), np.int8(OUT))
        documents[split] = part.documents.astype(np.int64)
    words = {split: text.word_types(split) for split in text.splits}
    unit = "word type"
    if len(np.unique(words["train"][labels["train"] != OUT])) < LEAST_UNITS:
        words, unit = {split: text.word_pairs(split) for split in text.splits}, "pair of word types"
    return Task(name, "token", labels, words, documents, unit, planted)


def document_task(name: str, text: ProbedText, positive: Mapping[str, np.ndarray]) -> Task:
    """A task on documents: `positive` is split -> [D] bool, by dense document number."""
    labels = {split: positive[split].astype(np.int8) for split in text.splits}
    numbers, start = {}, 0
    for split, part in text.splits.items():
        numbers[split] = np.arange(start, start + part.num_documents)
        start += part.num_documents
    documents = {split: np.arange(part.num_documents) for split, part in text.splits.items()}
    return Task(name, "document", labels, numbers, documents, "document")


@dataclass(frozen=True)
class Cases:
    """Cases of one split that were drawn."""

    cases: np.ndarray  # [n] int64 rows or documents of the split
    y: np.ndarray  # [n] bool
    documents: np.ndarray  # [n]
    units: np.ndarray  # [n]

    def __len__(self) -> int:
        return len(self.cases)


@dataclass(frozen=True)
class Drawn:
    """Cases of all three splits."""

    train: Cases
    calibration: Cases
    test: Cases

    def of(self, split: str) -> Cases:
        """One of the three by name."""
        assert split in SPLITS, split
        return getattr(self, split)


def draw(task: Task, *, max_cases: int, seed: int) -> Drawn:
    """At most `max_cases` of every split, as many of one label as of the other; test may have more negatives.

    Raises TaskError naming the split that has too few cases or documents of a label, or where both are one.
    """
    rng = np.random.default_rng(seed)
    return Drawn(**{split: _draw(task, split, max_cases, rng) for split in SPLITS})


def _draw(task: Task, split: str, max_cases: int, rng: np.random.Generator) -> Cases:
    labels, documents = task.labels[split], task.documents[split]
    found = {label: np.flatnonzero(labels == label) for label in (YES, NO)}
    for label, word in ((YES, "positive"), (NO, "negative")):
        count, spread = len(found[label]), len(np.unique(documents[found[label]]))
        if count < LEAST_CASES[split] or spread < LEAST_DOCUMENTS:
            raise TaskError(
                f"task {task.name}: {count} {word} {'cases' if task.level == 'document' else 'tokens'} in {spread} "
                f"documents of the {split} split; it takes {LEAST_CASES[split]} in {LEAST_DOCUMENTS}: give more text"
            )
    half = max_cases // 2
    fewest = min(half, len(found[YES]), len(found[NO]))
    wanted = {YES: fewest, NO: fewest}
    if split == "test":
        most = min(half, len(found[YES]))
        wanted = {YES: most, NO: min(half, len(found[NO]), max(most, TEST_NEGATIVES))}
    chosen = np.sort(np.concatenate([rng.choice(found[label], wanted[label], replace=False) for label in (YES, NO)]))
    return Cases(chosen, labels[chosen] == YES, documents[chosen], task.units[split][chosen])
