"""C14b: do labels hold on another text than the one that they were made from and scored on?

The run's own dictionary on a second corpus (`saeql control RUN --kind second-corpus --corpus.source FILE`), all of it
held out. Executable labels are executed there; a feature is active above the same activation as on its own text. A
label that is right about one text alone is about that text (the interpretability illusion: arXiv 2104.07143).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow.compute as pc

from saeql.store.records import SPLITS

from ..control_runs import command, find_control, status
from ..label import labels_of
from ..part_of_speech import Tagger
from ..predicate_scores import auroc_of_counts, count_by_document, interval_of_counts
from ..predicates import Predicate
from ..split_rows import FeatureRows, read_feature_rows
from .activation_range import MIN_ACTIVE
from .control import Control
from .control_gaps import BesideControlRuns, Trained
from .control_scores import DRAWS
from .receipt import REPORTED, Receipt
from .statistics import PERCENTILES
from .thresholds import THRESHOLDS

if TYPE_CHECKING:
    from ..run import Run

KIND = "second-corpus"
_AT_ONCE = 256


class SecondCorpus(BesideControlRuns):
    """AUROC of executable labels over all rows of another text, beside that on the run's own test documents."""

    code: ClassVar[str] = "C14b"
    name: ClassVar[str] = "second corpus"
    tier: ClassVar[str] = "paper"

    def compare(self, trained: Trained) -> list[Receipt]:
        """Of every label that can be asked its AUROC there; of all the median loss, and the share that still beats
        chance.
        """
        title, run = f"{self.code} {self.name}", trained.run
        other = find_control(run, KIND)
        if other is None:
            return [_absent(title, f"{status(run, KIND)}: `{command(run, KIND)}` makes it")]
        copies = shared_documents(run, other)
        if copies:
            return [_absent(title, f"{copies} of its documents are documents of the run: name another text")]
        rows, labels = _own(trained)
        tagger = Tagger.of(run.config.label.part_of_speech)
        there = read_feature_rows(
            other.evidence,
            rows.dictionary,
            active_fraction=run.config.label.active_fraction,
            tagger=tagger,
            tau=rows.tau,
        )
        return _receipts(title, rows, there, labels, run)


def shared_documents(run: "Run", other: "Run") -> int:
    """Documents of `other` whose normalised text is that of a document of `run`."""
    mine, theirs = (r.evidence.read("documents", columns=["sha256"])["sha256"].to_pylist() for r in (run, other))
    return len(set(mine) & set(theirs))


def _own(trained: Trained) -> tuple[FeatureRows, dict[int, Predicate]]:
    """The run's rows and its executable labels: those in its evidence, or those that are just made."""
    labelled, run = trained.labelled, trained.run
    if labelled is not None:
        rows, labels = labelled.rows, labelled.labels
    else:
        config = run.config.label
        tagger = Tagger.of(config.part_of_speech)
        rows = read_feature_rows(run.evidence, run.spec.name, active_fraction=config.active_fraction, tagger=tagger)
        labels = labels_of(run.evidence.read("labels").filter(pc.field("dictionary") == run.spec.name))
    return rows, {f: label.predicate for f, label in sorted(labels.items()) if label.predicate is not None}


def _counts(rows: FeatureRows, splits: Sequence[str], labels: dict[int, Predicate]) -> np.ndarray:
    """[N, D, 4] of `count_by_document`, over the documents of all `splits`."""
    features, predicates = list(labels), list(labels.values())
    return np.concatenate([count_by_document(rows.of(split), predicates, features) for split in splits], axis=1)


def _receipts(
    title: str, rows: FeatureRows, there: FeatureRows, labels: dict[int, Predicate], run: "Run"
) -> list[Receipt]:
    own, found = _counts(rows, ("test",), labels), _counts(there, SPLITS, labels)
    active = [(c[:, :, 0] + c[:, :, 2]).sum(axis=1) for c in (own, found)]
    asked = np.flatnonzero((active[0] >= MIN_ACTIVE) & (active[1] >= MIN_ACTIVE))
    silent = int((active[1] == 0).sum())
    if not len(asked):
        return [_absent(title, f"no executable label whose feature is active on {MIN_ACTIVE} rows of both texts")]
    own, found, features = own[asked], found[asked], np.array(list(labels))[asked]
    low, high = interval_of_counts(found, run.config.label)
    totals, before = found.sum(axis=1), auroc_of_counts(own.sum(axis=1))
    after = auroc_of_counts(totals)
    receipts = [
        Receipt(
            control=f"{title} of the feature",
            feature=int(feature),
            value=float(after[i]),
            n=int(totals[i, 0] + totals[i, 2]),
            low=None if np.isnan(low[i]) else float(low[i]),
            high=None if np.isnan(high[i]) else float(high[i]),
            verdict=REPORTED,
            detail={
                "own_test_text": round(float(before[i]), 4),
                "recall": round(float(totals[i, 0] / (totals[i, 0] + totals[i, 2])), 4),
                "precision": round(float(totals[i, 0] / max(totals[i, 0] + totals[i, 1], 1)), 4),
            },
        )
        for i, feature in enumerate(features)
    ]
    loss = before - after
    drawn = _drawn(own) - _drawn(found)
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(loss), drawn.shape)
    bounds = np.percentile(np.nanmedian(np.take_along_axis(drawn, picked, axis=1), axis=1), PERCENTILES)
    detail = {
        "kind": KIND,
        "text": _size(there, found),
        "median": round(float(np.median(after)), 4),
        "median_on_own_test_text": round(float(np.median(before)), 4),
        "lose_more_than_0.15": round(float((loss > THRESHOLDS.top_only_drop).mean()), 4),
        "labels": len(labels),
        "silent_there": silent,
    }
    beats = float((low > THRESHOLDS.chance).mean())
    return [
        *receipts,
        Receipt(
            control=f"{title} loss",
            value=float(np.median(loss)),
            n=len(loss),
            low=float(bounds[0]),
            high=float(bounds[1]),
            verdict=REPORTED,
            detail=detail,
        ),
        Receipt(control=f"{title} share above chance", value=beats, n=len(loss), verdict=REPORTED),
    ]


def _drawn(counts: np.ndarray) -> np.ndarray:
    """[draws, N] AUROC over documents drawn with replacement."""
    num, size, _ = counts.shape
    times = np.random.default_rng(size).multinomial(size, np.full(size, 1 / size), size=DRAWS).astype(np.float32)
    out = np.empty((DRAWS, num), np.float32)
    for start in range(0, num, _AT_ONCE):
        part = counts[start : start + _AT_ONCE].astype(np.float32)
        flat = part.transpose(1, 0, 2).reshape(size, -1)
        out[:, start : start + _AT_ONCE] = auroc_of_counts((times @ flat).reshape(DRAWS, len(part), 4))
    return out


def _size(there: FeatureRows, counts: np.ndarray) -> dict[str, int]:
    """How much text that was."""
    return {"documents": int(counts.shape[1]), "rows": sum(there.of(split).num_rows for split in SPLITS)}


def _absent(title: str, why: str) -> Receipt:
    return Receipt(control=title, value=None, verdict=REPORTED, detail={"missing": why, "kind": KIND})


_: type[Control] = SecondCorpus
