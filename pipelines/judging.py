"""Labels of a run beside what explainers propose, scored on test rows by any scorers; and what that would cost.

Nothing of the run changes: this is for looking at a judge, and at labels, before `saeql label` uses them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from .explainers.base import Candidate
from .explainers.language_model import LanguageModelExplainer
from .explainers.registry import explainers as explainer_classes
from .label import labels_of
from .language_models.choose import judge_of
from .language_models.config import JudgeError
from .language_models.questions import Capabilities, Question
from .part_of_speech import Tagger
from .progress import OnProgress
from .receipts.examples import Examples
from .receipts.held_out import HeldOut
from .receipts.judge_scorers import JudgeScorer, Simulation, simulated_correlation
from .receipts.registry import scorers as scorer_classes
from .receipts.statistics import auroc, auroc_interval
from .receipts.surprisal import Surprisal
from .run import Run
from .split_rows import FeatureRows, read_feature_rows

#: Negatives that labels are scored against: matched on token frequency, position and window length.
RUNG = "N1"
#: Stands for labels that are not worded yet when their cost is estimated.
_SOME_LABEL = Candidate("a description of about so many words", "semantic", "unknown")


@dataclass(frozen=True)
class Score:
    """One scorer's verdict on one label. Answers that failed count as wrong in `auroc`."""

    auroc: float
    low: float
    high: float
    n_active: int
    n_inactive: int
    failed: int
    correlation: float | None = None
    """Simulation only: Pearson correlation with the true activations."""


@dataclass(frozen=True)
class JudgedLabel:
    """A label of a feature with its scores by scorer."""

    feature: int
    candidate: Candidate
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """What would be asked of the judge."""

    judge: str
    capabilities: Capabilities
    questions: int
    known: int
    prompt_tokens: int
    completion_tokens: int
    counted: str
    price: float | None
    cap: int | None

    @property
    def passes_cap(self) -> bool:
        """Whether it may take more than the cap allows."""
        return self.cap is not None and self.prompt_tokens + self.completion_tokens > self.cap


