"""The forward passes behind steering effects: every direction at its strengths on the same test windows.

Directions that belong to no concept are run once for all concepts. Where there are many features, a rival direction is
run at one strength, and once more where that cost far less or more than the budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saeql.sae.metrics import DocumentGroups

from ..output_effects import Effects, prefix_effects
from ..progress import progress
from ..split_rows import read_token_ids
from .concept_words import Concept
from .dose_response import KL_BUDGET, Curve, Documents
from .effect_results import SELF
from .effect_subjects import Ground, Subject
from .rival_directions import OWN_METHODS, RivalDirections

#: A KL outside of this does not reach the budget, or is too far beyond it to be read from.
_NEAR = (KL_BUDGET, 0.45)
_BATCH_WINDOWS = 8
#: Subject (None: of no concept), method, number within the method.
Key = tuple[int | None, str, int]


@dataclass(frozen=True)
class _Job:
    key: Key
    strength: float
    direction: torch.Tensor  # [d_out]


class EffectPasses:
    """Measured effects of S subjects' directions, of their rivals and of directions about nothing."""

    def __init__(self, ground: Ground, subjects: Sequence[Subject]):
        self.ground, self.subjects = ground, subjects
        config = ground.config
        #: sets of measured tokens, those of the subjects first
        self.sets = [c.measured for c in (*(s.concept for s in subjects), *self._more_concepts())]
        self.others = self._others()
        self.windows, documents = ground.windows("test", config.tokens)
        self.groups = DocumentGroups().of(documents)
        self.documents = Documents(self.groups, config.num_bootstrap, config.seed)
        self.n = len(self.windows) * (self.windows.shape[1] - 1)
        self.directions: dict[Key, torch.Tensor] = {}
        self._points: dict[Key, list[tuple[float, np.ndarray, np.ndarray, np.ndarray]]] = {}

    def _more_concepts(self) -> list[Concept]:
        """Concepts of further features where the subjects are too few to say what is specific."""
        missing = self.ground.config.other_concepts - len(self.subjects)
        if missing <= 0:
            return []
        taken = {s.feature for s in self.subjects}
        more = [c for f, c in self.ground.concepts.items() if f not in taken]
        chosen = np.random.default_rng(self.ground.config.seed).permutation(len(more))[:missing]
        return [more[int(i)] for i in chosen]

    def _others(self) -> np.ndarray:
        """[subjects, sets] bool: concepts that share no word with a subject's."""
        out = np.zeros((len(self.subjects), len(self.sets)), bool)
        for i, subject in enumerate(self.subjects):
            own = {*subject.concept.measured, *subject.concept.choosing}
            out[i] = [own.isdisjoint(s) for s in self.sets]
        return out

    def run(self) -> None:
        """All passes."""
        config, ground = self.ground.config, self.ground
        ids = read_token_ids(ground.run.evidence, ground.rows.calibration)
        made = RivalDirections(ground.run, ground.place, ground.rows, ids, config.seed)
        up = [s for s in config.strengths if s > 0]
        for method, rows in made.common(config.random_directions, config.other_directions).named().items():
            self.directions |= {(None, method, i): row for i, row in enumerate(rows)}
        jobs = [_Job(key, s, row) for key, row in self.directions.items() for s in up]
        rivals: dict[Key, torch.Tensor] = {}
        drawn = made.random_rows([s.concept for s in self.subjects])
        for i, subject in enumerate(self.subjects):
            self.directions[(i, SELF, 0)] = subject.direction
            jobs += [_Job((i, SELF, 0), s, subject.direction) for s in config.strengths if s != 0]
            own = made.of_concept(subject.concept, subject.feature)
            if (row := drawn[i]) is not None:
                own["random_row"] = row
            rivals |= {(i, method, 0): own[method] for method in OWN_METHODS if method in own}
        self.directions |= rivals
        is_few = len(self.subjects) <= config.full_curves
        first = up if is_few else [config.choosing_strength]
        self._measure("effects", [*jobs, *(_Job(key, s, row) for key, row in rivals.items() for s in first)])
        if not is_few:
            self._measure("nearer", self._nearer(rivals))

    def _nearer(self, rivals: dict[Key, torch.Tensor]) -> list[_Job]:
        """A second strength for rivals that the first left far from the budget, where their KL should be it."""
        jobs = []
        for key, row in rivals.items():
            strength, _, kl, _ = self._points[key][0]
            cost = max(float(kl.mean()), 1e-4)
            if not _NEAR[0] <= cost <= _NEAR[1]:
                factor = float(np.clip(1.05 * (KL_BUDGET / cost) ** 0.5, 0.3, 3))  # a little beyond, to read between
                jobs.append(_Job(key, strength * factor, row))
        return jobs

    def _measure(self, label: str, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        with progress(label, None, "passes") as advance:
            effects = self.ground.kept.effects(
                self.ground.place,
                torch.stack([job.direction for job in jobs]),
                self.windows,
                self.sets,
                strength=[job.strength for job in jobs],
                batch_windows=_BATCH_WINDOWS,
                on_progress=advance.to,
            )
        for i, job in enumerate(jobs):
            own = self._points.setdefault(job.key, [])
            own.append((job.strength, effects.shifts[i], effects.kl[i], effects.ce[i]))

    def of_prompt(self, prompt: Sequence[int]) -> Effects:
        """Effects [1, ...] of token ids before the test windows."""
        return prefix_effects(self.ground.place.lm, [prompt], self.windows, self.sets)

    def keys(self, method: str) -> list[Key]:
        """Of all directions of a method that is about no concept."""
        return [key for key in self._points if key[0] is None and key[1] == method]

    def curve(self, i: int, key: Key) -> Curve | None:
        """What a direction does to subject `i`'s concept; None where it was not measured."""
        if key not in self._points:
            return None
        strengths, shifts, kl, ce = (np.array(v) for v in zip(*self._points[key], strict=True))
        return Curve.of(strengths, shifts[:, i], self.other_shift(i, shifts), kl, ce)

    def other_shift(self, i: int, shifts: np.ndarray) -> np.ndarray:
        """[..., W] mean shift [..., S, W] of the concepts that subject `i` shares no word with; nan without any."""
        mine = self.others[i]
        return shifts[..., mine, :].mean(-2) if mine.any() else np.full(shifts[..., 0, :].shape, np.nan)
