"""Scores of a run's features as its evidence has them, and how two runs differ: what C6 to C8 compare.

A label is scored by its AUROC against matched negatives (rung N1) where the run has those receipts, else by that of
table `labels`, against all inactive test rows. Two runs are only ever compared by the same of the two.

Features of two dictionaries are not paired. The interval of a difference of medians is a bootstrap over the features of
each and over the documents that all of them share (`document_medians.py`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saeql.store.evidence import EvidenceError

from ..label import UNEXPLAINED
from .control import Labelled
from .label_permutation import LabelPermutation
from .negative_ladder import NegativeLadder
from .receipt import FAILED, PASSED
from .statistics import DRAWN_AT_ONCE, PERCENTILES, auroc
from .thresholds import THRESHOLDS
from .token_baseline import TokenBaseline
from .token_table import token_auroc

if TYPE_CHECKING:
    from ..run import Run

DRAWS = 2000


@dataclass(frozen=True)
class FeatureScores:
    """Every array is [F]; NaN where a feature has no such number."""

    scored_on: str  # 'N1', or 'all inactive rows'
    is_alive: np.ndarray  # bool: active on a test row
    is_labelled: np.ndarray  # bool
    is_lexical: np.ndarray  # bool: its token says it all
    auroc: np.ndarray
    n2_auroc: np.ndarray  # against the same token where it does not fire
    passes_permutation: np.ndarray  # 1, 0, NaN

    def of_labels(self, *, contextual: bool = False) -> np.ndarray:
        """[n] scores of the labels that have one; `contextual`: of features that their token does not explain."""
        keep = self.is_labelled & ~(self.is_lexical & contextual)
        return self.auroc[keep & ~np.isnan(self.auroc)]

    def of_same_token(self) -> np.ndarray:
        """[n] scores of the labels against silent rows of the same token."""
        return self.n2_auroc[self.is_labelled & ~np.isnan(self.n2_auroc)]

    def of_alive(self) -> np.ndarray:
        """[n] scores of every alive feature; one without a label, or whose label has none, says nothing: 0.5."""
        scores = np.where(self.is_labelled & ~np.isnan(self.auroc), self.auroc, 0.5)
        return scores[self.is_alive]

    def share(self, *, contextual: bool = False) -> tuple[float, int]:
        """Share of the alive features that have a label (and that their token does not explain), and how many live."""
        alive = int(self.is_alive.sum())
        chosen = self.is_alive & self.is_labelled & ~(self.is_lexical & contextual)
        return (float(chosen.sum() / alive) if alive else float("nan")), alive


@dataclass(frozen=True)
class Gap:
    """A statistic of one group less that of another, with its 95 % interval; NaN where a group is empty."""

    value: float
    low: float
    high: float
    n: int  # features of the first
    n_other: int


def gap(
    mine: np.ndarray,
    other: np.ndarray,
    *,
    mean: bool = False,
    of_documents: np.ndarray | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Gap:
    """How much higher the median (or mean) of the scores `mine` [n] is than that of `other` [m].

    `of_documents` [draws]: by how much the difference moves with draws of the documents, which all features share.
    """
    if not len(mine) or not len(other):
        return Gap(float("nan"), float("nan"), float("nan"), len(mine), len(other))
    statistic = np.mean if mean else np.median
    value = float(statistic(mine) - statistic(other))
    drawn = _drawn(mine, mean, draws, seed) - _drawn(other, mean, draws, seed + 1)
    if of_documents is not None:
        drawn += of_documents
    low, high = np.percentile(drawn, PERCENTILES)
    return Gap(value, float(low), float(high), len(mine), len(other))


def median_interval(scores: np.ndarray, *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """95 % interval of the median of scores [n] over features; NaN for none."""
    if not len(scores):
        return float("nan"), float("nan")
    low, high = np.percentile(_drawn(scores, False, draws, seed), PERCENTILES)
    return float(low), float(high)


def _drawn(values: np.ndarray, mean: bool, draws: int, seed: int) -> np.ndarray:
    """[draws] medians (or means) of features drawn with replacement."""
    rng, n = np.random.default_rng(seed), len(values)
    found, at_once = [], max(1, DRAWN_AT_ONCE // n)
    for start in range(0, draws, at_once):
        picked = values[rng.integers(0, n, (min(at_once, draws - start), n))]
        found.append(picked.mean(axis=1) if mean else np.median(picked, axis=1))
    return np.concatenate(found)


def percentiles(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n]: share of `others` below each value, those equal to it count half; NaN without others."""
    if not len(others):
        return np.full(len(values), np.nan)
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def feature_scores(run: "Run") -> FeatureScores:
    """The scores of a labelled run's own dictionary, from its evidence. Raises EvidenceError before `saeql label`."""
    if not run.evidence.has("labels"):
        raise EvidenceError(f"{run.path} has no labels yet: `saeql label {run.path}` makes them")
    labels = _of(run, "labels").sort_by("feature")
    num = len(labels)
    receipts = _of(run, "receipts") if run.evidence.has("receipts") else None
    n1 = _numbers(receipts, _rung("N1"), num)
    n2 = _numbers(receipts, _rung("N2"), num)
    token = _numbers(receipts, f"{TokenBaseline.code} {TokenBaseline.name}", num)
    has_n1, has_token = bool((~np.isnan(n1)).any()), bool((~np.isnan(token)).any())
    is_labelled = np.array([label != UNEXPLAINED for label in labels["label"].to_pylist()], bool)
    kind_is_lexical = np.array([kind == "lexical" for kind in labels["kind"].to_pylist()], bool)
    own = labels["auroc"].to_numpy().astype(np.float64)
    return FeatureScores(
        scored_on="N1" if has_n1 else "all inactive rows",
        is_alive=labels["n_active"].to_numpy() > 0,
        is_labelled=is_labelled,
        is_lexical=token >= THRESHOLDS.lexical_auroc if has_token else kind_is_lexical,
        auroc=np.where(is_labelled, n1 if has_n1 else own, np.nan),
        n2_auroc=np.where(is_labelled, n2, np.nan),
        passes_permutation=_verdicts(receipts, f"{LabelPermutation.code} {LabelPermutation.name}", num),
    )