class Judging:
    """Some features of a run, their labels, and scorers and explainers by name.

    Raises JudgeError at a name or a feature that there is not, where a language model is needed and there is none, or
    where no feature has a label.
    """

    def __init__(
        self,
        run: Run,
        *,
        scorers: Sequence[str],
        explainers: Sequence[str] = (),
        features: Sequence[int] = (),
        sample: int = 20,
    ):
        self.run = run
        self.scorers = [cls.of(run) for cls in _classes(scorer_classes, scorers)]
        self.explainers = [cls.of(run) for cls in _classes(explainer_classes, explainers)]
        self._wanted, self._sample = list(dict.fromkeys(features)), sample

    @cached_property
    def rows(self) -> FeatureRows:
        """Rows of the run's dictionary."""
        config = self.run.config.label
        tagger, name = Tagger.of(config.part_of_speech), self.run.spec.name
        return read_feature_rows(self.run.evidence, name, active_fraction=config.active_fraction, tagger=tagger)

    @cached_property
    def labels(self) -> dict[int, Candidate]:
        """The labels that the run has, of all features."""
        table = self.run.evidence.read("labels")
        own = [name == self.run.spec.name for name in table["dictionary"].to_pylist()]
        return labels_of(table.filter(own))

    @cached_property
    def features(self) -> list[int]:
        """Those asked for; or a sample of those that have a label and test examples, the same every time."""
        outside = [f for f in self._wanted if not 0 <= f < self.rows.num_features]
        if outside:
            raise JudgeError(f"no feature {outside[0]}: the dictionary has 0 to {self.rows.num_features - 1}")
        if self._wanted:
            return self._wanted
        counts = self.rows.test.active.counts
        known = [f for f in sorted(self.labels) if counts[f] >= self.run.config.label.min_active_rows]
        if not known:
            raise JudgeError(f"{self.run.path} has no label to judge: name features with --features")
        chosen = np.random.default_rng(self.run.config.seed).permutation(known)[: self._sample]
        return sorted(int(f) for f in chosen)

    @cached_property
    def examples(self) -> dict[int, Examples]:
        """Test examples of the features that have active rows and negatives there."""
        held_out = HeldOut.of_evidence(self.rows, self.run.evidence, self.run.config.label)
        found = held_out.sample("test", self.features)
        return {f: e for f, e in found.items() if len(e.active) and len(e.negatives.get(RUNG, ()))}

    def estimate(self) -> Estimate:
        """Count what would be asked. Only the judge's capabilities are asked for, by two short questions."""
        judge = judge_of(self.run)
        asked = self._questions()
        known = judge.known(asked)
        new = [question for question, answer in zip(asked, known, strict=True) if answer is None]
        config = self.run.config.judge
        sent = sum(judge.count_tokens(question) for question in new)
        received = sum(question.max_tokens + config.thinking_tokens for question in new)
        prices = config.price_per_million_in, config.price_per_million_out
        price = None
        if prices[0] is not None and prices[1] is not None:
            price = (sent * prices[0] + received * prices[1]) / 1e6
        return Estimate(
            f"{judge.name} at {config.base_url}" if config.base_url else f"{judge.name} on this machine",
            judge.capabilities,
            len(asked),
            len(asked) - len(new),
            sent,
            received,
            "the model's tokenizer" if judge.counts_exactly else "a token for 4 bytes",
            price,
            config.max_total_tokens if config.base_url else None,
        )

    def _questions(self) -> list[Question]:
        asked: list[Question] = []
        worded = [e for e in self.explainers if isinstance(e, LanguageModelExplainer)]
        for explainer in worded:
            asked += explainer.questions(self.rows.train, self.features).values()
        for scorer in self.scorers:
            if isinstance(scorer, JudgeScorer):
                for feature, examples in self.examples.items():
                    labels = [self.labels[feature]] if feature in self.labels else []
                    for label in [*labels, *[_SOME_LABEL] * len(self.explainers)]:
                        asked += scorer.questions(label.label, _rows(examples), self.rows.test)
        return asked

    def judge(self, on_progress: OnProgress) -> list[JudgedLabel]:
        """Every label and proposal of the features with its scores; those without test examples have none.

        Raises JudgeError where the judge has to stop; answers so far are kept for the next time.
        """
        labels: list[tuple[int, Candidate]] = [(f, self.labels[f]) for f in self.features if f in self.labels]
        for explainer in self.explainers:
            proposed: Mapping[int, Sequence[Candidate]] = explainer.propose(self.rows, self.features, on_progress)
            labels += [(feature, candidate) for feature, own in proposed.items() for candidate in own[:1]]
        labels.sort(key=lambda item: item[0])
        judged = [JudgedLabel(feature, candidate) for feature, candidate in labels]
        scored = [item for item in judged if item.feature in self.examples]
        for scorer in self.scorers:
            if isinstance(scorer, JudgeScorer | Surprisal):
                scorer.on_progress = on_progress
            texts = [_in_words(item.candidate) if scorer.name != "predicates" else item.candidate for item in scored]
            found = scorer.score(texts, [_rows(self.examples[item.feature]) for item in scored], self.rows.test)
            for item, numbers in zip(scored, found, strict=True):
                item.scores[scorer.name] = self._score(self.examples[item.feature], numbers, scorer)
        return judged

    def _score(self, examples: Examples, numbers: np.ndarray, scorer: Any) -> Score:
        negatives = examples.negatives[RUNG]
        positive, negative = np.split(np.asarray(numbers, np.float64), [len(examples.active)])
        documents, config = self.rows.test.documents, self.run.config.label
        low, high = auroc_interval(
            positive,
            documents[examples.active],
            negative,
            documents[negatives],
            draws=config.num_bootstrap,
            seed=config.seed,
        )
        correlation = None
        if isinstance(scorer, Simulation):
            true = np.concatenate([examples.values, np.zeros(len(negatives))])
            correlation = simulated_correlation(numbers, true)
        failed = int(np.isnan(numbers).sum())
        return Score(
            auroc(positive, negative), float(low), float(high), len(positive), len(negative), failed, correlation
        )


def _classes(find: Callable[[Sequence[str]], list[Any]], names: Sequence[str]) -> list[Any]:
    try:
        return find(names)
    except ValueError as error:
        raise JudgeError(str(error)) from None


def _rows(examples: Examples) -> np.ndarray:
    return np.concatenate([examples.active, examples.negatives[RUNG]])


def _in_words(candidate: Candidate) -> Candidate:
    return replace(candidate, predicate=None)
