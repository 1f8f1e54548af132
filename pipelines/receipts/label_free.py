"""L1: what can be told of a feature without any label, by sentence embeddings of its near words.

Where texts of a feature are no more alike than chance, no label in words can be right for a reason that the embedder
sees; where they are, and no label was found, one is missing. A seeded sample of features is read, since every text has
to be embedded.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from ..embedder import Embedder
from .control import Labelled
from .embedding_scorers import ExampleScorer
from .intruder import CHANCE, embedder_pick, find_intruders
from .receipt import REPORTED, Receipt, judged
from .statistics import DocumentDraws, auroc, paired_interval

if TYPE_CHECKING:
    from ..run import Run

NUM_FEATURES = 100
#: Active rows, and as many negatives, of a feature; groups of five that intruders hide in.
NUM_ROWS, TRIALS = 20, 10
VIEW = "near"


class LabelFree:
    """Intruders and train examples as receipts, each feature's and their means."""

    code: ClassVar[str] = "L1"
    name: ClassVar[str] = "label-free scores"
    tier: ClassVar[str] = "full"

    def __init__(self, embedder: Embedder, *, draws: int = 400, seed: int = 0):
        self.embedder, self.draws, self.seed = embedder, draws, seed

    @classmethod
    def of(cls, run: "Run") -> Self:
        """With the run's embedder. Raises EmbedderError where there is none."""
        return cls(run.embedder, draws=run.config.label.num_bootstrap, seed=run.config.label.seed)

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Two receipts a sampled feature, against matched negatives (N1), and two over all of them."""
        known = [f for f, e in labelled.examples.items() if len(e.active) >= 4 and len(e.negatives.get("N1", ()))]
        rng = np.random.default_rng(self.seed)
        features = sorted(rng.permutation(known)[:NUM_FEATURES].tolist())
        active = [labelled.examples[f].active[:NUM_ROWS] for f in features]
        negative = [labelled.examples[f].negatives["N1"][:NUM_ROWS] for f in features]
        receipts = self._intruders(labelled, features, active, negative)
        return [*receipts, *self._examples(labelled, features, active, negative)]

    def _intruders(
        self, labelled: Labelled, features: Sequence[int], active: list[np.ndarray], negative: list[np.ndarray]
    ) -> list[Receipt]:
        control = f"{self.code} intruder {VIEW}"
        pick = embedder_pick(self.embedder)
        found = find_intruders(pick, active, negative, labelled.rows.test, view=VIEW, trials=TRIALS, seed=self.seed)
        receipts = [
            Receipt(
                control=control,
                feature=feature,
                value=r.accuracy,
                threshold=CHANCE,
                verdict=judged(r.low, CHANCE),
                n=r.n,
                low=r.low,
                high=r.high,
            )
            for feature, r in zip(features, found, strict=True)
        ]
        return [*receipts, self._mean(control, receipts, CHANCE)]

    def _examples(
        self, labelled: Labelled, features: Sequence[int], active: list[np.ndarray], negative: list[np.ndarray]
    ) -> list[Receipt]:
        control, test = f"{self.code} examples {VIEW}", labelled.rows.test
        scorer = ExampleScorer(self.embedder, VIEW, seed=self.seed).prepare(labelled.rows, features)
        both = [np.concatenate([a, b]) for a, b in zip(active, negative, strict=True)]
        draws = DocumentDraws(test.num_documents, draws=self.draws, seed=self.seed)
        receipts = []
        for feature, rows, scores, own in zip(features, both, scorer.score([], both, test), active, strict=True):
            (yes, no), (here, there) = np.split(scores, [len(own)]), np.split(test.documents[rows], [len(own)])
            low, high = draws.interval(yes, here, no, there)
            receipts.append(
                Receipt(
                    control=control,
                    feature=feature,
                    value=auroc(yes, no),
                    threshold=0.5,
                    verdict=judged(low, 0.5),
                    n=len(rows),
                    low=None if np.isnan(low) else low,
                    high=None if np.isnan(high) else high,
                )
            )
        return [*receipts, self._mean(control, receipts, 0.5)]

    def _mean(self, control: str, receipts: Sequence[Receipt], chance: float) -> Receipt:
        """Mean over features, with its interval over them."""
        values = np.array([r.value for r in receipts if r.value is not None])
        if len(values) == 0:
            reason = {"reason": "no feature has four active test rows and matched negatives"}
            return Receipt(control=f"{control} mean", value=None, verdict=REPORTED, detail=reason)
        low, high = paired_interval(values, np.zeros(len(values)), draws=self.draws, seed=self.seed)
        return Receipt(
            control=f"{control} mean",
            value=float(values.mean()),
            threshold=chance,
            verdict=REPORTED,
            n=len(values),
            low=low,
            high=high,
            detail={"features": "a seeded sample of those that can be scored", "chance": chance},
        )
