"""Labels that mean nothing, for probes to fail on: what they still get right was never about the property.

C10 control task    every unit (word type) gets one label for good, at random, as many cases of either label as in the
                    task; a probe that merely memorises does as well here (Hewitt and Liang 2019, arXiv 1909.03368)
C11 permuted twin   every unit takes the label of another unit that is about as frequent: how many units have the
                    property, how often, and which properties go together stays; what it says about them is gone
                    (arXiv 2508.13729). Beside it, labels tossed for each unit with the property's share of units.
"""

import numpy as np

from .tasks import NO, OUT, YES, Cases, Drawn, Task

#: Units of about one frequency that take each other's labels.
BLOCK_UNITS = 16


def control_labels(drawn: Drawn, seed: int) -> dict[str, np.ndarray]:
    """Split -> [n] bool: a label for every unit, at random, so that train has about the positives that it has.

    Units that train does not have get one too, by the toss of a coin with train's odds.
    """
    rng = np.random.default_rng(seed)
    units = np.unique(np.concatenate([drawn.of(s).units for s in ("train", "calibration", "test")]))
    train = np.searchsorted(units, drawn.train.units)
    counts = np.bincount(train, minlength=len(units))
    wanted, left = int(drawn.train.y.sum()), len(drawn.train)
    share = wanted / left
    label = rng.random(len(units)) < share
    for unit in rng.permutation(np.flatnonzero(counts)):
        label[unit] = rng.random() < wanted / left
        wanted, left = max(wanted - counts[unit] * label[unit], 0), left - counts[unit]
    return {s: label[np.searchsorted(units, drawn.of(s).units)] for s in ("train", "calibration", "test")}


def with_labels(cases: Cases, y: np.ndarray) -> Cases:
    """The same cases under other labels."""
    return Cases(cases.cases, y, cases.documents, cases.units)


def permuted_twin(task: Task, seed: int) -> Task:
    """The task with the labels of its units exchanged among units of about the same frequency.

    A unit whose cases differ in label hands on their shares. Documents exchange labels within their split.
    """
    rng = np.random.default_rng(seed)
    if task.level == "document":
        return task.relabelled("permuted twin", {s: rng.permutation(labels) for s, labels in task.labels.items()})
    units, asked, positive = _units(task)
    order = np.lexsort((rng.random(len(units)), -asked))
    source = np.empty(len(units), np.int64)
    for start in range(0, len(order), BLOCK_UNITS):
        block = order[start : start + BLOCK_UNITS]
        source[block] = rng.permutation(block)
    return _relabelled(task, "permuted twin", units, (positive / np.maximum(asked, 1))[source], rng)


def bernoulli_twin(task: Task, seed: int) -> Task:
    """The task with a label tossed for each unit, with the share of units that have the property for its odds."""
    rng = np.random.default_rng(seed)
    units, asked, positive = _units(task)
    share = float((positive / asked).mean())
    return _relabelled(task, "Bernoulli twin", units, (rng.random(len(units)) < share).astype(float), rng)


def _units(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units that the question is asked of, in how many cases [U], and in how many the answer is yes [U]."""
    found = [(task.units[s][labels != OUT], labels[labels != OUT] == YES) for s, labels in task.labels.items()]
    units, inverse = np.unique(np.concatenate([u for u, _ in found]), return_inverse=True)
    yes = np.concatenate([y for _, y in found])
    return units, np.bincount(inverse), np.bincount(inverse, weights=yes)


def _relabelled(task: Task, name: str, units: np.ndarray, odds: np.ndarray, rng: np.random.Generator) -> Task:
    labels = {}
    for split, old in task.labels.items():
        cases = np.flatnonzero(old != OUT)
        drawn = rng.random(len(cases)) < odds[np.searchsorted(units, task.units[split][cases])]
        labels[split] = np.full(len(old), OUT, np.int8)
        labels[split][cases] = np.where(drawn, YES, NO)
    return task.relabelled(name, labels)
