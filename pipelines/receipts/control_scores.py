"""Scores of a run's features as its evidence has them, and how two runs differ: what C6 to C8 compare.

A label is scored by its AUROC against matched negatives (rung N1) where the run has those receipts, else by that of
table `labels`, against all inactive test rows. Two runs are only ever compared by the same of the two.

Features of two dictionaries are not paired. The interval of a difference of medians is a bootstrap over the features of
each and over the documents that all of them share (`document_medians.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saeql.store.evidence import EvidenceError

from ..label import UNEXPLAINED

if TYPE_CHECKING:
    from ..run import Run

DRAWS = 2000
#: AUROC of the token alone from which a feature counts as lexical.
LEXICAL = 0.95
_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class FeatureScores:
    """Every array is [F]; NaN where a feature has no such number."""

    scored_on: str  # 'N1', or 'all inactive rows'
    is_alive: np.ndarray  # bool: active on a test row
    is_labelled: np.ndarray  # bool
    is_lexical: np.ndarray  # bool: its token says it all
    auroc: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n2_auroc: np.ndarray  # against the same token where it does not fire
    n2_low: np.ndarray
    n2_high: np.ndarray
    passes_permutation: np.ndarray  # 1, 0, NaN

    def of(self, keep: np.ndarray) -> "Scores":
        """The N1 scores of the features that `keep` marks, and that have one."""
        keep = keep & ~np.isnan(self.auroc)
        return Scores(self.auroc[keep], self.low[keep], self.high[keep])

    def on_same_token(self, keep: np.ndarray) -> "Scores":
        """The same against negatives of the same token."""
        keep = keep & ~np.isnan(self.n2_auroc)
        return Scores(self.n2_auroc[keep], self.n2_low[keep], self.n2_high[keep])

    def with_silence(self) -> "Scores":
        """Every feature that is alive; one without a label says nothing, 0.5."""
        silent = self.is_alive & ~self.is_labelled
        own = self.of(self.is_labelled & self.is_alive)
        nothing = np.full(int(silent.sum()), 0.5)
        return Scores(*(np.concatenate([a, nothing]) for a in (own.value, own.low, own.high)))


@dataclass(frozen=True)
class Scores:
    """Numbers of n features with their intervals over documents, NaN where there is none."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __len__(self) -> int:
        return len(self.value)

    @property
    def median(self) -> float:
        """NaN for none."""
        return float(np.median(self.value)) if len(self) else float("nan")

    def medians(self, draws: int, seed: int) -> np.ndarray:
        """[draws] medians of features drawn with replacement."""
        rng, n = np.random.default_rng(seed), len(self)
        found, at_once = [], max(1, _AT_ONCE // max(n, 1))
        for start in range(0, draws, at_once):
            pick = rng.integers(0, n, (min(at_once, draws - start), n))
            found.append(np.median(self.value[pick], axis=1))
        return np.concatenate(found)

    def interval(self, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
        """95 % interval of the median."""
        if not len(self):
            return float("nan"), float("nan")
        low, high = np.percentile(self.medians(draws, seed), (2.5, 97.5))
        return float(low), float(high)


@dataclass(frozen=True)
class Gap:
    """Median of one group less that of another, with its 95 % interval; NaN where a group is empty."""

    value: float
    low: float
    high: float
    n: int  # features of the first
    n_other: int


def median_gap(
    mine: Scores, other: Scores, *, of_documents: np.ndarray | None = None, seed: int = 0, draws: int = DRAWS
) -> Gap:
    """How much higher the median of `mine` is.

    `of_documents` [draws]: by how much the difference moves with draws of the documents, which all features share.
    """
    if not len(mine) or not len(other):
        return Gap(float("nan"), float("nan"), float("nan"), len(mine), len(other))
    value = mine.median - other.median
    drawn = mine.medians(draws, seed) - other.medians(draws, seed + 1)
    if of_documents is not None:
        drawn += of_documents
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Gap(value, float(low), float(high), len(mine), len(other))


def percentiles(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n]: share of `others` below each value, those equal to it count half; NaN without others."""
    if not len(others):
        return np.full(len(values), np.nan)
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def feature_scores(run: "Run") -> FeatureScores:
    """The scores of a labelled run's own dictionary. Raises EvidenceError before `saeql label`."""
    if not run.evidence.has("labels"):
        raise EvidenceError(f"{run.path} has no labels yet: `saeql label {run.path}` makes them")
    labels = _of(run, "labels").sort_by("feature")
    num = len(labels)
    receipts = _of(run, "receipts") if run.evidence.has("receipts") else None
    is_labelled = np.array([label != UNEXPLAINED for label in labels["label"].to_pylist()])
    n1 = _numbers(receipts, "C4", "N1", num)
    n2 = _numbers(receipts, "C4", "N2", num)
    token = _numbers(receipts, "C5", "A_tok", num)
    has_n1 = bool((~np.isnan(n1[0])).any())
    own = tuple(labels[name].to_numpy().astype(np.float64) for name in ("auroc", "auroc_low", "auroc_high"))
    value, low, high = n1 if has_n1 else own
    is_lexical = np.array([kind == "lexical" for kind in labels["kind"].to_pylist()])
    if bool((~np.isnan(token[0])).any()):
        is_lexical = token[0] >= LEXICAL
    return FeatureScores(
        scored_on="N1" if has_n1 else "all inactive rows",
        is_alive=labels["n_active"].to_numpy() > 0,
        is_labelled=is_labelled,
        is_lexical=is_lexical,
        auroc=np.where(is_labelled, value, np.nan),
        low=low,
        high=high,
        n2_auroc=np.where(is_labelled, n2[0], np.nan),
        n2_low=n2[1],
        n2_high=n2[2],
        passes_permutation=_verdicts(receipts, "C3", num),
    )


def _of(run: "Run", table: str) -> pa.Table:
    rows = run.evidence.read(table)
    return rows.filter(pc.field("dictionary") == run.spec.name)


def _numbers(receipts: pa.Table | None, code: str, end: str, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high [num] of the receipts of a control whose name ends so."""
    found = np.full((3, num), np.nan)
    for row in _rows(receipts, code, end):
        found[:, row["feature"]] = [np.nan if row[name] is None else row[name] for name in ("value", "low", "high")]
    return found[0], found[1], found[2]


def _verdicts(receipts: pa.Table | None, code: str, num: int) -> np.ndarray:
    found = np.full(num, np.nan)
    for row in _rows(receipts, code, ""):
        if row["verdict"] in ("passed", "failed"):
            found[row["feature"]] = row["verdict"] == "passed"
    return found


def _rows(receipts: pa.Table | None, code: str, end: str) -> Sequence[dict]:
    if receipts is None:
        return ()
    keep = [name.startswith(f"{code} ") and name.endswith(end) for name in receipts["control"].to_pylist()]
    of_features = receipts.filter(pa.array(keep, pa.bool_())).filter(pc.field("feature").is_valid())
    return of_features.select(["feature", "value", "low", "high", "verdict"]).to_pylist()
