"""All probes of one task, each beside what it must beat: control tasks, twins without the property, a random model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from saeql.store.records import SPLITS

from ..receipts.statistics import wilson
from .code_length import compression
from .plans import ProbeSettings, TaskPlan
from .probes import (
    BestColumns,
    DifferenceOfMeans,
    Linear,
    LogisticRegression,
    Majority,
    PrincipalComponents,
    Probe,
    TokenTable,
    choose,
)
from .representations import (
    ACTS,
    EMBEDDINGS,
    LATENTS,
    RANDOM_LATENTS,
    RANDOMISED,
    TOKENS,
    Representations,
)
from .scores import Interval, TestDocuments, interval
from .tasks import Drawn, Task

#: Numbers of latents and channels of the sparse probes.
SPARSE = (1, 5, 16)
DENSE, TABLE, MAJORITY = "logistic regression", "token table", "majority"


def named(k: int, what: str) -> str:
    """'1 latent', '5 latents'."""
    return f"{k} {what if k == 1 else what + 's'}"


#: Name of a probe -> (what it sees, how it learns), in the order of the table.
PROBES: dict[str, tuple[str, Probe]] = {
    DENSE: (ACTS, LogisticRegression()),
    "difference of means": (ACTS, DifferenceOfMeans()),
    "PCA": (ACTS, PrincipalComponents()),
    **{named(k, "latent"): (LATENTS, BestColumns(k)) for k in SPARSE},
    **{named(k, "channel"): (ACTS, BestColumns(k)) for k in SPARSE},
    **{named(k, "random latent"): (RANDOM_LATENTS, BestColumns(k)) for k in SPARSE},
    EMBEDDINGS: (EMBEDDINGS, LogisticRegression()),
    TABLE: (TOKENS, TokenTable()),
    MAJORITY: (TOKENS, Majority()),
    RANDOMISED: (RANDOMISED, LogisticRegression()),
}


@dataclass(frozen=True)
class ProbeResult:
    """One probe on one task; every score is on test cases, intervals over their documents."""

    probe: str
    auroc: Interval
    accuracy: Interval  # mean of both labels' shares
    control_accuracy: float  # mean over control tasks
    selectivity: Interval  # accuracy - control accuracy
    compression: float  # of the labels of train; 1: no shorter than one bit each
    control_compression: float
    setting: float
    columns: tuple[int, ...] = ()  # latents or channels that were picked on train
    against_dense: Interval | None = None  # AUROC - AUROC of logistic regression on the activations

    @property
    def is_struck(self) -> bool:
        """Whether the selectivity's interval includes zero, or lies below it, or is not known."""
        return not self.selectivity.low > 0


@dataclass(frozen=True)
class TaskResult:
    """All probes of a task, or why there are none."""

    task: str
    level: str
    hook_point: str
    unit: str
    planted: bool
    num_cases: dict[str, tuple[int, int]] = field(default_factory=dict)  # split -> positives, negatives
    num_documents: int = 0  # of the test cases
    probes: tuple[ProbeResult, ...] = ()
    #: name -> (AUROC of logistic regression on the twin, its gap to the task's own); None: could not be drawn
    twins: dict[str, tuple[float, Interval] | None] = field(default_factory=dict)
    not_measured: str = ""

    def of(self, probe: str) -> ProbeResult | None:
        """One probe by name; None where it was not run."""
        return next((result for result in self.probes if result.probe == probe), None)


def probe_task(plan: TaskPlan, shown: Representations, hook_point: str, settings: ProbeSettings) -> TaskResult:
    """Run every probe whose representation is at hand."""
    task, drawn = plan.task, plan.drawn
    documents = TestDocuments(
        np.unique(task.documents["test"][task.labels["test"] >= 0]), draws=settings.num_bootstrap, seed=settings.seed
    )
    found, aurocs = [], {}
    for name, (what, probe) in PROBES.items():
        if what in shown.of_rows:
            x = {split: shown.of(what, task, split, drawn.of(split)) for split in SPLITS}
            result, aurocs[name] = _probe(name, probe, x, drawn, plan.controls, documents, settings)
            found.append(result)
    dense = aurocs[DENSE]
    results = [replace(r, against_dense=interval(aurocs[r.probe] - dense)) if r.probe != DENSE else r for r in found]
    twins = {name: _twins(made, shown, documents, dense) for name, made in plan.twins.items()}
    shown.forget()
    return TaskResult(
        task.name,
        task.level,
        hook_point,
        task.unit,
        task.planted,
        {s: (int(drawn.of(s).y.sum()), int((~drawn.of(s).y).sum())) for s in SPLITS},
        len(np.unique(drawn.test.documents)),
        tuple(results),
        twins,
    )


def _probe(
    name: str,
    probe: Probe,
    x: dict[str, Any],
    drawn: Drawn,
    controls: Sequence[dict[str, np.ndarray]],
    documents: TestDocuments,
    settings: ProbeSettings,
) -> tuple[ProbeResult, np.ndarray]:
    """The probe's result, and its AUROC in every draw."""
    y, test = drawn.train.y, drawn.test
    setting, fitted = choose(probe, x["train"], y, x["calibration"], drawn.calibration.y)
    scores = fitted.log_odds(x["test"])
    auroc = documents.auroc(scores, test.y, test.documents)
    accuracy = documents.balanced_accuracy(scores, test.y, test.documents)
    of_controls = []
    for labels in controls:
        _, learned = choose(probe, x["train"], labels["train"], x["calibration"], labels["calibration"])
        guesses = learned.log_odds(x["test"])
        of_controls.append(documents.balanced_accuracy(guesses, labels["test"], test.documents))
    control = np.mean(of_controls, axis=0) if of_controls else np.full_like(accuracy, np.nan)
    columns = fitted.columns if isinstance(fitted, Linear) and fitted.columns is not None else ()
    result = ProbeResult(
        probe=name,
        auroc=_widened(interval(auroc), int(test.y.sum()), int((~test.y).sum())),
        accuracy=interval(accuracy),
        control_accuracy=float(control[0]),
        selectivity=interval(accuracy - control),
        compression=compression(probe, setting, x["train"], y, settings.seed),
        control_compression=compression(probe, setting, x["train"], controls[0]["train"], settings.seed)
        if controls
        else float("nan"),
        setting=setting,
        columns=tuple(int(c) for c in columns),
    )
    return result, auroc


def _widened(found: Interval, positives: int, negatives: int) -> Interval:
    """The interval of a probe that is right in all draws, widened to what a proportion over so few leaves open."""
    if not found.high - found.low < 1e-6 or 1e-6 < found.value < 1 - 1e-6:
        return found
    n = np.array([min(positives, negatives)])
    low, high = wilson(found.value * n, n)
    return Interval(found.value, min(found.low, float(low[0])), max(found.high, float(high[0])))


def _twins(
    twins: Sequence[tuple[Task, Drawn]], shown: Representations, documents: TestDocuments, own: np.ndarray
) -> tuple[float, Interval] | None:
    """Mean AUROC of logistic regression on twins of a task, and by how much the task's own is above it."""
    found, probe = [], LogisticRegression()
    for twin, drawn in twins:
        x = {split: shown.of(ACTS, twin, split, drawn.of(split)) for split in SPLITS}
        _, fitted = choose(probe, x["train"], drawn.train.y, x["calibration"], drawn.calibration.y)
        found.append(documents.auroc(fitted.log_odds(x["test"]), drawn.test.y, drawn.test.documents))
    if not found:
        return None
    mean = np.mean(found, axis=0)
    return float(mean[0]), interval(own - mean)
