"""Label features with executable predicates: made on train, chosen on calibration, scored on test.

What a row is, and where a feature is active, is defined in `split_rows.py`.

A label is a predicate (`pipelines/predicates.py`) and its description. Candidates are counted on train documents
(`label_candidates.propose`); the one with the best calibration F1 is taken, or a simpler one within
`simplicity_margin` of it; where none reaches the thresholds the feature stays 'unexplained'. Only then do test
activations count: AUROC of the yes/no predicate is (TPR + TNR) / 2 (ties count 1/2), its interval a bootstrap over test
documents (`auroc_interval`). A label that cannot be scored, because no test row (or every one) is active, is taken
back: no label without its score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from saeql.store.evidence import Evidence
from saeql.store.records import LABELS

from .label_candidates import CandidateLimits, propose
from .predicates import Predicate
from .progress import OnProgress
from .split_rows import SplitRows, read_feature_rows

EXPLAINER = "predicates"
UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class LabelConfig:
    """Thresholds of the labeller. All of them are applied on train or calibration, none on test."""

    active_fraction: float = 0.25
    """A feature is active where its activation exceeds this fraction of its largest train activation, in [0, 1)."""
    min_f1: float = 0.3
    """Calibration F1 that a label needs; candidates need half of it on train."""
    min_lift: float = 2.0
    """P(active | predicate) / P(active) that a label needs, on train and on calibration."""
    min_active_rows: int = 10
    """Active rows that a feature needs on train, and again on calibration, to be labelled at all."""
    min_hits: int = 3
    """Active rows on which a label must hold, on train and on calibration."""
    simplicity_margin: float = 0.02
    """Calibration F1 given up for a simpler predicate."""
    max_candidates: int = 16
    """Candidates a feature that are tried on calibration."""
    max_set_size: int = 8
    """Texts that a 'one of ...' predicate may list."""
    num_bootstrap: int = 400
    """Draws of test documents behind each interval."""
    seed: int = 0
    """Seed of the document draws, the only randomness here."""

    def __post_init__(self):
        if not 0 <= self.active_fraction < 1:
            raise ValueError(f"active_fraction must be in [0, 1), not {self.active_fraction}")
        for name in ("min_active_rows", "min_hits", "max_candidates", "num_bootstrap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_set_size < 2:
            raise ValueError(f"max_set_size must be at least 2, not {self.max_set_size}")


@dataclass(frozen=True)
class _Choice:
    predicate: Predicate
    calibration_f1: float


def _candidates(train: SplitRows, calibration: SplitRows, config: LabelConfig) -> dict[Predicate, list[int]]:
    """Candidate predicates with the features that propose them; features that are too rare to choose for have none."""
    limits = CandidateLimits(
        min_hits=config.min_hits,
        min_lift=config.min_lift,
        min_f1=config.min_f1 / 2,
        max_candidates=config.max_candidates,
        max_set_size=config.max_set_size,
    )
    enough = np.minimum(train.active.counts, calibration.active.counts) >= config.min_active_rows
    kept = enough[train.active.features]
    active = train.active.where(kept)
    proposed: dict[Predicate, list[int]] = {}
    for feature, own in enumerate(propose(train.windows, active, train.eligible, limits)):
        for predicate in own:
            proposed.setdefault(predicate, []).append(feature)
    return proposed


def _choose(
    calibration: SplitRows, proposed: dict[Predicate, list[int]], config: LabelConfig, on_progress: OnProgress | None
) -> dict[int, _Choice]:
    """The label of every feature that has one: best calibration F1, or a simpler predicate within the margin."""
    rows_of = calibration.active.by_feature()
    passed: dict[int, list[_Choice]] = {}
    for done, (predicate, features) in enumerate(proposed.items()):
        holds = predicate.rows(calibration.windows).ravel() & calibration.eligible
        support = int(np.count_nonzero(holds))
        for feature in features:
            rows = rows_of[feature]
            hits = int(np.count_nonzero(holds[rows]))
            if hits < config.min_hits:
                continue
            f1 = 2 * hits / (len(rows) + support)
            lift = hits * calibration.num_rows / (support * len(rows))
            if f1 >= config.min_f1 and lift >= config.min_lift:
                passed.setdefault(feature, []).append(_Choice(predicate, f1))
        if on_progress is not None and (done % 500 == 499 or done + 1 == len(proposed)):
            on_progress(done + 1, len(proposed))
    chosen = {}
    for feature, choices in passed.items():
        bar = max(c.calibration_f1 for c in choices) - config.simplicity_margin
        near = [c for c in choices if c.calibration_f1 >= bar]
        chosen[feature] = min(near, key=lambda c: (c.predicate.complexity, -c.calibration_f1, c.predicate.to_json()))
    return chosen


def _count_by_document(test: SplitRows, predicates: Sequence[Predicate], features: Sequence[int]) -> np.ndarray:
    """[N, D, 4] float64: true positives, false positives, false negatives, true negatives of N labels by document."""
    rows_of, size = test.active.by_feature(), test.num_documents
    num_rows = np.bincount(test.documents[test.eligible], minlength=size)
    out = np.zeros((len(predicates), size, 4))
    for i, (predicate, feature) in enumerate(zip(predicates, features, strict=True)):
        holds = predicate.rows(test.windows).ravel() & test.eligible
        rows = rows_of[feature]
        active = np.bincount(test.documents[rows], minlength=size)
        hits = np.bincount(test.documents[rows[holds[rows]]], minlength=size)
        claimed = np.bincount(test.documents[holds], minlength=size)
        out[i] = np.stack([hits, claimed - hits, active - hits, num_rows - active - claimed + hits], axis=1)
    return out


def _auroc(counts: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...]: (TPR + TNR) / 2, NaN where there is no active or no inactive row."""
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (tp / (tp + fn) + tn / (tn + fp)) / 2


