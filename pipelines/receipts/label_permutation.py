"""C3: does a label fit its own feature better than the labels of like features do? Generic labels fit many."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from scipy.spatial import KDTree

from ..explainers.base import Candidate
from ..predicates import Predicate
from ..split_rows import SplitRows
from .control import Labelled
from .receipt import FAILED, PASSED, REPORTED, Receipt, judged
from .statistics import aurocs, benjamini_hochberg
from .thresholds import THRESHOLDS
from .token_table import Counts

if TYPE_CHECKING:
    from ..run import Run

#: Labels scored at once, each on the examples of all features that compare with it.
_LABELS_AT_ONCE = 64


class LabelPermutation:
    """p = (1 + #{other labels that score at least as well on this feature's examples}) / (1 + N).

    The N others are labels of the features nearest in (log firing rate, token entropy), other ones than its own: for an
    executable label executable ones, for words the words of any. Scores are AUROC against matched negatives (N1). A
    feature counts as labelled where Benjamini and Hochberg's procedure rejects over all features.
    """

    code: ClassVar[str] = "C3"
    name: ClassVar[str] = "label permutation"
    tier: ClassVar[str] = "fast"

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Needs nothing of the run."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """One receipt a label, and the share of the alive features that is labelled."""
        named, features = f"{self.code} {self.name}", _testable(labelled)
        alive = int((labelled.rows.test.active.counts > 0).sum())
        others = _others(labelled, features)
        own = {f: float(v) for f, v in zip(features, _own(labelled, features), strict=True)}
        found = _scores_of_others(labelled, others)
        p = np.array([_p_value(own[f], found[f]) for f in features], np.float64)
        rejected = benjamini_hochberg(p, THRESHOLDS.false_discovery_rate)
        receipts = [
            Receipt(
                feature=feature,
                control=named,
                value=None if np.isnan(value) else float(value),
                threshold=THRESHOLDS.false_discovery_rate,
                n=len(found[feature]),
                verdict=PASSED if passed else FAILED,
                detail={"auroc": own[feature], "others": _quantiles(found[feature])},
            )
            for feature, value, passed in zip(features, p, rejected, strict=True)
        ]
        share = float(rejected.sum() / alive) if alive else None
        detail = {"labelled": int(rejected.sum()), "with_label": len(labelled.labels), "testable": len(features)}
        receipts.append(Receipt(control=f"{named} share", value=share, n=alive, verdict=REPORTED, detail=detail))
        receipts.append(_mean_receipt(named, [found[f] for f in features], len(features)))
        return receipts


def _testable(labelled: Labelled) -> list[int]:
    """Labelled features that have examples on both sides."""
    scores = labelled.scores
    return [f for f in sorted(scores) if len(scores[f]["active"]) > 0 and len(scores[f].get("N1", ())) > 0]


def _own(labelled: Labelled, features: Sequence[int]) -> np.ndarray:
    scores = [labelled.scores[f] for f in features]
    return _aurocs([(own["active"], own["N1"]) for own in scores])


def _aurocs(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """AUROC of each pair of positive and negative scores; those of one shape are counted together."""
    out, shapes = np.zeros(len(pairs)), dict[tuple[int, int], list[int]]()
    for index, (positive, negative) in enumerate(pairs):
        shapes.setdefault((len(positive), len(negative)), []).append(index)
    for indices in shapes.values():
        out[indices] = aurocs(*(np.stack([pairs[i][side] for i in indices]) for side in (0, 1)))
    return out


def _p_value(own: float, others: np.ndarray) -> float:
    return float("nan") if len(others) == 0 else (1 + np.count_nonzero(others >= own - 1e-12)) / (1 + len(others))


def _quantiles(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(values, [0.05, 0.5, 0.95])] if len(values) else []


def _mean_receipt(named: str, found: list[np.ndarray], num_features: int) -> Receipt:
    """Mean AUROC of labels on features that they were not made for: a leak shows here."""
    values = np.concatenate([np.zeros(0), *found])
    mean = float(values.mean()) if len(values) else None
    margin = THRESHOLDS.null_margin
    enough = num_features >= THRESHOLDS.null_features
    verdict = judged(abs(mean - 0.5) if mean is not None else None, margin, at_least=False) if enough else REPORTED
    return Receipt(control=f"{named} mean", value=mean, threshold=margin, n=len(values), verdict=verdict)


def likeness(split: SplitRows) -> np.ndarray:
    """[F, 2] log firing rate and entropy (nats) of the tokens on active rows, each scaled to standard deviation 1."""
    vocabulary = len(split.windows.vocabulary)
    counts = Counts.of(split.active, split.windows.tokens.ravel().astype(np.int64), vocabulary)
    total = split.active.counts
    share = counts.active / np.maximum(total[counts.features], 1)
    entropy = -np.bincount(counts.features, share * np.log(share), split.active.num_features)
    both = np.stack([np.log(np.maximum(total, 0.5)), entropy], axis=1)
    spread = both[total > 0].std(axis=0) if (total > 0).any() else np.ones(2)
    return both / np.where(spread > 0, spread, 1)


def _others(labelled: Labelled, features: Sequence[int]) -> dict[int, list[int]]:
    """For every feature up to `permutations` features with another label, the likest first.

    Executable labels are compared with executable ones; words with the words of all, since all can be read.
    """
    places, labels = likeness(labelled.rows.test), labelled.labels
    out: dict[int, list[int]] = {f: [] for f in features}
    for executable in (True, False):
        asking = [f for f in features if (labels[f].predicate is not None) == executable]
        group = np.array(asking if executable else features, np.int64)
        if len(group) < 2 or not asking:
            continue
        texts = [labels[f].label for f in group.tolist()]
        repeats = max(np.unique(texts, return_counts=True)[1])
        few = not executable and getattr(labelled.label_scorer, "is_costly", False)
        num = THRESHOLDS.costly_permutations if few else THRESHOLDS.permutations
        asked = min(len(group), num + int(repeats))
        nearest = np.asarray(KDTree(places[group]).query(places[asking], k=asked)[1])
        for feature, near in zip(asking, nearest.tolist(), strict=True):
            kept = [int(group[i]) for i in near if texts[i] != labels[feature].label]
            out[feature] = kept[:num]
    return out


def _scores_of_others(labelled: Labelled, others: dict[int, list[int]]) -> dict[int, np.ndarray]:
    """For every feature the AUROC of each of the others' labels on its own examples.

    A scorer that does anything else with executable labels than execute them is asked about all of them, row by row.
    """
    is_executed = getattr(labelled.label_scorer, "executes", False)
    executable = {f: own for f, own in others.items() if is_executed and labelled.labels[f].predicate is not None}
    found = _executed(labelled, executable)
    found |= _scored(labelled, {f: own for f, own in others.items() if f not in executable})
    return found


def _executed(labelled: Labelled, others: dict[int, list[int]]) -> dict[int, np.ndarray]:
    """The same where all labels are executable: each is executed once on all test rows, and its hits are counted."""
    test, examples = labelled.rows.test, labelled.examples
    nowhere = test.windows.tokens.size  # a row on which nothing holds
    active = _padded([examples[f].active for f in others], nowhere)
    matched = _padded([examples[f].negatives["N1"] for f in others], nowhere)
    num_active, num_matched = ((rows < nowhere).sum(axis=1) for rows in (active, matched))
    lengths = [len(own) for own in others.values()]
    place = np.repeat(np.arange(len(lengths)), lengths)
    flat = np.array([label for own in others.values() for label in own], np.int64)
    by_label: dict[Predicate, list[int]] = {}
    for label in np.unique(flat).tolist():
        by_label.setdefault(_predicate(labelled, label), []).append(label)
    out, holds = np.full(len(flat), np.nan), np.zeros(nowhere + 1, bool)
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    for predicate, labels in by_label.items():
        matches = predicate.matches(test.windows)
        holds[matches] = True
        at = np.concatenate([order[slice(*np.searchsorted(ordered, [label, label + 1]))] for label in labels])
        own = place[at]
        true, false = holds[active[own]].sum(axis=1), holds[matched[own]].sum(axis=1)  # hits, false alarms
        p, q = num_active[own], num_matched[own]
        won = 2 * true * (q - false) + true * false + (p - true) * (q - false)  # twice: a tie counts once
        out[at] = won / (2 * p * q).astype(np.float64)
        holds[matches] = False
    return dict(zip(others, np.split(out, np.cumsum(lengths)[:-1]), strict=True)) if lengths else {}


def _predicate(labelled: Labelled, feature: int) -> Predicate:
    predicate = labelled.labels[feature].predicate
    assert predicate is not None
    return predicate


def _padded(rows: Sequence[np.ndarray], filler: int) -> np.ndarray:
    out = np.full((len(rows), max((len(r) for r in rows), default=0)), filler, np.int64)
    for line, own in zip(out, rows, strict=True):
        line[: len(own)] = own
    return out


def _scored(labelled: Labelled, others: dict[int, list[int]]) -> dict[int, np.ndarray]:
    """The same by the scorer of the labels."""
    examples, test = labelled.examples, labelled.rows.test
    found = {f: np.full(len(own), np.nan) for f, own in others.items()}
    asked: dict[int, list[tuple[int, int]]] = {}
    for feature, own in others.items():
        for place, other in enumerate(own):
            asked.setdefault(other, []).append((feature, place))
    rows = {f: np.concatenate([examples[f].active, examples[f].negatives["N1"]]) for f in others}
    labels = sorted(asked)
    for start in range(0, len(labels), _LABELS_AT_ONCE):
        block = [(label, f, place) for label in labels[start : start + _LABELS_AT_ONCE] for f, place in asked[label]]
        asked_as = [_as(labelled.labels[label], labelled.labels[f]) for label, f, _ in block]
        scores = labelled.label_scorer.score(asked_as, [rows[f] for _, f, _ in block], test)
        sizes = [len(examples[f].active) for _, f, _ in block]
        values = _aurocs([(own[:size], own[size:]) for own, size in zip(scores, sizes, strict=True)])
        for (_, f, place), value in zip(block, values, strict=True):
            found[f][place] = value
    return found


def _as(label: Candidate, own: Candidate) -> Candidate:
    """`label` as it is scored on a feature whose label is `own`: by its words alone where that is words."""
    return label if own.predicate is not None else replace(label, predicate=None)
