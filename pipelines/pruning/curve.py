"""Pruning by several methods to the same sparsities, each measured: the curve that says what a method is worth."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import write_whole
from ..probing.planted_tasks import chosen_concepts, planted_names
from ..probing.tasks import TaskError
from .importance import (
    METHODS,
    Scores,
    activation_scores,
    feature_scores,
    loss_scores,
    magnitude_scores,
    random_scores,
)
from .measure import Bench, fit_probe
from .text import SplitWindows
from .units import KINDS, Masks, PruneError, Units, find_units, num_weights, taken_out

if TYPE_CHECKING:
    from ..run import Run

ACROSS = ("layer", "model")
CURVE_FILE, PLOT_FILE = "pruning.json", "pruning.png"


@dataclass(frozen=True)
class PruneOptions:
    """What is pruned, how far, and how it is measured."""

    features: tuple[int, ...]
    what: str = "both"
    shares: tuple[float, ...] = (0.1, 0.2, 0.4)
    methods: tuple[str, ...] = METHODS
    across: str = "layer"
    """layer: the same share of every layer; model: the least of all layers together."""
    random_seeds: int = 3
    calibration_windows: int = 64
    loss_windows: int = 32
    feature_windows: int = 48
    task: str = "conjunction-that"
    """Empty: no probe."""
    task_level: str = "document"
    seed: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units."""
        return KINDS if self.what == "both" else (self.what,)

    def check(self) -> None:
        """Raises PruneError naming the option that does not hold, TaskError for a task that there is not."""
        unknown = next((m for m in self.methods if m not in METHODS), None)
        if unknown is not None or not self.methods:
            raise PruneError(f"no method {unknown!r}: there is {', '.join(METHODS)}")
        if self.across not in ACROSS:
            raise PruneError(f"pruned are shares of every layer or of the model, not of {self.across!r}")
        wrong = next((share for share in self.shares if not 0 < share < 1), None)
        if wrong is not None or not self.shares:
            raise PruneError(f"a share is between 0 and 1, not {wrong}")
        if self.what not in (*KINDS, "both"):
            raise PruneError(f"no kind of unit {self.what!r}: there is {', '.join(KINDS)} and both")
        sizes = ("random_seeds", "calibration_windows", "loss_windows", "feature_windows")
        small = next((name for name in sizes if getattr(self, name) < 1), None)
        if small or not self.features:
            raise PruneError(f"{small} must be at least 1" if small else "name features whose needs are kept")
        if self.task and not Path(self.task).expanduser().is_file() and len(chosen_concepts(self.task)) > 1:
            raise TaskError(f"--task {self.task} is several tasks: name one of {', '.join(planted_names())}")