def scores_of(labelled: Labelled) -> FeatureScores:
    """The same of labels that are just made and not evidence yet."""
    num, test = labelled.rows.num_features, labelled.rows.test
    n1, n2 = np.full(num, np.nan), np.full(num, np.nan)
    tokens = test.windows.tokens.ravel()
    for feature, scores in labelled.scores.items():
        negatives = labelled.examples[feature].negatives
        if "N1" in negatives:
            n1[feature] = auroc(scores["active"], scores["N1"])
        if "N2" in negatives:
            same = tokens[labelled.examples[feature].active][:, None] == tokens[negatives["N2"]][None, :]
            n2[feature] = auroc(scores["active"], scores["N2"], same)
    is_labelled = np.zeros(num, bool)
    is_labelled[list(labelled.labels)] = True
    return FeatureScores(
        scored_on="N1",
        is_alive=test.active.counts > 0,
        is_labelled=is_labelled,
        is_lexical=token_auroc(labelled.token_table, test) >= THRESHOLDS.lexical_auroc,
        auroc=n1,
        n2_auroc=n2,
        passes_permutation=np.full(num, np.nan),
    )


def _rung(name: str) -> str:
    return f"{NegativeLadder.code} {NegativeLadder.name} {name}"


def _of(run: "Run", table: str) -> pa.Table:
    rows = run.evidence.read(table)
    return rows.filter(pc.field("dictionary") == run.spec.name)


def _numbers(receipts: pa.Table | None, control: str, num: int) -> np.ndarray:
    """Values [num] of the receipts of this name, by feature."""
    found = np.full(num, np.nan)
    for row in _rows(receipts, control):
        found[row["feature"]] = np.nan if row["value"] is None else row["value"]
    return found


def _verdicts(receipts: pa.Table | None, control: str, num: int) -> np.ndarray:
    found = np.full(num, np.nan)
    for row in _rows(receipts, control):
        if row["verdict"] in (PASSED, FAILED):
            found[row["feature"]] = row["verdict"] == PASSED
    return found


def _rows(receipts: pa.Table | None, control: str) -> list[dict]:
    if receipts is None:
        return []
    chosen = receipts.filter((pc.field("control") == control) & pc.field("feature").is_valid())
    return chosen.select(["feature", "value", "verdict"]).to_pylist()
