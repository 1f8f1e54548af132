"""C0: nothing that a label is scored on was seen when it was made. Where that does not hold the run ends."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from saeql.store.evidence import Evidence
from saeql.store.records import SPLITS

from ..split_rows import FeatureRows
from ..token_classes import pad_lists
from .control import Labelled, ReceiptError
from .examples import Examples
from .receipt import PASSED, Receipt, judged
from .thresholds import THRESHOLDS

if TYPE_CHECKING:
    from ..run import Run


class SplitHygiene:
    """Documents of one split only, windows that nearly repeat train left out, examples of the test split alone."""

    code: ClassVar[str] = "C0"
    name: ClassVar[str] = "split hygiene"
    tier: ClassVar[str] = "fast"

    @classmethod
    def of(cls, run: "Run") -> Self:
        """Needs nothing but the evidence."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Raises ReceiptError at a document in two splits, or at an example that is not of the test split."""
        num_documents = check_documents(labelled.run.evidence)
        rows, left_out = labelled.rows, labelled.source.left_out
        checked = check_examples(rows, labelled.examples, left_out["test"])
        shares = {split: float(mask.mean()) if len(mask) else 0.0 for split, mask in left_out.items()}
        num = sum(len(mask) for mask in left_out.values())
        share = sum(int(mask.sum()) for mask in left_out.values()) / max(num, 1)
        most = THRESHOLDS.max_near_copies
        named = f"{self.code} {self.name}"
        return [
            Receipt(control=named, value=0, threshold=0, n=num_documents, verdict=PASSED),
            Receipt(
                control=f"{named} near copies",
                value=share,
                threshold=most,
                n=num,
                verdict=judged(share, most, at_least=False),
                detail={"left_out": shares, "measure": "8-gram Jaccard of at least 1/2 with a window of train"},
            ),
            Receipt(control=f"{named} examples", value=0, threshold=0, n=checked, verdict=PASSED),
        ]


def check_documents(evidence: Evidence) -> int:
    """Number of documents. Raises ReceiptError where one, by its id or its text, is in two splits."""
    documents = evidence.read("documents", columns=["document_id", "split", "title", "sha256"]).to_pylist()
    split_of: dict[str, str] = {}
    for row in documents:
        for key in (f"document {row['document_id']}", f"text {row['sha256']}" if row["sha256"] else None):
            if key is not None and split_of.setdefault(key, row["split"]) != row["split"]:
                raise ReceiptError(
                    f"C0 split hygiene: document {row['document_id']} ({row['title']!r}) is in the splits "
                    f"{split_of[key]} and {row['split']}: labels made on one would be scored on what they saw; "
                    "harvest again without it"
                )
    owners = {}
    for split in SPLITS:
        ids = pad_lists(evidence.read("windows", columns=["document_ids"], split=split)["document_ids"])
        for other, seen in owners.items():
            shared = np.intersect1d(seen, ids[ids >= 0])
            if len(shared):
                raise ReceiptError(
                    f"C0 split hygiene: windows of {other} and of {split} hold document {int(shared[0])}: "
                    "labels made on one would be scored on what they saw; harvest again"
                )
        owners[split] = np.unique(ids[ids >= 0])
    return len(documents)


def check_examples(rows: FeatureRows, examples: Mapping[int, Examples], left_out: np.ndarray) -> int:
    """Rows that were checked: active where they should be, inactive where they should be, of the test split.

    Raises ReceiptError naming the first feature whose examples are something else.
    """
    test = rows.test
    size, width = test.windows.tokens.size, test.windows.tokens.shape[1]
    allowed = test.eligible & ~np.repeat(left_out, width)
    strong = _Values(test.active.features, test.active.rows, test.active.values, size)
    weak = _Values(test.weak.features, test.weak.rows, test.weak.values, size)
    checked = 0
    for e in examples.values():
        named = f"C0 split hygiene: examples of feature {e.feature}"
        if e.split != "test":
            raise ReceiptError(f"{named} are of split {e.split!r}, not of test: labels were made or chosen on it")
        every = np.concatenate([e.active, *e.negatives.values()])
        if len(every) and not (every.min() >= 0 and every.max() < size and allowed[every].all()):
            raise ReceiptError(f"{named} hold a row that is not of the test split, or that nearly repeats train")
        if not np.array_equal(strong.at(e.feature, e.active), np.asarray(e.values, np.float32)):
            raise ReceiptError(f"{named} hold rows as active that the test split does not have so: taken from train?")
        for rung, own in e.negatives.items():
            fires = strong.at(e.feature, own) > 0
            if rung in ("N2", "N3", "N4"):
                fires |= weak.at(e.feature, own) > 0
            if fires.any():
                raise ReceiptError(f"{named}: a negative of rung {rung} is a row on which the feature fires")
        checked += len(every)
    return checked


class _Values:
    """Activations by feature and row, 0 where there is none."""

    def __init__(self, features: np.ndarray, rows: np.ndarray, values: np.ndarray, size: int):
        self._keys, self._values, self._size = features.astype(np.int64) * size + rows, values, size

    def at(self, feature: int, rows: np.ndarray) -> np.ndarray:
        """[n] float32."""
        if len(self._keys) == 0:
            return np.zeros(len(rows), np.float32)
        keys = feature * self._size + rows.astype(np.int64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._values[at], 0).astype(np.float32)
