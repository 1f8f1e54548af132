"""The rows of a text, split by split, with where each feature of a dictionary is active: what explanations are made on.

Everything about labels rests on ONE binary question a row: is the feature ACTIVE there?

    active    activation > tau, tau = `active_fraction` * the feature's largest activation on TRAIN rows
    inactive  every other row at a position > 0, weak activations included

tau is fixed on train and applied unchanged to all splits. Position 0 is never a row. Rows of massive norm have no
activations, so they count as inactive (`split_rows` says how many there are).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeql.store.evidence import Evidence, EvidenceError
from saeql.store.records import SPLITS

from .token_classes import RowTable, Vocabulary, pad_lists

if TYPE_CHECKING:
    from .part_of_speech import Tagger


@dataclass(frozen=True)
class ActiveRows:
    """The rows on which each feature is active, sorted by (feature, row); a row is window * T + position."""

    features: np.ndarray  # [A] int32
    rows: np.ndarray  # [A] int32
    values: np.ndarray  # [A] float32 activations
    num_features: int

    @cached_property
    def counts(self) -> np.ndarray:
        """[F] int64 active rows a feature."""
        return np.bincount(self.features, minlength=self.num_features)

    @cached_property
    def starts(self) -> np.ndarray:
        """[F + 1] int64: feature f has entries starts[f] to starts[f + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def where(self, keep: np.ndarray) -> "ActiveRows":
        """The entries that `keep` [A] bool marks, or numbers."""
        return ActiveRows(self.features[keep], self.rows[keep], self.values[keep], self.num_features)

    def by_feature(self) -> list[np.ndarray]:
        """F arrays of row numbers."""
        return np.split(self.rows, self.starts[1:-1])

    def values_by_feature(self) -> list[np.ndarray]:
        """F arrays of activations, in the order of `by_feature`."""
        return np.split(self.values, self.starts[1:-1])


@dataclass(frozen=True)
class SplitRows:
    """One split: windows [W, T], which of the R = W * T rows count, their documents, where features are active."""

    split: str
    windows: RowTable
    window_ids: np.ndarray  # [W] ids in table `windows`
    eligible: np.ndarray  # [R] bool: position > 0 inside the window
    documents: np.ndarray  # [R] int32 dense document numbers, -1 where the row does not count
    num_documents: int
    active: ActiveRows  # activation > tau
    weak: ActiveRows  # 0 < activation <= tau: inactive, but the feature does fire

    @cached_property
    def num_rows(self) -> int:
        """Rows that count."""
        return int(self.eligible.sum())


@dataclass(frozen=True)
class FeatureRows:
    """The three splits under one definition of active."""

    dictionary: str
    tau: np.ndarray  # [F] float32
    train: SplitRows
    calibration: SplitRows
    test: SplitRows

    @property
    def num_features(self) -> int:
        """d_sae."""
        return len(self.tau)

    def of(self, split: str) -> SplitRows:
        """One of the three by name."""
        assert split in SPLITS, split
        return getattr(self, split)


def num_features(evidence: Evidence, dictionary: str) -> int:
    """d_sae of `dictionary`. Raises EvidenceError where the evidence has no such dictionary."""
    table = evidence.read("dictionaries", columns=["dictionary", "d_sae"])
    known = dict(zip(table["dictionary"].to_pylist(), table["d_sae"].to_pylist(), strict=True))
    if dictionary not in known:
        raise EvidenceError(f"no dictionary {dictionary!r} in {evidence.folder}; it has: {', '.join(sorted(known))}")
    return known[dictionary]


def read_feature_rows(
    evidence: Evidence,
    dictionary: str,
    *,
    active_fraction: float,
    tagger: "Tagger | None" = None,
    tau: np.ndarray | None = None,
) -> FeatureRows:
    """The three splits of `dictionary`; tau comes from train alone. Weak activations of train are not kept.

    `tagger` is asked for parts of speech when a predicate is about them. `tau` [F] is that of another text, on which
    the question was settled.

    Raises EvidenceError where the evidence is missing or inconsistent.
    """
    features = num_features(evidence, dictionary)
    vocabulary = Vocabulary.from_table(evidence.read("vocabulary"))
    given, splits = tau, {}
    tau = np.zeros(features, np.float32) if given is None else given
    for split in SPLITS:
        table = evidence.read("windows", split=split)
        windows = RowTable.from_windows(vocabulary, table["token_ids"])
        windows.tagger = tagger
        lookup = _RowLookup(table["window_id"].to_numpy(), windows.tokens.shape[1])
        fires = _read_activations(evidence, dictionary, split, lookup, features)
        if split == "train" and given is None:
            np.maximum.at(tau, fires.features, fires.values)
            tau *= np.float32(active_fraction)
        documents = pad_lists(table["document_ids"]).ravel()
        splits[split] = _split_rows(split, windows, table["window_id"].to_numpy(), documents, fires, tau)
    return FeatureRows(dictionary, tau, **splits)


def _read_activations(
    evidence: Evidence, dictionary: str, split: str, row_of: "_RowLookup", features: int
) -> ActiveRows:
    """The activations of a split in file order."""
    condition = (pc.field("split") == split) & (pc.field("dictionary") == dictionary)
    columns = ["feature", "window_id", "position", "activation"]
    found, rows, values = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for file in evidence.files("activations"):
        part = pq.read_table(file, columns=columns, filters=condition)
        feature = part["feature"].to_numpy()
        if len(feature) and not 0 <= feature.min() <= feature.max() < features:
            raise EvidenceError(f"{file}: a feature is outside 0..{features - 1}")
        rows.append(row_of(part["window_id"].to_numpy(), part["position"].to_numpy()).astype(np.int32))
        found.append(feature.astype(np.int32))
        values.append(part["activation"].to_numpy())
    return ActiveRows(np.concatenate(found), np.concatenate(rows), np.concatenate(values), features)


class _RowLookup:
    """(window_id, position) -> row number of one split."""

    def __init__(self, window_ids: np.ndarray, context_tokens: int):
        self.order = np.argsort(window_ids, kind="stable")
        self.ids = window_ids[self.order]
        self.context_tokens = context_tokens

    def __call__(self, window_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Raises EvidenceError at a row that is in no window of the split."""
        if len(window_ids) == 0:
            return np.zeros(0, np.int64)
        starts = np.flatnonzero(np.append(True, window_ids[1:] != window_ids[:-1]))  # many rows of one window
        named = window_ids[starts]
        at = np.searchsorted(self.ids, named)
        if len(self.ids) == 0 or (self.ids[np.minimum(at, len(self.ids) - 1)] != named).any():
            raise EvidenceError("activations name a window that table `windows` does not have in their split")
        if positions.min() < 0 or positions.max() >= self.context_tokens:
            raise EvidenceError("activations name a position outside of their window")
        first_rows = self.order[at] * self.context_tokens
        return np.repeat(first_rows, np.diff(np.append(starts, len(window_ids)))) + positions


def _split_rows(
    split: str, windows: RowTable, window_ids: np.ndarray, document_ids: np.ndarray, fires: ActiveRows, tau: np.ndarray
) -> SplitRows:
    if split == "train":  # by far the largest split, and nothing asks for its weak activations
        fires = fires.where(fires.values > tau[fires.features])
    fires = fires.where(_order(fires))
    if ((np.diff(fires.features) == 0) & (np.diff(fires.rows) == 0)).any():
        raise EvidenceError("activations hold a feature twice on one row: were two runs written into one folder?")
    eligible = windows.valid.copy()
    eligible[:, :1] = False
    eligible = eligible.ravel()
    if len(fires.rows):
        fires = fires.where(eligible[fires.rows])
    strong = fires.values > tau[fires.features]
    documents = np.full(len(document_ids), -1, np.int32)
    names, documents[eligible] = np.unique(document_ids[eligible], return_inverse=True)
    return SplitRows(
        split, windows, window_ids, eligible, documents, len(names), fires.where(strong), fires.where(~strong)
    )


def _order(fires: ActiveRows) -> np.ndarray:
    """[A] the order by feature and row; files are in the order of rows, so that a stable sort by feature is enough."""
    if (fires.rows[1:] < fires.rows[:-1]).any():
        return np.lexsort((fires.rows, fires.features))
    small = np.uint16 if fires.num_features <= 2**16 else np.int32  # 16 bits are sorted by radix
    return np.argsort(fires.features.astype(small), kind="stable")


def read_token_ids(evidence: Evidence, split: SplitRows) -> np.ndarray:
    """[W, T] int32: the token ids of the windows of `split`, in its order, -1 behind the end of a short one."""
    table = evidence.read("windows", columns=["window_id", "split", "token_ids"], split=split.split)
    place = dict(zip(table["window_id"].to_pylist(), range(table.num_rows), strict=True))
    return pad_lists(table["token_ids"])[[place[w] for w in split.window_ids.tolist()]]


def sample_windows(token_ids: np.ndarray, num: int, num_tokens: int) -> np.ndarray:
    """Numbers of at most `num` of the windows [W, T] that have `num_tokens` tokens, evenly spread over all of them."""
    long_enough = np.flatnonzero(token_ids[:, :num_tokens].min(axis=1) >= 0) if token_ids.size else np.zeros(0, int)
    return long_enough[np.unique(np.linspace(0, len(long_enough) - 1, min(num, len(long_enough))).round().astype(int))]
