"""How the median score of a run's labels moves with the documents it was measured on.

Features share their test documents, so a bootstrap over features alone misses what a draw of documents does to all of
them. The executable labels of a run are counted by document once; each draw of documents then gives a median. Runs of
the same text are drawn the same documents, so that what both of them owe to a document cancels in their difference.
"""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ..label import labels_of
from ..predicate_scores import auroc_of_counts, count_by_document
from ..split_rows import SplitRows, read_feature_rows

if TYPE_CHECKING:
    from ..run import Run

_AT_ONCE = 256


def document_medians(run: "Run", *, draws: int, seed: int) -> np.ndarray:
    """[draws]: the median AUROC of the executable labels over drawn test documents, less that over all of them.

    Zeros where fewer than two documents or no such label are there. Raises EvidenceError where the evidence is missing.
    """
    table = run.evidence.read("labels").filter(pc.field("dictionary") == run.spec.name)
    rows = read_feature_rows(run.evidence, run.spec.name, active_fraction=run.config.label.active_fraction)
    predicates = {f: label.predicate for f, label in labels_of(table).items() if label.predicate is not None}
    test = rows.test
    active = test.active.counts
    features = [f for f in sorted(predicates) if 0 < active[f] < test.num_rows]
    if not features or test.num_documents < 2:
        return np.zeros(draws)
    return _deviations(test, [predicates[f] for f in features], features, draws, seed)


def _deviations(test: SplitRows, predicates: list, features: list[int], draws: int, seed: int) -> np.ndarray:
    size = test.num_documents
    times = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=draws).astype(np.float32)
    times = np.concatenate([np.ones((1, size), np.float32), times])  # the first one: all documents
    drawn = np.empty((draws + 1, len(features)), np.float32)
    for start in range(0, len(features), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        counts = count_by_document(test, predicates[part], features[part]).astype(np.float32)  # [n, D, 4]
        flat = counts.transpose(1, 0, 2).reshape(size, -1)
        drawn[:, part] = auroc_of_counts((times @ flat).reshape(draws + 1, len(counts), 4))
    medians = np.nanmedian(drawn, axis=1)  # a draw without an active row says nothing of a feature
    return medians[1:] - medians[0]
