"""What a run has over its control run beside labels: single latents that know a property, features that steer.

Both are read from what `saeql probe` and `saeql effect` kept in the two runs; nothing is measured here.
"""

import numpy as np

from ..probing.probe_receipts import single_latents
from ..steering.effect_evidence import ChosenEffects, chosen_effects
from ..steering.effect_summary import MIN_Z
from .control_gaps import ControlPair
from .control_scores import DRAWS, Gap
from .receipt import Receipt
from .statistics import PERCENTILES


def one_latent_gap(pair: ControlPair, name: str, *, asked: bool = True) -> Receipt:
    """Mean difference of the AUROC of the best latent, over the tasks probed in both runs; tasks are drawn again."""
    assert pair.control is not None
    run = pair.trained.run
    mine, other = single_latents(run), single_latents(pair.control)
    if not mine or not other:
        return pair.absent(name, f"`saeql probe {(pair.control if mine else run).path}` first", asked=False)
    tasks = sorted(mine.keys() & other.keys())
    if len(tasks) < 2:
        return pair.absent(name, f"{len(tasks)} tasks were probed in both runs: probe both with the same", asked=False)
    differences = np.array([mine[task] - other[task] for task in tasks])
    drawn = np.random.default_rng(0).integers(0, len(tasks), (DRAWS, len(tasks)))
    low, high = (float(v) for v in np.percentile(differences[drawn].mean(1), PERCENTILES))
    detail = {
        "kind": pair.kind,
        "tasks": {task.task: [round(mine[task], 4), round(other[task], 4)] for task in tasks},
        "median": float(np.median([mine[task] for task in tasks])),
        "median_control": float(np.median([other[task] for task in tasks])),
        "better": int((differences > 0).sum()),
    }
    return pair.receipt(name, Gap(float(differences.mean()), low, high, len(tasks), 0), detail, asked=asked)


def steering_gap(pair: ControlPair, name: str, *, asked: bool = True) -> list[Receipt]:
    """Differences of medians over the features that steer best in each: own shift at the fixed cost, and, reported
    only, its ratio to that of the difference of means. Features are drawn again, test documents are not.
    """
    assert pair.control is not None
    run = pair.trained.run
    mine, other = chosen_effects(run), chosen_effects(pair.control)
    if mine is None or other is None:
        return [
            pair.absent(name, f"`saeql effect {(pair.control if mine else run).path} --top 100` first", asked=False)
        ]
    if mine.conditions != other.conditions:
        which = next(key for key in mine.conditions if mine.conditions[key] != other.conditions.get(key))
        why = f"{which} is {mine.conditions[which]} and {other.conditions.get(which)}: measure both alike"
        return [pair.absent(name, why, asked=False)]
    shares = {"share_z": float((mine.z > MIN_Z).mean()), "share_z_control": float((other.z > MIN_Z).mean())}
    receipts = [pair.gap(name, mine.own_shift, other.own_shift, asked=asked, by_documents=False, more=shares)]
    ratios = _ratios(mine), _ratios(other)
    if all(map(len, ratios)):
        receipts.append(pair.gap(f"{name} beside difference of means", *ratios, asked=False, by_documents=False))
    return receipts


def _ratios(effects: ChosenEffects) -> np.ndarray:
    """[n] own shift over that of the difference of means, where the latter raises the concept at all."""
    can = effects.diff_mean > 0
    return effects.own_shift[can] / effects.diff_mean[can]
