"""Labels worded by a language model from train rows.

    word_list       the words that the feature is active on -> what they have in common; the form that a small local
                    model can do, shown by examples
    max_activation  the strongest contexts, active words marked, with strengths 0-10   (arXiv 2410.13928, section 3.1)
    contrastive     the same, and contexts of the same words without activity          (the same, its contrastive form)

The last two need a strong model. A model always words something, also for a feature without meaning: whether a label
is kept is decided by its scores, elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..language_models.parsing import explanation
from ..language_models.prompts import FENCE_RULE, fenced, plain
from ..language_models.questions import Judge, Message, Question
from ..language_models.snippets import Snippet, cut
from ..output import note
from ..progress import OnProgress
from ..receipts.row_text import marked_words
from ..split_rows import FeatureRows, SplitRows
from .base import Candidate

if TYPE_CHECKING:
    from ..run import Run

_MAX_WORDS = 16
_MAX_WORD_CHARACTERS = 24
_NUM_SNIPPETS = 10
_NUM_INACTIVE = 5
_SNIPPET_TOKENS = 32
_SEED = 0


class LanguageModelExplainer(ABC):
    """Asks one question a feature; an answer that cannot be read is counted in `failed`, told, and gives no label."""

    name: ClassVar[str]

    def __init__(self, judge: Judge):
        self.judge = judge
        self.asked = self.failed = 0

    @classmethod
    def of(cls, run: "Run"):
        """With the judge of `run`. Raises JudgeError where there is none."""
        from ..language_models.choose import judge_of

        return cls(judge_of(run))

    def propose(
        self, rows: FeatureRows, features: Sequence[int], on_progress: OnProgress
    ) -> Mapping[int, list[Candidate]]:
        """One candidate for each feature that is active on train and whose answer could be read.

        Raises JudgeError where the judge cannot be had or has to stop.
        """
        asked = self.questions(rows.train, features)
        answers = self.judge.ask(list(asked.values()), on_progress)
        labels = {feature: explanation(answer) for feature, answer in zip(asked, answers, strict=True)}
        failed = sum(label is None for label in labels.values())
        self.asked += len(labels)
        self.failed += failed
        if failed:
            note(f"{self.name}: {failed:,} of {len(labels):,} answers could not be read and give no label")
        name = f"{self.name} {self.judge.name}" if labels else self.name
        return {f: [Candidate(label, "semantic", name)] for f, label in labels.items() if label is not None}

    def questions(self, train: SplitRows, features: Sequence[int]) -> dict[int, Question]:
        """The question about each of `features` that is active on `train`."""
        starts = train.active.starts
        asked = {}
        for feature in features:
            own = slice(starts[feature], starts[feature + 1])
            order = np.argsort(-train.active.values[own], kind="stable")
            if len(order):
                asked[feature] = self._ask(train, train.active.rows[own][order], train.active.values[own][order])
        return asked

    @abstractmethod
    def _ask(self, train: SplitRows, rows: np.ndarray, values: np.ndarray) -> Question:
        """The question about a feature that is active on `rows` [n] with `values` [n], strongest first, n > 0."""


class WordList(LanguageModelExplainer):
    """The distinct words that a feature is active on, strongest first, and five lists with their answers before."""

    name = "word_list"
    _examples = (
        ("apple, Pears, plum, cherries, bananas", "fruit"),
        ("quickly, slowly, softly, badly", "adverbs ending in -ly"),
        ("Paris, London, Rome, Berlin, Oslo", "capital cities"),
        ("hammer, saw, drill, screwdriver", "tools"),
        ("because, although, unless, while", "conjunctions"),
    )

    def _ask(self, train: SplitRows, rows: np.ndarray, values: np.ndarray) -> Question:
        words: dict[str, str] = {}
        for word in marked_words(train.windows, rows[: 8 * _MAX_WORDS]):
            words.setdefault(word.casefold(), plain(word)[:_MAX_WORD_CHARACTERS])
        listed = ", ".join(list(words.values())[:_MAX_WORDS])
        messages = [Message("system", f"You say in a few words what a list of words has in common. {FENCE_RULE}")]
        for example, answer in self._examples:
            messages += [Message("user", fenced("words", example)), Message("assistant", answer)]
        return Question((*messages, Message("user", fenced("words", listed))), 12)


class MaxActivation(LanguageModelExplainer):
    """Ten contexts spread from the strongest down, active words marked, each active token with its strength."""

    name = "max_activation"
    _task = (
        "You find out which pattern in text a detector answers to. You are shown texts in which the words that it "
        "answers to are marked like <<this>>, with the strength of each from 1 to 10."
    )
    _wish = (
        "Think about what the marked words, or what stands around them, have in common. Then end with one line "
        "of at most 15 words that says it as precisely as the examples allow:\n[EXPLANATION]: ..."
    )

    def _ask(self, train: SplitRows, rows: np.ndarray, values: np.ndarray) -> Question:
        largest, width = float(values[0]), train.windows.tokens.shape[1]
        value_of = dict(zip(rows.tolist(), values.tolist(), strict=True))
        parts = []
        for number, snippet in enumerate(_apart(train, rows), 1):
            active = [p for p, row in zip(snippet.positions, snippet.rows(width).tolist(), strict=True)
                      if row in value_of]  # fmt: skip
            strengths = ", ".join(
                f'"{snippet.token(p)}" {int(np.ceil(10 * value_of[snippet.window * width + p] / largest))}'
                for p in active
            )
            parts.append(f"Text {number}:\n{fenced('text', snippet.with_marks(active).strip(), f'({strengths})')}")
        return self._question([*parts, *self._inactive(train, rows)])

    def _inactive(self, train: SplitRows, rows: np.ndarray) -> list[str]:
        return []

    def _question(self, parts: list[str]) -> Question:
        system = Message("system", f"{self._task} {FENCE_RULE}")
        return Question((system, Message("user", "\n\n".join([*parts, self._wish]))), 300)


class Contrastive(MaxActivation):
    """The same, and contexts without activity: of the same tokens where there are some, else any."""

    name = "contrastive"

    def _inactive(self, train: SplitRows, rows: np.ndarray) -> list[str]:
        rng = np.random.default_rng([_SEED, int(rows[0])])
        width = train.windows.tokens.shape[1]
        tokens = train.windows.tokens.ravel()
        is_quiet = train.eligible.copy()
        is_quiet.reshape(-1, width)[np.unique(rows // width)] = False  # in windows where it is active nowhere
        same = np.flatnonzero(is_quiet & np.isin(tokens, np.unique(tokens[rows])))
        anywhere = np.flatnonzero(is_quiet)
        chosen = rng.permutation(same)[: _NUM_INACTIVE - 2]
        more = rng.choice(anywhere, min(_NUM_INACTIVE - len(chosen), len(anywhere)), replace=False)
        texts = [cut(train.windows, int(row), tokens=_SNIPPET_TOKENS).text.strip() for row in (*chosen, *more)]
        return [f"Text without the pattern:\n{fenced('text', text)}" for text in texts]


def _apart(train: SplitRows, rows: np.ndarray) -> list[Snippet]:
    """Contexts of the strongest row and of others down to the median one, no two of which share a token."""
    upper = rows[: max(len(rows) // 2, _NUM_SNIPPETS)]
    places = np.unique(np.linspace(0, len(upper) - 1, 2 * _NUM_SNIPPETS).astype(int))
    found: list[Snippet] = []
    for row in upper[places].tolist():
        snippet = cut(train.windows, row, tokens=_SNIPPET_TOKENS, centred=True)
        taken = any(
            s.window == snippet.window and s.positions.start < snippet.positions.stop
            and snippet.positions.start < s.positions.stop
            for s in found
        )  # fmt: skip
        if not taken:
            found.append(snippet)
    return found[:_NUM_SNIPPETS]
