"""How the scores of a run's labels move together with the documents they were measured on.

Features share their test documents, so a bootstrap over features alone misses what a draw of documents does to all of
them. The executable labels of a run are counted by document once; each draw of documents then gives a median and a
mean. Runs of the same text are drawn the same documents, so that what both owe to a document cancels in their
difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ..explainers.base import Candidate
from ..label import labels_of
from ..part_of_speech import Tagger
from ..predicate_scores import auroc_of_counts, count_by_document
from ..predicates import Predicate
from ..split_rows import FeatureRows, SplitRows, read_feature_rows

if TYPE_CHECKING:
    from ..run import Run

_AT_ONCE = 256


@dataclass(frozen=True)
class DocumentMoves:
    """By how much a statistic of AUROC over test documents drawn differs from that over all of them; [draws] each."""

    median: np.ndarray  # of the labels
    mean: np.ndarray  # of all alive features, 0.5 where there is no label


def document_moves(rows: FeatureRows, labels: Mapping[int, Candidate], *, draws: int, seed: int) -> DocumentMoves:
    """Of the executable ones of `labels`; zeros where there are fewer than two documents, or no such label."""
    test = rows.test
    active, predicates = test.active.counts, {f: label.predicate for f, label in labels.items() if label.predicate}
    features = [f for f in sorted(predicates) if 0 < active[f] < test.num_rows]
    if not features or test.num_documents < 2:
        return DocumentMoves(np.zeros(draws), np.zeros(draws))
    drawn = _drawn(test, [predicates[f] for f in features], features, draws, seed)
    # a draw without an active row says nothing of a feature
    medians, means = np.nanmedian(drawn, axis=1), np.nanmean(drawn, axis=1) * len(features) / (active > 0).sum()
    return DocumentMoves(medians[1:] - medians[0], means[1:] - means[0])


def document_moves_of(run: "Run", *, draws: int, seed: int) -> DocumentMoves:
    """The same of a run's evidence. Raises EvidenceError where it is missing."""
    table = run.evidence.read("labels").filter(pc.field("dictionary") == run.spec.name)
    config = run.config.label
    tagger = Tagger.of(config.part_of_speech)
    rows = read_feature_rows(run.evidence, run.spec.name, active_fraction=config.active_fraction, tagger=tagger)
    return document_moves(rows, labels_of(table), draws=draws, seed=seed)


def _drawn(
    test: SplitRows, predicates: Sequence[Predicate], features: Sequence[int], draws: int, seed: int
) -> np.ndarray:
    """[1 + draws, n] AUROC of the labels: over all documents, then over drawn ones."""
    size = test.num_documents
    times = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=draws).astype(np.float32)
    times = np.concatenate([np.ones((1, size), np.float32), times])
    drawn = np.empty((draws + 1, len(features)), np.float32)
    for start in range(0, len(features), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        counts = count_by_document(test, predicates[part], features[part]).astype(np.float32)  # [n, D, 4]
        flat = counts.transpose(1, 0, 2).reshape(size, -1)
        drawn[:, part] = auroc_of_counts((times @ flat).reshape(draws + 1, len(counts), 4))
    return drawn
