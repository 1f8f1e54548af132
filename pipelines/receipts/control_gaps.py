"""What C6, C7 and C8 have in common: labels of a run against those of its control runs, one receipt a question."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..control_runs import command, find_control, status
from .control_scores import DRAWS, FeatureScores, Gap, Scores, feature_scores, median_gap
from .document_medians import document_medians
from .receipt import FAILED, REPORTED, Receipt, judged

if TYPE_CHECKING:
    from ..run import Run


class ControlPair:
    """Scores of a run and of one of its control runs, on the same kind of negatives.

    `missing` says what to do where they cannot be compared; then there are no scores.
    """

    def __init__(self, run: "Run", kind: str):
        self.run, self.kind, self.missing = run, kind, ""
        self.mine: FeatureScores | None = None
        self.other: FeatureScores | None = None
        self.control = find_control(run, kind)
        if self.control is None:
            self.missing = f"{status(run, kind)}: `{command(run, kind)}` makes it"
        elif not run.evidence.has("labels"):
            self.missing = f"`saeql label {run.path}` first"
        else:
            mine, other = feature_scores(run), feature_scores(self.control)
            if mine.scored_on != other.scored_on:
                behind = run if other.scored_on == "N1" else self.control
                self.missing = f"scored on {mine.scored_on} and {other.scored_on}: `saeql label {behind.path}` again"
            else:
                self.mine, self.other = mine, other

    @cached_property
    def of_documents(self) -> np.ndarray:
        """[DRAWS] by how much the difference moves with the documents; both runs are drawn the same ones."""
        assert self.control is not None
        mine, other = (document_medians(run, draws=DRAWS, seed=0) for run in (self.run, self.control))
        return mine - other

    def gap(self, name: str, mine: Scores, other: Scores, *, at_least: float = 0.0, asked: bool = True) -> Receipt:
        """Receipt of a difference of medians; passed where it reaches `at_least` and its interval is above 0."""
        found = median_gap(mine, other, of_documents=self.of_documents)
        if found.value != found.value:
            what = "the run" if not len(mine) else f"control {self.kind}"
            return self.absent(name, f"no label of {what} has such a score", asked=asked)
        is_above = found.low > 0
        verdict = REPORTED if not asked else judged(found.value, at_least) if is_above else FAILED
        return Receipt(
            control=name,
            value=found.value,
            verdict=verdict,
            threshold=at_least if asked else None,
            n=found.n + found.n_other,
            low=found.low,
            high=found.high,
            detail=self._detail(found, mine, other),
        )

    def absent(self, name: str, why: str, *, asked: bool = True) -> Receipt:
        """Receipt of what could not be measured; where something is asked, that has not passed."""
        return Receipt(
            control=name, value=None, verdict=FAILED if asked else REPORTED,
            detail={"missing": why, "kind": self.kind},
        )  # fmt: skip

    def _detail(self, found: Gap, mine: Scores, other: Scores) -> dict[str, Any]:
        assert self.mine is not None
        sizes = {"n": found.n, "n_control": found.n_other, "median": mine.median, "median_control": other.median}
        return {"kind": self.kind, "scored_on": self.mine.scored_on, **sizes}


def labelled_share(scores: FeatureScores) -> tuple[float, int]:
    """Share of the alive features that have a label, and how many are alive."""
    alive = int(scores.is_alive.sum())
    return (float((scores.is_labelled & scores.is_alive).sum() / alive) if alive else float("nan")), alive


def share_receipt(name: str, scores: FeatureScores, kind: str) -> Receipt:
    """The labelled share of a control run."""
    share, alive = labelled_share(scores)
    return Receipt(control=name, value=share, verdict=REPORTED, n=alive, detail={"kind": kind})


def permutation_share(name: str, scores: FeatureScores, kind: str) -> Receipt:
    """Share of a control run's labels that pass the permutation test (C3)."""
    tested = ~np.isnan(scores.passes_permutation)
    value = float(np.nanmean(scores.passes_permutation)) if tested.any() else None
    detail: dict[str, Any] = {"kind": kind}
    if value is None:
        detail["missing"] = "its labels have no receipt of C3"
    return Receipt(control=name, value=value, verdict=REPORTED, n=int(tested.sum()), detail=detail)
