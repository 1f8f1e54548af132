"""Labelled texts as windows of tokens with their splits, and the tasks that their labels are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saeql.store.records import SPLITS

from ..corpus import document_sha256, split_of
from ..models import LanguageModel
from ..token_classes import Vocabulary
from .task_files import LabelledText
from .tasks import Task, TaskError, document_task, token_task
from .text import PADDING, ProbedText, padded, split_of_windows

#: More classes than this are no classes but numbers or names.
MOST_CLASSES = 20
#: Tokens of a document beyond this are not read.
MOST_TOKENS = 512
#: Label of a token that no span touches.
_OUTSIDE = "(none)"
_NO_CASE = -1


@dataclass
class _Windows:
    """Windows of one split: token ids, dense document numbers, and the class of every token (-1: no case)."""

    ids: list[list[int]] = field(default_factory=list)
    owners: list[list[int]] = field(default_factory=list)
    classes: list[list[int]] = field(default_factory=list)
    members: list[LabelledText] = field(default_factory=list)  # documents, by their number


def labelled_tasks(
    path: Path,
    documents: Sequence[LabelledText],
    lm: LanguageModel,
    shares: dict[str, float],
    *,
    context_tokens: int,
    has_bos: bool,
) -> tuple[ProbedText, list[Task]]:
    """The documents as windows of their own, and a task: of two classes one, of more one for each against the rest.

    The first `MOST_TOKENS` tokens of a document are read. Raises TaskError for one class, for more than
    `MOST_CLASSES`, for a split without documents, or where the tokenizer does not say where its tokens lie.
    """
    is_document = documents[0].label is not None
    classes = _classes(path, documents)
    read = {split: _Windows() for split in SPLITS}
    for document in documents:
        split = split_of(document_sha256(document.text), shares)
        _add(read[split], document, lm, classes, context_tokens, has_bos)
    for split, windows in read.items():
        if not windows.members:
            raise TaskError(f"{path}: {len(documents)} documents leave none for the {split} split: give more")
    ids = sorted({i for windows in read.values() for w in windows.ids for i in w})
    vocabulary = Vocabulary(ids, lm.token_texts(ids))
    splits = {s: split_of_windows(vocabulary, padded(w.ids), padded(w.owners)) for s, w in read.items()}
    text, tasks = ProbedText(path.name, vocabulary, splits), []
    for number, name in enumerate(classes):
        if number == 0 and len(classes) == 2:
            continue  # the second against the first says it all
        title = path.stem if len(classes) == 2 else f"{path.stem}: {name}"
        if is_document:
            yes = {s: np.array([d.label == name for d in w.members]) for s, w in read.items()}
            tasks.append(document_task(title, text, yes))
        else:
            found = {s: padded(w.classes).ravel() for s, w in read.items()}
            asked = {s: labels != _NO_CASE for s, labels in found.items()}
            tasks.append(token_task(title, text, {s: labels == number for s, labels in found.items()}, asked))
    return text, tasks


def _classes(path: Path, documents: Sequence[LabelledText]) -> list[str]:
    """Names of the classes; of two the one that is asked about comes last."""
    if documents[0].label is not None:
        names = {str(d.label) for d in documents}
    else:
        names = {label for d in documents for _, _, label in d.parts}
        names |= set() if documents[0].is_words else {_OUTSIDE}
    if len(names) < 2:
        raise TaskError(f"{path}: all labels are {next(iter(names), 'missing')!r}; a task takes two classes")
    if len(names) > MOST_CLASSES:
        raise TaskError(
            f"{path}: {len(names)} classes ({', '.join(sorted(names)[:3])}, ...); a task takes at most {MOST_CLASSES}: "
            "numbers are put into classes before they are probed"
        )
    first = [name for name in (_OUTSIDE,) if name in names]
    return first + sorted(names - set(first))


def _add(
    windows: _Windows, document: LabelledText, lm: LanguageModel, classes: list[str], context_tokens: int, has_bos: bool
) -> None:
    encoded = _encoded(document, lm)
    ids = list(encoded["input_ids"])[:MOST_TOKENS]
    labels = [_NO_CASE] * len(ids) if document.label is not None else _token_classes(document, encoded, classes)
    room = context_tokens - has_bos
    number, kept = len(windows.members), False
    for start in range(0, len(ids), room):
        part = slice(start, start + room)
        window = [*([lm.bos_id] if has_bos else []), *ids[part]]
        if len(window) < 2:  # a first position is no case
            continue
        kept = True
        windows.ids.append(window)
        windows.owners.append([number] * len(window))
        windows.classes.append([*([_NO_CASE] if has_bos else []), *labels[part]])
    if kept:
        windows.members.append(document)


def _encoded(document: LabelledText, lm: LanguageModel) -> Any:
    if document.label is not None:
        return lm.tokenizer(document.text, add_special_tokens=False, verbose=False)
    if not lm.tokenizer.is_fast:
        raise TaskError("labels of tokens need a tokenizer that says where its tokens lie (a fast one)")
    return lm.tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def _token_classes(document: LabelledText, encoded: Any, classes: list[str]) -> list[int]:
    """The class of every token: of a word its last token has the word's; of spans every token that one touches."""
    number = {name: n for n, name in enumerate(classes)}
    offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
    starts, ends = _without_blanks(document.text, offsets)
    found = np.full(len(offsets), _NO_CASE if document.is_words else number.get(_OUTSIDE, _NO_CASE))
    for start, end, label in document.parts:
        touched = np.flatnonzero((starts < end) & (ends > start))
        if len(touched):
            found[touched[-1:] if document.is_words else touched] = number[label]
    return found.tolist()[:MOST_TOKENS]


def _without_blanks(text: str, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens begin and end without the blanks in front of them, which a tokenizer may count in."""
    starts = offsets[:, 0].copy()
    for n, (start, end) in enumerate(offsets):
        while start < end - 1 and text[start].isspace():
            start += 1
        starts[n] = start
    return starts, offsets[:, 1]


assert PADDING == _NO_CASE, "a padded class is no case"
