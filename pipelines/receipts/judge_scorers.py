"""A language model as judge of labels: detection, fuzzing and simulation, one question a row.

    detection   is the pattern anywhere in the row's text? P(yes)                (arXiv 2410.13928, section 3.2)
    fuzzing     is the marked word an instance of it? P(yes)                     (the same)
    simulation  how strongly does the marked word show it, 0 to 9? its mean      (Bills et al. 2023, token by token)

A judge sees the label and the text, the mark on the row's own word whether the feature is active there or not, and at
a place that does not depend on it. P(yes) comes from the probabilities of the first token where the model gives them,
else it is 1 or 0. An answer that cannot be read is NaN, which counts as wrong.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..explainers.base import Candidate
from ..language_models.config import JudgeError
from ..language_models.parsing import chance_of_yes, expected_digit
from ..language_models.prompts import FENCE_RULE, fenced, plain
from ..language_models.questions import Answer, Judge, Message, Question, silent
from ..language_models.snippets import cut
from ..progress import OnProgress
from ..split_rows import SplitRows
from .statistics import pearson

if TYPE_CHECKING:
    from ..run import Run

#: Tokens for an answer of one word, where a model likes to begin with a sign.
_WORD_TOKENS = 4


class JudgeScorer(ABC):
    """What the three have in common: questions of labels and rows, answers read as numbers."""

    name: ClassVar[str]
    _task: ClassVar[str]
    _question: ClassVar[str]

    def __init__(self, judge: Judge, on_progress: OnProgress = silent):
        self.judge, self.on_progress = judge, on_progress

    @classmethod
    def of(cls, run: "Run"):
        """By the judge of `run`. Raises JudgeError where there is none."""
        from ..language_models.choose import judge_of

        return cls(judge_of(run))

    def questions(self, label: str, rows: np.ndarray, split: SplitRows) -> list[Question]:
        """One for every row, in their order."""
        system = Message("system", f"{self._task} {FENCE_RULE}")
        head = f"Pattern:\n{fenced('label', plain(label))}\n\nText:\n"
        return [
            Question(
                (system, Message("user", f"{head}{fenced('text', self._text(split, int(row)))}\n\n{self._question}")),
                _WORD_TOKENS,
                wants_chances=True,
            )
            for row in rows
        ]

    def score(self, labels: Sequence[Candidate], rows: Sequence[np.ndarray], split: SplitRows) -> list[np.ndarray]:
        """For every label the judge's number for each of its rows [n]; NaN where it gave none.

        Raises JudgeError where the judge cannot be had or has to stop.
        """
        asked = [self.questions(label.label, own, split) for label, own in zip(labels, rows, strict=True)]
        answers = self.judge.ask([question for own in asked for question in own], self.on_progress)
        numbers = np.array([self._read(answer) for answer in answers], np.float64)
        return np.split(numbers, np.cumsum([len(own) for own in asked])[:-1]) if asked else []

    @abstractmethod
    def _text(self, split: SplitRows, row: int) -> str:
        """What is shown of a row: plain text, marked or not."""

    @abstractmethod
    def _read(self, answer: Answer) -> float:
        """The number in an answer, NaN where there is none."""


class Detection(JudgeScorer):
    """P(yes): the text around the row shows the pattern."""

    name = "detection"
    _task = "You check whether a description of a pattern fits a text."
    _question = "Does the text contain the pattern? Answer with one word: Yes or No."

    def _text(self, split: SplitRows, row: int) -> str:
        return cut(split.windows, row).text.strip()

    def _read(self, answer: Answer) -> float:
        return chance_of_yes(answer)


class Fuzzing(JudgeScorer):
    """P(yes): the row's word, marked, is an instance of the pattern. On inactive rows it is the wrong word."""

    name = "fuzzing"
    _task = "You check whether a description of a pattern fits one word of a text, marked like <<this>>."
    _question = "Does the marked word show the pattern? Answer with one word: Yes or No."

    def _text(self, split: SplitRows, row: int) -> str:
        snippet = cut(split.windows, row)
        return snippet.with_marks([row % split.windows.tokens.shape[1]]).strip()

    def _read(self, answer: Answer) -> float:
        return chance_of_yes(answer)


class Simulation(Fuzzing):
    """Expected activation of the row's word, 0 to 9. `correlation` compares it with the true ones."""

    name = "simulation"
    _task = "You guess how strongly a detector of a pattern answers to one word of a text, marked like <<this>>."
    _question = (
        "How strongly does the marked word show the pattern, from 0 (not at all) to 9 (as strongly as can be)? "
        "Answer with one digit."
    )

    def score(self, labels: Sequence[Candidate], rows: Sequence[np.ndarray], split: SplitRows) -> list[np.ndarray]:
        """As above. Raises JudgeError also where the judge can neither give probabilities nor keep to a form."""
        can = self.judge.capabilities
        if not (can.chances or can.schema):
            raise JudgeError(f"simulation needs probabilities or JSON answers, and {self.judge.name} gives neither")
        return super().score(labels, rows, split)

    def questions(self, label: str, rows: np.ndarray, split: SplitRows) -> list[Question]:
        """One for every row; an object with one digit where the judge has no probabilities but keeps to a form."""
        asked = super().questions(label, rows, split)
        if self.judge.capabilities.chances:
            return asked
        schema = {
            "type": "object",
            "properties": {"activation": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["activation"],
            "additionalProperties": False,
        }
        return [Question(question.messages, 24, schema=schema) for question in asked]

    def _read(self, answer: Answer) -> float:
        return expected_digit(answer)


def simulated_correlation(expected: np.ndarray, true: np.ndarray) -> float:
    """Pearson correlation of expected activations [n] with true ones [n]; a guess that failed counts as the mean guess.

    NaN where either has no spread.
    """
    known = ~np.isnan(expected)
    if not known.any() or np.ptp(expected[known]) == 0:
        return float("nan")
    return pearson(np.where(known, expected, expected[known].mean()), true)
