"""What a measurement of steering effects gives back."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from saeql.sae.metrics import Estimate

from .dose_response import Point, ReadOut, Trend
from .effect_config import EffectConfig
from .effect_subjects import Subject
from .rival_directions import OWN_METHODS
from .sampled_texts import TextScores

#: The direction asked about, and a prompt instead of one.
SELF, PROMPT = "steered", "prompt"
#: Methods that compete; groups of random directions say what directions do that are about nothing.
COMPETITORS = (SELF, *OWN_METHODS, "pca", PROMPT)
GROUPS = ("random", "random_covariance", "other_features")


@dataclass(frozen=True)
class MethodEffect:
    """One direction, or a prompt, on one concept."""

    read: ReadOut
    points: tuple[Point, ...] = ()
    """None of a prompt, which has no strength."""
    texts: TextScores | None = None


@dataclass(frozen=True)
class GroupEffect:
    """Many directions on one concept, at strengths [A] above 0: means and standard deviations of their shifts."""

    strengths: np.ndarray
    mean: np.ndarray  # [A]
    spread: np.ndarray  # [A]
    kl: np.ndarray  # [A]
    at_budget: float | None  # mean shift of those that reach the budget
    n: int


@dataclass(frozen=True)
class SubjectEffect:
    """Everything about one subject."""

    subject: Subject
    methods: Mapping[str, MethodEffect]
    groups: Mapping[str, GroupEffect]
    trend: Trend
    winner: str
    """The method with the largest own shift within the budget."""
    lead: Estimate
    """Own shift at the budget less that of the best other method within it."""
    plain_hit_rate: float | None
    """Share of texts of the model as it is that have a measured word."""

    @property
    def own(self) -> ReadOut:
        """The subject itself at the budget."""
        return self.methods[SELF].read


@dataclass(frozen=True)
class EffectStudy:
    """What a question about effects found."""

    model: str
    dictionary: str
    hook_points: tuple[str, ...]
    config: EffectConfig
    subjects: tuple[SubjectEffect, ...]
    n: int
    """Test positions measured."""
    num_documents: int
    num_others: int
    """Other concepts that specificity is about, at most."""
    is_chosen: bool
    """Whether features were chosen by output score."""
    has_own_words: bool
    """Whether every concept is the feature's own, not one of given words."""
    plain_texts: TextScores | None
    left_out: tuple[int, ...]
    """Features asked about that have no concept."""
