"""Executable labels scored exactly, over all rows of a split: F1 to choose by, AUROC with its interval to report.

AUROC of a yes/no predicate is (TPR + TNR) / 2 (ties count 1/2), its interval a bootstrap over documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .explainers.base import Candidate
from .label_config import LabelConfig
from .predicates import Predicate
from .progress import OnProgress
from .receipts.statistics import wilson
from .split_rows import SplitRows

#: Labels times documents that are counted at once.
COUNTS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class ExecutableChoice:
    """The executable label of a feature, and what it was chosen by."""

    candidate: Candidate
    calibration_f1: float


def choose_executable(
    calibration: SplitRows,
    candidates: Mapping[int, Sequence[Candidate]],
    config: LabelConfig,
    on_progress: OnProgress | None = None,
) -> dict[int, ExecutableChoice]:
    """Of every feature's executable candidates the best calibration F1, or a simpler one within the margin.

    Features none of whose candidates reaches the thresholds are missing.
    """
    proposed: dict[Predicate, dict[int, Candidate]] = {}
    for feature, own in candidates.items():
        for candidate in own:
            if candidate.predicate is not None:
                proposed.setdefault(candidate.predicate, {}).setdefault(feature, candidate)
    rows_of = calibration.active.by_feature()
    passed: dict[int, list[ExecutableChoice]] = {}
    holds = np.zeros(calibration.windows.tokens.size, bool)
    for done, (predicate, features) in enumerate(proposed.items()):
        matches = predicate.matches(calibration.windows)
        matches = matches[calibration.eligible[matches]]
        support, holds[matches] = len(matches), True
        for feature, candidate in features.items():
            rows = rows_of[feature]
            hits = int(np.count_nonzero(holds[rows]))
            if hits < config.min_hits:
                continue
            f1 = 2 * hits / (len(rows) + support)
            lift = hits * calibration.num_rows / (support * len(rows))
            if f1 >= config.min_f1 and lift >= config.min_lift:
                passed.setdefault(feature, []).append(ExecutableChoice(candidate, f1))
        holds[matches] = False
        if on_progress is not None and (done % 500 == 499 or done + 1 == len(proposed)):
            on_progress(done + 1, len(proposed))
    return {feature: _simplest(choices, config.simplicity_margin) for feature, choices in passed.items()}


def _simplest(choices: list[ExecutableChoice], margin: float) -> ExecutableChoice:
    def order(choice: ExecutableChoice) -> tuple[float, float, str]:
        assert choice.candidate.predicate is not None
        return choice.candidate.predicate.complexity, -choice.calibration_f1, choice.candidate.predicate.to_json()

    bar = max(c.calibration_f1 for c in choices) - margin
    return min((c for c in choices if c.calibration_f1 >= bar), key=order)


def count_by_document(test: SplitRows, predicates: Sequence[Predicate], features: Sequence[int]) -> np.ndarray:
    """[N, D, 4] float64: true positives, false positives, false negatives, true negatives of N labels by document."""
    rows_of, size = test.active.by_feature(), test.num_documents
    num_rows = np.bincount(test.documents[test.eligible], minlength=size)
    out = np.zeros((len(predicates), size, 4))
    for i, (predicate, feature) in enumerate(zip(predicates, features, strict=True)):
        matches = predicate.matches(test.windows)
        matches = matches[test.eligible[matches]]
        rows = rows_of[feature]
        active = np.bincount(test.documents[rows], minlength=size)
        hits = np.bincount(test.documents[rows[predicate.at(test.windows, rows)]], minlength=size)
        claimed = np.bincount(test.documents[matches], minlength=size)
        out[i] = np.stack([hits, claimed - hits, active - hits, num_rows - active - claimed + hits], axis=1)
    return out


def auroc_of_counts(counts: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...]: (TPR + TNR) / 2, NaN where there is no active or no inactive row."""
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (tp / (tp + fn) + tn / (tn + fp)) / 2


def interval_of_counts(counts: np.ndarray, config: LabelConfig) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of each label's AUROC over draws of documents with replacement, [N] and [N].

    Args: `counts` [N, D, 4], see `count_by_document`. All labels share the draws. A draw without an active row says
    nothing and is left out. Where a label holds on none (or all) of the active rows every draw agrees, so the interval
    is widened to what the active rows alone leave open: Wilson's of the true positive rate. NaN where the active rows
    lie in fewer than two documents: one document has no spread.
    """
    num_labels, num_documents, _ = counts.shape
    rng = np.random.default_rng(config.seed)
    draws = rng.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=config.num_bootstrap)
    low, high = np.full(num_labels, np.nan), np.full(num_labels, np.nan)
    spread = np.count_nonzero(counts[:, :, 0] + counts[:, :, 2], axis=1) >= 2
    for part in np.array_split(np.flatnonzero(spread), max(num_labels // 256, 1)):
        if len(part):
            flat = counts[part].transpose(1, 0, 2).reshape(num_documents, -1)
            auroc = auroc_of_counts((draws @ flat).reshape(config.num_bootstrap, len(part), 4))  # [B, n]
            low[part], high[part] = np.nanpercentile(auroc, [2.5, 97.5], axis=0)
    tp, fp, fn, tn = counts[spread].sum(axis=1).T
    tpr_low, tpr_high = wilson(tp, tp + fn)
    tnr = tn / (tn + fp)
    low[spread] = np.minimum(low[spread], (tpr_low + tnr) / 2)
    high[spread] = np.maximum(high[spread], (tpr_high + tnr) / 2)
    return low, high


def score_executable(
    test: SplitRows, labels: Mapping[int, Predicate], config: LabelConfig
) -> dict[int, dict[str, float | None]]:
    """Columns of `records.LABELS` for the labels that can be scored: active and inactive rows both exist."""
    num_active = test.active.counts
    features = [f for f in sorted(labels) if 0 < num_active[f] < test.num_rows]
    scores: dict[int, dict[str, float | None]] = {}
    at_once = max(1, min(256, COUNTS_AT_ONCE // max(test.num_documents, 1)))
    for start in range(0, len(features), at_once):
        part = features[start : start + at_once]
        counts = count_by_document(test, [labels[f] for f in part], part)
        low, high = interval_of_counts(counts, config)
        total = counts.sum(axis=1)  # [n, 4]
        auroc = auroc_of_counts(total)
        for i, feature in enumerate(part):
            tp, fp, fn, _ = total[i]
            scores[feature] = {
                "auroc": float(auroc[i]),
                "auroc_low": None if np.isnan(low[i]) else float(low[i]),
                "auroc_high": None if np.isnan(high[i]) else float(high[i]),
                "precision": float(tp / (tp + fp)) if tp + fp else 0.0,
                "recall": float(tp / (tp + fn)),
                "f1": float(2 * tp / (2 * tp + fp + fn)),
            }
    return scores
