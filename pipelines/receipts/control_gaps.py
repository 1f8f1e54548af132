"""What C6 to C9 and C14b have in common: a run beside its control runs, one receipt a question."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..control_runs import command, find_control, is_control, status
from .control import Labelled
from .control_scores import DRAWS, FeatureScores, Gap, feature_scores, gap, scores_of
from .document_medians import DocumentMoves, document_moves, document_moves_of
from .receipt import FAILED, REPORTED, Receipt, judged

if TYPE_CHECKING:
    from ..run import Run


class Trained:
    """The labels of the run itself: those in its evidence, or `labelled`, which are not evidence yet."""

    def __init__(self, run: "Run", labelled: Labelled | None = None):
        self.run, self.labelled = run, labelled
        self._pairs: dict[str, ControlPair] = {}

    def pair(self, kind: str) -> "ControlPair":
        """Beside a control run; read once."""
        if kind not in self._pairs:
            self._pairs[kind] = ControlPair(self, kind)
        return self._pairs[kind]

    @cached_property
    def scores(self) -> FeatureScores | None:
        """None before the run is labelled."""
        if self.labelled is not None:
            return scores_of(self.labelled)
        return feature_scores(self.run) if self.run.evidence.has("labels") else None

    @cached_property
    def moves(self) -> DocumentMoves:
        """With the documents."""
        if self.labelled is not None:
            return document_moves(self.labelled.rows, self.labelled.labels, draws=DRAWS, seed=0)
        return document_moves_of(self.run, draws=DRAWS, seed=0)


class BesideControlRuns(ABC):
    """A check of a run beside its control runs on disk: when labels are made, and by `saeql control`."""

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Needs nothing but the run."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Of labels that are just made; none for a control run itself."""
        return [] if is_control(labelled.run) else self.compare(Trained(labelled.run, labelled))

    @abstractmethod
    def compare(self, trained: Trained) -> list[Receipt]:
        """Receipts of a run by the control runs that there are, and of those that are missing."""


class ControlPair:
    """Scores of a run and of one of its control runs, on the same kind of negatives.

    `missing` says what to do where they cannot be compared; `scores` are None then.
    """

    def __init__(self, trained: Trained, kind: str):
        self.trained, self.kind, self.missing = trained, kind, ""
        self.scores: tuple[FeatureScores, FeatureScores] | None = None  # of the run, of the control
        run, self.control = trained.run, find_control(trained.run, kind)
        if self.control is None:
            self.missing = f"{status(run, kind)}: `{command(run, kind)}` makes it"
        elif trained.scores is None:
            self.missing = f"`saeql label {run.path}` first"
        else:
            mine, other = trained.scores, feature_scores(self.control)
            if mine.scored_on != other.scored_on:
                behind = run if other.scored_on == "N1" else self.control
                self.missing = f"scored on {mine.scored_on} and {other.scored_on}: `saeql label {behind.path}` again"
            else:
                self.scores = mine, other

    @cached_property
    def other_text(self) -> dict[str, Any]:
        """Tokens that each of the two harvested, where that is not the same; else empty."""
        assert self.control is not None
        mine, other = self.trained.run, self.control
        if mine.config.corpus == other.config.corpus:
            return {}
        return {"tokens": num_tokens(mine), "tokens_control": num_tokens(other)}

    @cached_property
    def moves(self) -> DocumentMoves:
        """By how much the differences move with the documents; both runs are drawn the same ones."""
        assert self.control is not None
        mine, other = self.trained.moves, document_moves_of(self.control, draws=DRAWS, seed=0)
        return DocumentMoves(mine.median - other.median, mine.mean - other.mean)

    def gap(
        self,
        name: str,
        mine: np.ndarray,
        other: np.ndarray,
        *,
        at_least: float = 0.0,
        mean: bool = False,
        asked: bool = True,
        by_documents: bool = True,
        more: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Receipt of a difference of medians (or means); passed: it reaches `at_least` and its interval is above 0.

        `by_documents`: the interval also draws the documents that labels are scored on. `more` goes into the detail.
        """
        moves = None
        if by_documents:
            moves = self.moves.mean if mean else self.moves.median
        found = gap(mine, other, mean=mean, of_documents=moves)
        if found.value != found.value:
            what = "the run" if not len(mine) else f"control {self.kind}"
            return self.absent(name, f"no label of {what} has such a score", asked=asked)
        statistic, word = (np.mean, "mean") if mean else (np.median, "median")
        detail = {
            "kind": self.kind,
            "n": found.n,
            "n_control": found.n_other,
            word: float(statistic(mine)),
            f"{word}_control": float(statistic(other)),
            **self.other_text,
            **(more or {}),
        }
        return self.receipt(name, found, detail, at_least=at_least, asked=asked)

    def receipt(
        self, name: str, found: Gap, detail: dict[str, Any], *, at_least: float = 0.0, asked: bool = True
    ) -> Receipt:
        """Receipt of a difference; passed: it reaches `at_least` and its interval is above 0."""
        return Receipt(
            control=name,
            value=found.value,
            verdict=REPORTED if not asked else judged(found.value, at_least) if found.low > 0 else FAILED,
            threshold=at_least if asked else None,
            n=found.n + found.n_other,
            low=found.low,
            high=found.high,
            detail=detail,
        )

    def absent(self, name: str, why: str, *, asked: bool = True) -> Receipt:
        """Receipt of what could not be measured; where something is asked, that has not passed."""
        verdict = FAILED if asked else REPORTED
        return Receipt(control=name, value=None, verdict=verdict, detail={"missing": why, "kind": self.kind})

    def labelled_shares(self, name: str, *, contextual: bool = False) -> Receipt:
        """Share of the control's alive features that have a label; that of the run is in `detail`."""
        assert self.scores is not None
        (mine, alive), (other, other_alive) = (scores.share(contextual=contextual) for scores in self.scores)
        value = None if other != other else other
        detail = {"kind": self.kind, "trained": mine, "n_trained": alive}
        return Receipt(control=name, value=value, verdict=REPORTED, n=other_alive, detail=detail)

    def permutation_share(self, name: str) -> Receipt:
        """Share of the control's alive features whose label passes the permutation test (C3)."""
        assert self.scores is not None
        other = self.scores[1]
        tested = ~np.isnan(other.passes_permutation)
        detail: dict[str, Any] = {"kind": self.kind, "tested": int(tested.sum())}
        value, alive = None, int(other.is_alive.sum())
        if tested.any() and alive:
            value = float(np.nansum(other.passes_permutation) / alive)
        else:
            detail["missing"] = "its labels have no receipt of C3"
        return Receipt(control=name, value=value, verdict=REPORTED, n=alive, detail=detail)


def num_tokens(run: "Run") -> int:
    """Tokens of all documents that a run harvested."""
    return int(run.evidence.read("documents", columns=["num_tokens"])["num_tokens"].to_numpy().sum())
