"""Label features with executable predicates: made on train, chosen on calibration, scored on test.

Everything here rests on ONE binary question a row: is the feature ACTIVE there?

    active    activation > tau, tau = `active_fraction` * the feature's largest activation on TRAIN rows
    inactive  every other row at a position > 0, weak activations included

tau is fixed on train and applied unchanged to all splits. Position 0 is never a row. Rows of massive norm have no
activations, so they count as inactive (`split_rows` says how many there are).

A label is a predicate (`pipelines/predicates.py`) and its description. Candidates are counted on train documents
(`label_candidates.propose`); the one with the best calibration F1 is taken, or a simpler one within
`simplicity_margin` of it; where none reaches the thresholds the feature stays 'unexplained'. Only then do test
activations count: AUROC of the yes/no predicate is (TPR + TNR) / 2 (ties count 1/2), its interval a bootstrap over test
documents (`auroc_interval`). A label that cannot be scored, because no test row (or every one) is active, is taken
back: no label without its score.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeql.store.evidence import Evidence, EvidenceError
from saeql.store.records import LABELS

from .label_candidates import ActiveRows, CandidateLimits, propose
from .predicates import Predicate
from .token_classes import RowTable, Vocabulary, pad_lists

EXPLAINER = "predicates"
UNEXPLAINED = "unexplained"

Progress = Callable[[int, int], None]


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
class _Split:
    """One split: windows [W, T], which of the R = W * T rows count, their documents, where features are active."""

    windows: RowTable
    eligible: np.ndarray  # [R] bool: position > 0 inside the window
    documents: np.ndarray  # [R] int32 dense document numbers, -1 where the row does not count
    num_documents: int
    active: ActiveRows

    @property
    def num_rows(self) -> int:
        return int(self.eligible.sum())


@dataclass(frozen=True)
class _Choice:
    predicate: Predicate
    calibration_f1: float


def num_features(evidence: Evidence, dictionary: str) -> int:
    """d_sae of `dictionary`. Raises EvidenceError where the evidence has no such dictionary."""
    table = evidence.read("dictionaries", columns=["dictionary", "d_sae"])
    known = dict(zip(table["dictionary"].to_pylist(), table["d_sae"].to_pylist(), strict=True))
    if dictionary not in known:
        raise EvidenceError(f"no dictionary {dictionary!r} in {evidence.folder}; it has: {', '.join(sorted(known))}")
    return known[dictionary]


def _read_activations(evidence: Evidence, dictionary: str, split: str, row_of: "_RowLookup", features: int):
    """(keys [A] int64 = feature * R + row, activations [A] float32) of a split, in file order."""
    condition = (pc.field("split") == split) & (pc.field("dictionary") == dictionary)
    columns = ["feature", "window_id", "position", "activation"]
    keys, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for file in evidence.files("activations"):
        part = pq.read_table(file, columns=columns, filters=condition)
        feature = part["feature"].to_numpy()
        if len(feature) and not 0 <= feature.min() <= feature.max() < features:
            raise EvidenceError(f"{file}: a feature is outside 0..{features - 1}")
        rows = row_of(part["window_id"].to_numpy(), part["position"].to_numpy())
        keys.append(feature.astype(np.int64) * row_of.num_rows + rows)
        values.append(part["activation"].to_numpy())
    return np.concatenate(keys), np.concatenate(values)


class _RowLookup:
    """(window_id, position) -> row number of one split."""

    def __init__(self, window_ids: np.ndarray, context_tokens: int):
        self.order = np.argsort(window_ids, kind="stable")
        self.ids = window_ids[self.order]
        self.context_tokens = context_tokens
        self.num_rows = max(len(window_ids) * context_tokens, 1)

    def __call__(self, window_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Raises EvidenceError at a row that is in no window of the split."""
        if len(window_ids) == 0:
            return np.zeros(0, np.int64)
        at = np.searchsorted(self.ids, window_ids)
        if len(self.ids) == 0 or (self.ids[np.minimum(at, len(self.ids) - 1)] != window_ids).any():
            raise EvidenceError("activations name a window that table `windows` does not have in their split")
        if positions.min() < 0 or positions.max() >= self.context_tokens:
            raise EvidenceError("activations name a position outside of their window")
        return self.order[at] * self.context_tokens + positions


