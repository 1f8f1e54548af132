"""Tasks that come with saeql: the planted concepts, on whatever text a run has read."""

from collections.abc import Sequence

import numpy as np

from saeql.sae.config import suggestion

from ..receipts.planted_concepts import CONCEPTS, Concept, Context
from ..receipts.row_text import Words
from .tasks import Task, TaskError, token_task
from .text import ProbedText

#: Name under which all of them are asked for.
PLANTED = "planted"


def planted_names() -> list[str]:
    """Names of the concepts as a command line takes them."""
    return [_slug(concept) for concept in CONCEPTS]


def chosen_concepts(name: str) -> list[Concept]:
    """The concept of a name, or all for "planted". Raises TaskError where there is none."""
    if name == PLANTED:
        return list(CONCEPTS)
    found = [concept for concept in CONCEPTS if _slug(concept) == name]
    if not found:
        known = [PLANTED, *planted_names()]
        raise TaskError(f"no task {name!r}{suggestion(name, known)}: name a file, or one of {', '.join(known)}")
    return found


def planted_tasks(text: ProbedText, concepts: Sequence[Concept]) -> list[Task]:
    """A task for each concept: its rows against all others, or against other uses of the same words."""
    contexts = {split: Context.of(Words.of(part.windows)) for split, part in text.splits.items()}
    tasks = []
    for concept in concepts:
        yes = {split: concept.rows(context).ravel() for split, context in contexts.items()}
        among = _same_words(text, yes) if concept.same_token else None
        tasks.append(token_task(_slug(concept), text, yes, among, planted=True))
    return tasks


def _same_words(text: ProbedText, yes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """split -> [W * T] bool: rows of the word types on which the concept is ever found."""
    types = {split: text.word_types(split) for split in text.splits}
    wanted = np.unique(np.concatenate([types[split][found] for split, found in yes.items()]))
    return {split: np.isin(found, wanted) for split, found in types.items()}


def _slug(concept: Concept) -> str:
    return concept.name.replace(" ", "-")