@dataclass(frozen=True)
class Curve:
    """What pruning cost: a row for every method, seed and share, and what they were measured on."""

    options: PruneOptions
    about: Mapping[str, Any]
    before: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write pruning.json and pruning.png."""
        from .report import plot

        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CURVE_FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str) + "\n")
        write_whole(folder / PLOT_FILE, plot(self))


def masks_of(units: Sequence[Units], scores: Scores, share: float, across: str) -> dict[int, np.ndarray]:
    """Which units go: the `share` of every layer, or of all layers, that is worth least; of each kind its own share."""
    masks = {}
    for kind in dict.fromkeys(own.kind for own in units):
        numbers = [n for n, own in enumerate(units) if own.kind == kind]
        if across == "layer":
            for n in numbers:
                masks[n] = _least(scores[n], share)
        else:
            least = _least(np.concatenate([scores[n] for n in numbers]), share)
            ends = np.cumsum([units[n].num for n in numbers])
            masks |= dict(zip(numbers, np.split(least, ends[:-1]), strict=True))
    return masks


def _least(scores: np.ndarray, share: float) -> np.ndarray:
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(scores, kind="stable")[: round(share * len(scores))]] = True
    return mask


class Pruner:
    """The units of a run's model, their worth by every method, and a bench to measure on."""

    def __init__(self, run: "Run", options: PruneOptions, advance: Callable[[int], object] = lambda _: None):
        """Raises PruneError for a model or options that do not do, ModelMismatch where run and model do not fit."""
        options.check()
        self.run, self.options = run, options
        self.lm, self.dictionary = run.language_model, run.dictionary().to(run.language_model.device)
        run.harvest_info.identity.require(self.lm.identity)
        self.lm.require_whole("pruning")
        outside = next((f for f in options.features if not 0 <= f < self.dictionary.d_sae), None)
        if outside is not None:
            raise PruneError(f"no feature {outside}: this dictionary has features 0 to {self.dictionary.d_sae - 1}")
        every = find_units(self.lm.model, options.kinds)
        calibration = SplitWindows(run.evidence, run.spec.name, "calibration")
        self.calibration = calibration.active(options.features, options.calibration_windows)[0]
        scores, reached = feature_scores(
            self.lm, self.dictionary, run.spec.reads, options.features, every, self.calibration,
            seed=options.seed, advance=advance,
        )  # fmt: skip
        self.units = [own for own, is_reached in zip(every, reached, strict=True) if is_reached]
        if not self.units:
            raise PruneError("the chosen features depend on no unit: their hook point is before the first layer's")
        self._of_features = [found for found, is_reached in zip(scores, reached, strict=True) if is_reached]
        #: For what is about all text: not only where the chosen features are active.
        self._any_text = calibration.spread(options.calibration_windows)[0]

    def scores(self, method: str, seed: int = 0) -> Scores:
        """Worth of every unit by a method."""
        if method == "features":
            return self._of_features
        if method == "loss":
            return loss_scores(self.lm, self.units, self._any_text)
        if method == "activation":
            return activation_scores(self.lm, self.units, self._any_text)
        return magnitude_scores(self.units) if method == "magnitude" else random_scores(self.units, seed)

    def masks(self, method: str, share: float, seed: int = 0) -> Masks:
        """What is taken out."""
        return masks_of(self.units, self.scores(method, seed), share, self.options.across)

    def bench(self) -> tuple[Bench, str]:
        """What measures, and why there is no probe where there is none."""
        options, missing, probe = self.options, "", None
        if options.task:
            try:
                probe = fit_probe(self.run, options.task, options.task_level)
            except TaskError as error:
                missing = str(error)
        test = SplitWindows(self.run.evidence, self.run.spec.name, "test")
        made = Bench(
            self.run,
            self.dictionary,
            options.features,
            loss_windows=test.spread(options.loss_windows),
            feature_windows=test.active(options.features, options.feature_windows),
            probe=probe,
        )
        return made, missing

    def curve(self, advance: Callable[[int], object] = lambda _: None) -> tuple[Curve, str]:
        """Every method at every share; and why there is no probe where there is none."""
        bench, missing = self.bench()
        rows = []
        for method in self.options.methods:
            for seed in range(self.options.random_seeds if method == "random" else 1):
                scores = self.scores(method, self.options.seed + seed)
                for share in self.options.shares:
                    masks = masks_of(self.units, scores, share, self.options.across)
                    with taken_out(self.units, masks):
                        found = bench.compared(bench.state())
                    rows.append({"method": method, "seed": seed, "share": share, **self.sparsity(masks), **found})
                    advance(1)
        return Curve(self.options, self._about(bench), bench.compared(bench.before), rows), missing

    def sparsity(self, masks: Masks) -> dict[str, Any]:
        """Shares that were really taken out: of units by kind, of the model's parameters."""
        found: dict[str, Any] = {}
        for kind in self.options.kinds:
            own = [n for n, units in enumerate(self.units) if units.kind == kind]
            gone = sum(int(masks[n].sum()) for n in own)
            found[f"{kind}_share"] = gone / max(sum(self.units[n].num for n in own), 1)
        total = sum(parameter.numel() for parameter in self.lm.model.parameters())
        found["parameter_share"] = num_weights(self.units, masks) / total
        return found

    def _about(self, bench: Bench) -> dict[str, Any]:
        layers = sorted({own.layer for own in self.units})
        return {
            "model": self.lm.identity.model_name,
            "dictionary": self.run.spec.name,
            "layers": [layers[0], layers[-1]],
            "calibration_windows": len(self.calibration),
            "loss_tokens": int(bench.count.sum()),
            "feature_rows": len(bench.before.values),
            "task": bench.probe.name if bench.probe else None,
        }
