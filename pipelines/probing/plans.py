"""What is drawn for a task before any vector is read: its cases, control labels, and the cases of its twins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from saeql.store.records import SPLITS

from .controls import bernoulli_twin, control_labels, permuted_twin
from .tasks import Drawn, Task, TaskError, draw
from .text import ProbedText

PERMUTED, TOSSED = "permuted", "tossed"


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How much is measured."""

    max_cases: int = 1000
    """Cases drawn of every split."""
    num_controls: int = 3
    """Control tasks, whose accuracies are averaged."""
    num_twins: int = 2
    """Permuted twins, and as many with tossed labels."""
    num_bootstrap: int = 1000
    """Draws of test documents behind every interval."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_cases < 40:
            raise TaskError(f"max_cases must be at least 40, got {self.max_cases}")


@dataclass(frozen=True)
class TaskPlan:
    """One task with everything that is drawn for it."""

    task: Task
    drawn: Drawn
    controls: list[dict[str, np.ndarray]]  # split -> [n] bool each
    twins: dict[str, list[tuple[Task, Drawn]]]  # a twin whose property falls on too few cases is not there

    def cases(self, split: str, *, twins: bool) -> np.ndarray:
        """All cases of a split that a probe will see, those of the twins included where `twins`."""
        parts = [self.drawn.of(split).cases]
        if twins:
            parts += [drawn.of(split).cases for made in self.twins.values() for _, drawn in made]
        return np.unique(np.concatenate(parts))


def plan_task(task: Task, settings: ProbeSettings) -> TaskPlan:
    """Draw a task. Raises TaskError where it has too few cases."""
    drawn = draw(task, max_cases=settings.max_cases, seed=settings.seed)
    controls = [control_labels(drawn, settings.seed + 1 + n) for n in range(settings.num_controls)]
    twins = {PERMUTED: _twins(task, permuted_twin, settings)}
    if task.level == "token":  # a toss for each document is what exchanging their labels already is
        twins[TOSSED] = _twins(task, bernoulli_twin, settings)
    return TaskPlan(task, drawn, controls, twins)


def _twins(task: Task, make: Callable[[Task, int], Task], settings: ProbeSettings) -> list[tuple[Task, Drawn]]:
    made = []
    for number in range(settings.num_twins):
        twin = make(task, settings.seed + number)
        try:
            made.append((twin, draw(twin, max_cases=settings.max_cases, seed=settings.seed)))
        except TaskError:
            continue
    return made


def rows_of(text: ProbedText, plans: Sequence[TaskPlan], *, twins: bool) -> dict[str, np.ndarray]:
    """Split -> all rows [n], sorted, that probes of the plans will see."""
    found = {}
    for split in SPLITS:
        cases = np.unique(np.concatenate([np.zeros(0, np.int64), *(p.cases(split, twins=twins) for p in plans)]))
        is_rows = not plans or plans[0].task.level == "token"
        found[split] = cases if is_rows else np.sort(text.splits[split].rows_of(cases)[0])
    return found
