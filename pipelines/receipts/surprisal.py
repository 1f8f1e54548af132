"""Surprisal: how much less a language model is surprised by a text that it was given the label of.

    s = NLL(text | a sentence about nothing) - NLL(text | a sentence with the label), nats a token

(the surprisal scorer of arXiv 2410.13928.) It asks no questions, so a small local model does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..explainers.base import Candidate
from ..language_models.local import LocalJudge
from ..language_models.prompts import plain
from ..language_models.questions import silent
from ..language_models.snippets import cut
from ..progress import OnProgress
from ..split_rows import SplitRows

if TYPE_CHECKING:
    from ..run import Run

_NEUTRAL = "A passage from some text:\n"
_ABOUT = "A passage from some text, with {label}:\n"


class Surprisal:
    """Scores rows by how much a label helps to predict the text around them."""

    name: ClassVar[str] = "surprisal"

    def __init__(self, model: LocalJudge, on_progress: OnProgress = silent):
        self.model, self.on_progress = model, on_progress

    @classmethod
    def of(cls, run: "Run") -> "Surprisal":
        """By the model of `judge.local`, or the run's own. Raises ModelError or JudgeError where it cannot be had."""
        from ..language_models.choose import local_model_of

        return cls(local_model_of(run))

    def score(self, labels: Sequence[Candidate], rows: Sequence[np.ndarray], split: SplitRows) -> list[np.ndarray]:
        """For every label nats a token that it saves on each row's text [n]; NaN for a row without text."""
        texts = [[cut(split.windows, int(row)).text.strip() for row in own] for own in rows]
        different = sorted({text for own in texts for text in own})
        neutral = dict(zip(different, self.model.surprise(different, _NEUTRAL), strict=True))
        scores = []
        for done, (label, own) in enumerate(zip(labels, texts, strict=True)):
            self.on_progress(done, len(labels))
            given = self.model.surprise(own, _ABOUT.format(label=plain(label.label)))
            scores.append(np.array([neutral[text] for text in own], np.float64) - given)
        self.on_progress(len(labels), len(labels))
        return scores