def _wilson(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % Wilson interval of hits / n: it has a width even where all or none of the rows are hits."""
    z2 = 1.96**2
    centre, half = hits + z2 / 2, 1.96 * np.sqrt(hits * (n - hits) / n + z2 / 4)
    return (centre - half) / (n + z2), (centre + half) / (n + z2)


def auroc_interval(counts: np.ndarray, config: LabelConfig) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of each label's AUROC over draws of documents with replacement, [N] and [N].

    Args: `counts` [N, D, 4], see `_count_by_document`. All labels share the draws. A draw without an active row says
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
            auroc = _auroc((draws @ flat).reshape(config.num_bootstrap, len(part), 4))  # [B, n]
            low[part], high[part] = np.nanpercentile(auroc, [2.5, 97.5], axis=0)
    tp, fp, fn, tn = counts[spread].sum(axis=1).T
    tpr_low, tpr_high = _wilson(tp, tp + fn)
    tnr = tn / (tn + fp)
    low[spread] = np.minimum(low[spread], (tpr_low + tnr) / 2)
    high[spread] = np.maximum(high[spread], (tpr_high + tnr) / 2)
    return low, high


def _score(test: SplitRows, chosen: dict[int, _Choice], config: LabelConfig) -> dict[int, dict[str, float | None]]:
    """Test scores of the labels that can be scored: active and inactive rows both exist."""
    num_active = test.active.counts
    features = [f for f in sorted(chosen) if 0 < num_active[f] < test.num_rows]
    scores: dict[int, dict[str, float | None]] = {}
    for start in range(0, len(features), 256):
        part = features[start : start + 256]
        counts = _count_by_document(test, [chosen[f].predicate for f in part], part)
        low, high = auroc_interval(counts, config)
        total = counts.sum(axis=1)  # [n, 4]
        auroc = _auroc(total)
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


def _table(dictionary: str, test: SplitRows, chosen: dict[int, _Choice], scores: dict) -> pa.Table:
    num_active, num_rows = test.active.counts, test.num_rows
    records = []
    for feature in range(len(num_active)):
        choice = chosen.get(feature) if feature in scores else None
        record = dict.fromkeys(LABELS.names) | {
            "dictionary": dictionary,
            "feature": feature,
            "label": choice.predicate.describe() if choice else UNEXPLAINED,
            "kind": choice.predicate.kind if choice else "none",
            "predicate": choice.predicate.to_json() if choice else None,
            "explainer": EXPLAINER,
            "score_split": "test",
            "n_active": int(num_active[feature]),
            "n_inactive": int(num_rows - num_active[feature]),
        }
        if choice:
            record |= scores[feature] | {"calibration_f1": choice.calibration_f1}
        records.append(record)
    return pa.Table.from_pylist(records, schema=LABELS)


def label_dictionary(
    evidence: Evidence, *, dictionary: str, config: LabelConfig, on_progress: OnProgress | None = None
) -> pa.Table:
    """Label every feature of `dictionary`: a table of `records.LABELS`, one row a feature in feature order.

    Reads windows, vocabulary, dictionaries and activations; writes nothing. `on_progress(done, total)` counts candidate
    predicates tried on calibration. Raises EvidenceError where the evidence is missing or inconsistent.
    """
    rows = read_feature_rows(evidence, dictionary, active_fraction=config.active_fraction)
    proposed = _candidates(rows.train, rows.calibration, config)
    chosen = _choose(rows.calibration, proposed, config, on_progress)
    return _table(dictionary, rows.test, chosen, _score(rows.test, chosen, config))


def write_labels(
    evidence: Evidence, *, dictionaries: Sequence[str], config: LabelConfig, on_progress: OnProgress | None = None
) -> pa.Table:
    """Label all `dictionaries` and write evidence table `labels`, replacing what was there. Returns the table."""
    tables = [label_dictionary(evidence, dictionary=d, config=config, on_progress=on_progress) for d in dictionaries]
    labels = pa.concat_tables(tables)
    evidence.write("labels", labels)
    return labels
