"""C16: is what is known to be there found, and what is known to be nothing left alone?

Concepts are planted as features in the run's own text (`planting.py`) and go through the explainers, the choice and
the scores that real features go through. A concept counts as named where its label is executable and does what the
concept does, or is one of the bank's labels that mean it, written down beforehand (`planted_concepts.py`). Where a
concept's own token also stands without it, a label about the token alone does not count, and no scorer that reads the
word alone may claim to tell the two apart. Beside it a dictionary is trained on data whose directions are known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from ..explainers.base import Candidate, Explainer
from ..explainers.label_bank import LabelBank
from ..explainers.predicates import PredicateExplainer
from ..label import label_rows, labels_of
from ..label_config import LabelConfig
from .control import Labelled
from .embedding_scorers import EmbeddingScorer, WordScorer
from .examples import Examples
from .held_out import HeldOut
from .label_scorer import LabelScorer
from .planted_directions import KnownDirections, recovery, train_on
from .planting import Planted, plant
from .receipt import FAILED, REPORTED, Receipt, judged
from .sampler import SampleConfig
from .scorer import Scorer
from .statistics import auroc, auroc_interval, wilson
from .thresholds import THRESHOLDS

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class Outcome:
    """What labelling made of one planted concept."""

    concept: str
    label: str
    explainer: str
    named: bool
    exact: bool  # named by the very label that it has in the bank
    f1: float | None  # with the concept itself on test, of an executable label
    same_token_auroc: float | None  # of that label on rung N2
    n: int  # test rows of the concept


class PlantedSuite:
    """Control C16."""

    code: ClassVar[str] = "C16"
    name: ClassVar[str] = "planted features"
    tier: ClassVar[str] = "full"

    def __init__(self, bank: LabelBank, scorer: Scorer, config: LabelConfig, *, num_steps: int = 1000):
        """`scorer` scores labels in words; executable ones are executed."""
        self.config, self.num_steps = config, num_steps
        self.explainers: list[Explainer] = [PredicateExplainer(config), bank]
        self.words = WordScorer(bank.embedder)
        self.scorer = LabelScorer(lambda: scorer)

    @classmethod
    def of(cls, run: "Run") -> Self:
        """With the run's embedder, bank and thresholds. Raises EmbedderError or ConfigError where they are not had."""
        bank = LabelBank.of(run)
        return cls(bank, EmbeddingScorer(bank.embedder), run.config.label)

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Four receipts, about the whole run."""
        planted = plant(labelled.rows, seed=self.config.seed)
        return [*self.check_planted(planted), self.check_directions()]

    def check_planted(self, planted: Planted) -> list[Receipt]:
        """Receipts of concepts, RANDOM features and same-token contrasts."""
        if not planted.concepts:
            reason = {"reason": "no concept occurs often enough in this text"}
            return [Receipt(control="C16 planted concepts named", value=None, verdict=FAILED, detail=reason)]
        held_out = HeldOut(planted.rows, SampleConfig(num=self.config.num_examples, seed=self.config.seed))
        labels = labels_of(
            label_rows(planted.rows, self.config, explainers=self.explainers, scorer=self.scorer, held_out=held_out)
        )
        examples = held_out.sample("test", range(len(planted.concepts)))
        outcomes = self.outcomes(planted, labels, examples)
        return [
            _named(planted, outcomes),
            _random(planted, labels),
            self._contrasts(planted, examples),
        ]

    def outcomes(
        self, planted: Planted, labels: Mapping[int, Candidate], examples: Mapping[int, Examples]
    ) -> list[Outcome]:
        """What every planted concept was named."""
        out = []
        for feature, concept in enumerate(planted.concepts):
            truth, label = planted.truth["test"][feature], labels.get(feature)
            f1 = same_token = None
            named = label is not None and label.label in concept.accepted
            if label is not None and label.predicate is not None:
                holds = label.predicate.rows(planted.rows.test.windows).ravel() & planted.rows.test.eligible
                f1 = 2 * int(holds[truth].sum()) / max(int(holds.sum()) + len(truth), 1)
                same_token = self._same_token(planted, label, examples.get(feature))
                named = f1 >= THRESHOLDS.planted_f1
                if concept.same_token:
                    named &= same_token is not None and same_token >= THRESHOLDS.planted_same_token
            text, explainer = (label.label, label.explainer) if label else ("unexplained", "none")
            exact = text == concept.label
            out.append(Outcome(concept.name, text, explainer, bool(named), exact, f1, same_token, len(truth)))
        return out

    def _same_token(self, planted: Planted, label: Candidate, own: Examples | None) -> float | None:
        negatives = own.negatives.get("N2") if own else None
        if own is None or negatives is None:
            return None
        positive, negative = self.scorer.score([label] * 2, [own.active, negatives], planted.rows.test)
        return auroc(positive, negative)

    def _contrasts(self, planted: Planted, examples: Mapping[int, Examples]) -> Receipt:
        """No scorer that reads the word alone may tell apart rows of the same token."""
        documents, detail, silent = planted.rows.test.documents, {}, 0
        contrasts = [i for i, c in enumerate(planted.concepts) if c.same_token and "N2" in examples[i].negatives]
        for i in contrasts:
            own, concept = examples[i], planted.concepts[i]
            gold = Candidate(concept.label, "semantic", "planted")
            rows = [own.active, own.negatives["N2"]]
            positive, negative = self.words.score([gold] * 2, rows, planted.rows.test)
            value = auroc(positive, negative)
            low, high = auroc_interval(
                positive, documents[rows[0]], negative, documents[rows[1]], draws=self.config.num_bootstrap, seed=0
            )
            is_silent = abs(value - 0.5) <= THRESHOLDS.no_claim or low <= 0.5 <= high
            silent += is_silent
            detail[concept.name] = {"N2 AUROC": round(value, 3), "low": low, "high": high, "n": [len(r) for r in rows]}
        share = silent / len(contrasts) if contrasts else None
        return Receipt(
            control="C16 same-token contrasts not claimed by the word alone",
            value=share,
            threshold=1.0,
            verdict=judged(share, 1.0) if contrasts else REPORTED,
            n=len(contrasts),
            detail=detail or {"reason": "the text holds none of them often enough"},
        )

    def check_directions(self) -> Receipt:
        """Known directions found by a dictionary, and its variance explained beside it."""
        source = KnownDirections(seed=self.config.seed)
        found = recovery(train_on(source, num_steps=self.num_steps, seed=self.config.seed), source)
        detail: dict[str, Any] = {
            "mcc": round(found.mcc, 4),
            "mcc of a random dictionary": round(found.chance, 4),
            "f1": round(found.f1, 4),
            "variance explained": round(1 - found.fvu, 4),
        }
        low, high = wilson(np.asarray(found.recovered * found.n), np.asarray(found.n))
        return Receipt(
            control="C16 known directions recovered",
            value=found.recovered,
            verdict=REPORTED,
            n=found.n,
            low=float(low),
            high=float(high),
            detail=detail,
        )


def _named(planted: Planted, outcomes: Sequence[Outcome]) -> Receipt:
    share = sum(o.named for o in outcomes) / len(outcomes)
    detail: dict[str, Any] = {o.concept: {k: v for k, v in asdict(o).items() if k != "concept"} for o in outcomes}
    missing = {"too rare in this text": [c.name for c in planted.absent]} if planted.absent else {}
    low, high = wilson(np.asarray(share * len(outcomes)), np.asarray(len(outcomes)))
    return Receipt(
        control="C16 planted concepts named",
        value=share,
        threshold=THRESHOLDS.planted_named,
        verdict=judged(share, THRESHOLDS.planted_named) if len(outcomes) >= THRESHOLDS.planted_concepts else REPORTED,
        n=len(outcomes),
        low=float(low),
        high=float(high),
        detail=detail | missing,
    )


def _random(planted: Planted, labels: Mapping[int, Candidate]) -> Receipt:
    named = {str(f): labels[f].label for f in planted.random if f in labels}
    n = len(planted.random)
    share = 1 - len(named) / n
    low, high = wilson(np.asarray(n - len(named)), np.asarray(n))
    return Receipt(
        control="C16 random features unexplained",
        value=share,
        threshold=THRESHOLDS.random_unexplained,
        verdict=judged(share, THRESHOLDS.random_unexplained),
        n=n,
        low=float(low),
        high=float(high),
        detail=named,
    )