def _read_split(
    evidence: Evidence, vocabulary: Vocabulary, dictionary: str, split: str, features: int
) -> tuple[RowTable, np.ndarray, tuple[np.ndarray, np.ndarray], int]:
    """(windows, document_ids [R], activations, R) of a split."""
    table = evidence.read("windows", split=split)
    windows = RowTable.from_windows(vocabulary, table["token_ids"])
    lookup = _RowLookup(table["window_id"].to_numpy(), windows.tokens.shape[1])
    read = _read_activations(evidence, dictionary, split, lookup, features)
    return windows, pad_lists(table["document_ids"]).ravel(), read, lookup.num_rows


def _split_of(windows: RowTable, document_ids: np.ndarray, read, num_rows: int, tau: np.ndarray) -> _Split:
    keys, values = read
    keys = np.sort(keys[values > tau[keys // num_rows]])
    if (np.diff(keys) == 0).any():
        raise EvidenceError("activations hold a feature twice on one row: were two runs written into one folder?")
    eligible = windows.valid.copy()
    eligible[:, :1] = False
    eligible = eligible.ravel()
    keys = keys[eligible[keys % num_rows]] if len(keys) else keys
    active = ActiveRows((keys // num_rows).astype(np.int32), (keys % num_rows).astype(np.int32), len(tau))
    documents = np.full(len(document_ids), -1, np.int32)
    names, documents[eligible] = np.unique(document_ids[eligible], return_inverse=True)
    return _Split(windows, eligible, documents, len(names), active)


def _read(evidence: Evidence, dictionary: str, config: LabelConfig) -> tuple[_Split, _Split, _Split]:
    """The three splits under one definition of active. tau comes from train alone."""
    features = num_features(evidence, dictionary)
    vocabulary = Vocabulary.from_table(evidence.read("vocabulary"))
    tau, splits = np.zeros(features, np.float32), []
    for split in ("train", "calibration", "test"):
        windows, documents, read, num_rows = _read_split(evidence, vocabulary, dictionary, split, features)
        if split == "train":
            np.maximum.at(tau, read[0] // num_rows, read[1])
            tau *= np.float32(config.active_fraction)
        splits.append(_split_of(windows, documents, read, num_rows, tau))
    return splits[0], splits[1], splits[2]


def _candidates(train: _Split, calibration: _Split, config: LabelConfig) -> dict[Predicate, list[int]]:
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
    active = ActiveRows(train.active.features[kept], train.active.rows[kept], train.active.num_features)
    proposed: dict[Predicate, list[int]] = {}
    for feature, own in enumerate(propose(train.windows, active, train.eligible, limits)):
        for predicate in own:
            proposed.setdefault(predicate, []).append(feature)
    return proposed


def _choose(
    calibration: _Split, proposed: dict[Predicate, list[int]], config: LabelConfig, on_progress: Progress | None
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


def _count_by_document(test: _Split, predicates: Sequence[Predicate], features: Sequence[int]) -> np.ndarray:
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


def _score(test: _Split, chosen: dict[int, _Choice], config: LabelConfig) -> dict[int, dict[str, float | None]]:
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


def _table(dictionary: str, test: _Split, chosen: dict[int, _Choice], scores: dict) -> pa.Table:
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
    evidence: Evidence, *, dictionary: str, config: LabelConfig, on_progress: Progress | None = None
) -> pa.Table:
    """Label every feature of `dictionary`: a table of `records.LABELS`, one row a feature in feature order.

    Reads windows, vocabulary, dictionaries and activations; writes nothing. `on_progress(done, total)` counts candidate
    predicates tried on calibration. Raises EvidenceError where the evidence is missing or inconsistent.
    """
    train, calibration, test = _read(evidence, dictionary, config)
    proposed = _candidates(train, calibration, config)
    chosen = _choose(calibration, proposed, config, on_progress)
    return _table(dictionary, test, chosen, _score(test, chosen, config))


def write_labels(
    evidence: Evidence, *, dictionaries: Sequence[str], config: LabelConfig, on_progress: Progress | None = None
) -> pa.Table:
    """Label all `dictionaries` and write evidence table `labels`, replacing what was there. Returns the table."""
    tables = [label_dictionary(evidence, dictionary=d, config=config, on_progress=on_progress) for d in dictionaries]
    labels = pa.concat_tables(tables)
    evidence.write("labels", labels)
    return labels
