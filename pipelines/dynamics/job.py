"""One recipe over checkpoints of a model: runs, what became of their features, and a crosscoder over both ends."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saeql.sae.config import TrainConfig

from ..atomic import write_whole
from ..config import RunConfig
from ..control_runs import share_harvest
from ..harvest import open_source
from ..model_build import load_tokenizer
from ..models import model_folder
from ..run import Run
from ..sweep import SweepConfig
from .crosscoder import ONE_MODEL, Crosscoder, both_models, train_crosscoder
from .firing import Contexts, Firing, firing
from .steps import KEPT, LEAST_ROWS, NOT_ALIVE, Step, step

#: How a dictionary after the first starts.
STARTS = ("previous", "scratch")
#: Folder of the steps' controls; and the key of the crosscoder's.
CONTROLS, CONTROL = "controls", "control"
_STAGES = ("harvest", "train")
_BATCH_TOKENS = 4096


class DynamicsError(ValueError):
    """Checkpoints cannot be followed."""


@dataclass(frozen=True)
class DynamicsOptions:
    """What is followed, and how."""

    models: tuple[str, ...]
    """Checkpoints in order: names or folders."""
    start: str = "previous"
    later_steps: int | None = None
    """Training steps of dictionaries after the first; None: as many."""
    cosine: float = 0.7
    control: bool = True
    """Train on the checkpoint before each step again, to see what training alone moves."""
    crosscoder: bool = True
    examples: int = 3
    listed: int = 8
    """Latents of one model alone that are shown."""

    def check(self, config: RunConfig) -> None:
        """Raises DynamicsError naming what does not hold."""
        if len(self.models) < 2:
            raise DynamicsError("name at least two checkpoints, in order (--models)")
        if self.start not in STARTS:
            raise DynamicsError(f"a dictionary starts from {' or '.join(STARTS)}, not from {self.start!r}")
        if not 0 < self.cosine <= 1:
            raise DynamicsError(f"the cosine of a kept feature is above 0 and at most 1, not {self.cosine:g}")
        if self.later_steps is not None and self.later_steps < 1:
            raise DynamicsError(f"later dictionaries train at least 1 step, not {self.later_steps}")
        if config.train.source == "live":
            raise DynamicsError("train.source live keeps no rows to measure on: take the stored ones")
        if config.dictionary.form != "autoencoder" or len(config.model.hook_points) != 1:
            raise DynamicsError("dynamics follows an autoencoder at one hook point")


@dataclass(frozen=True)
class Dynamics:
    """What was found; `save` writes it."""

    names: Sequence[str]
    steps: Mapping[str, Mapping[str, Any]]
    """By "a -> b" summaries of `steps.Step`."""
    controls: Mapping[str, Mapping[str, Any]]
    """The same by the same names: a's dictionary trained on as b's was, but on a again. Empty without controls."""
    survivors: Sequence[int]
    """Of the features alive at the first checkpoint, how many are still kept at each."""
    features: pa.Table
    crosscoder: Mapping[str, Any] | None
    latents: pa.Table | None
    options: DynamicsOptions

    def summary(self) -> dict[str, Any]:
        """All but the tables."""
        return {
            "checkpoints": list(self.names),
            "steps": dict(self.steps),
            "controls": dict(self.controls),
            "survivors": list(self.survivors),
            "crosscoder": self.crosscoder,
            "options": asdict(self.options),
        }

    def save(self, folder: Path) -> None:
        """Write dynamics.json and .png, features.parquet and crosscoder.parquet."""
        from .report import plot

        write_whole(folder / "dynamics.json", json.dumps(self.summary(), indent=1, ensure_ascii=False) + "\n")
        write_whole(folder / "dynamics.png", plot(self))
        pq.write_table(self.features, folder / "features.parquet")
        if self.latents is not None:
            pq.write_table(self.latents, folder / "crosscoder.parquet")


def follow(
    config: RunConfig, options: DynamicsOptions, out: Path, told: Callable[[str], object] = lambda _: None
) -> Dynamics:
    """Harvest and train on every checkpoint, then compare; finished runs in `out` are taken as they are.

    `told` is called with a line about what is done next. Raises DynamicsError; RunError where `out` holds other runs.
    """
    options.check(config)
    names = _names(options.models)
    runs = _runs(config, options, names, out, told)
    told("compare")
    dictionaries = [run.dictionary() for run in runs]
    fired = [_firing(run, options) for run in runs]
    steps = {
        f"{names[n]} -> {names[n + 1]}": step(
            dictionaries[n], dictionaries[n + 1], fired[n], fired[n + 1], cosine=options.cosine
        )
        for n in range(len(runs) - 1)
    }
    summaries = {name: found.summary(fired[n], fired[n + 1]) for n, (name, found) in enumerate(steps.items())}
    controls = {}
    for n, name in enumerate(steps if options.control else ()):
        control = _control(runs[n], config, options, out / CONTROLS / names[n], told)
        after = _firing(control, options)
        again = step(dictionaries[n], control.dictionary(), fired[n], after, cosine=options.cosine)
        controls[name] = again.summary(fired[n], after)
    contexts = _contexts(runs[0])
    features, survivors = _feature_rows(names, list(steps.values()), fired, contexts)
    across = _crosscoder(runs, options, out, told, contexts) if options.crosscoder else (None, None)
    return Dynamics(names, summaries, controls, survivors, features, *across, options)


def _names(models: Sequence[str]) -> list[str]:
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else [f"{n}-{name}" for n, name in enumerate(short)]


def _runs(
    config: RunConfig, options: DynamicsOptions, names: Sequence[str], out: Path, told: Callable[[str], object]
) -> list[Run]:
    runs: list[Run] = []
    for name, model in zip(names, options.models, strict=True):
        made = replace(config, model=replace(config.model, name=model), sweep=SweepConfig())
        if runs:
            made = _later(made, options, runs[-1])
        told(f"checkpoint {name}")
        run = Run.create(out / "checkpoints" / name, made)
        list(run.execute(_STAGES))
        if runs and run.harvest_info.identity.tokenizer_sha256 != runs[0].harvest_info.identity.tokenizer_sha256:
            raise DynamicsError(f"{model} has another tokenizer than {options.models[0]}: their rows do not line up")
        if runs and run.harvest_info.widths != runs[0].harvest_info.widths:
            raise DynamicsError(f"{model} is of another width than {options.models[0]}")
        runs.append(run)
    return runs


def _later(config: RunConfig, options: DynamicsOptions, previous: Run) -> RunConfig:
    """The recipe of a dictionary after the first."""
    start = str(previous.dictionary_path.absolute()) if options.start == "previous" else config.dictionary.start_from
    made = replace(config, dictionary=replace(config.dictionary, start_from=start))
    return replace(made, train=_later_train(made.train, options))


def _later_train(train: TrainConfig, options: DynamicsOptions) -> TrainConfig:
    return train if options.later_steps is None else replace(train, num_steps=options.later_steps)


def _control(
    before: Run, config: RunConfig, options: DynamicsOptions, folder: Path, told: Callable[[str], object]
) -> Run:
    """A step without its change of the model: going on from the dictionary of the checkpoint before, or from another
    seed where all start anew, as long and on the same text as the step does.
    """
    told(f"control: checkpoint {folder.name} again")
    recipe = replace(before.config, dictionary=config.dictionary, train=config.train)
    made = _later(recipe, options, before)
    if options.start == "scratch":
        made = replace(made, seed=made.seed + 1)
    control = Run.create(folder, made)
    if not control.activations.exists():
        share_harvest(before, control)
    list(control.execute(("train",), again=False))
    return control


def _firing(run: Run, options: DynamicsOptions) -> Firing:
    source = open_source(run.activations, "test", run.harvest_info, run.spec.reads, _BATCH_TOKENS)
    return firing(run.dictionary(), source, examples=options.examples)


def _contexts(run: Run) -> Contexts:
    tokenizer = load_tokenizer(model_folder(run.config.model), run.config.model)
    table = run.evidence.read("windows", split="test")
    windows = dict(zip(table["window_id"].to_pylist(), table["token_ids"].to_pylist(), strict=True))
    return Contexts(windows, lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _feature_rows(
    names: Sequence[str], steps: Sequence[Step], fired: Sequence[Firing], contexts: Contexts
) -> tuple[pa.Table, list[int]]:
    """A row for every feature that is alive at a checkpoint; and how many of the first's are kept at each."""
    rows: list[dict[str, Any]] = []
    lineage = {f: f"{names[0]}:{f}" for f in range(len(fired[0].counts)) if fired[0].counts[f] >= LEAST_ROWS}
    survivors = []
    for n, name in enumerate(names):
        now, after = fired[n], steps[n] if n < len(steps) else None
        survivors.append(sum(own.startswith(f"{names[0]}:") for own in lineage.values()))
        following: dict[int, str] = {}
        for f, own in sorted(lineage.items()):
            fate = str(after.fate[f]) if after is not None else NOT_ALIVE
            partner = int(after.matching.partner[f]) if after is not None and fate == KEPT else None
            rows.append({
                "checkpoint": name,
                "feature": f,
                "lineage": own,
                "born": n > 0 and own == f"{name}:{f}",
                "density": float(now.density[f]),
                "fate": fate or None,
                "partner": partner,
                "decoder_cosine": None if after is None else float(after.matching.decoder_cosine[f]),
                "density_after": None if partner is None else float(fired[n + 1].density[partner]),
                "examples": contexts.of(now.strongest[f].tolist()),
            })  # fmt: skip
            if partner is not None:
                following[partner] = own
        if after is not None:
            born = {int(f): f"{names[n + 1]}:{f}" for f in after.born.nonzero()[0]}
            lineage = {**following, **born}
    return pa.Table.from_pylist(rows), survivors


def _crosscoder(
    runs: Sequence[Run], options: DynamicsOptions, out: Path, told: Callable[[str], object], contexts: Contexts
) -> tuple[dict[str, Any], pa.Table]:
    first, last = runs[0], runs[-1]
    found: dict[str, Any] = {}
    told("crosscoder over the first and the last checkpoint")
    made = train_crosscoder(first, last, first.config.dictionary, first.config.train, out / "crosscoder")
    shown = _fires(made, first, last, options)
    found["summary"] = made.summary(shown.counts >= LEAST_ROWS)
    if options.control:
        told("crosscoder over the first checkpoint twice")
        twice = train_crosscoder(first, first, first.config.dictionary, first.config.train, out / "crosscoder_control")
        own = _fires(twice, first, first, options)
        found[CONTROL] = twice.summary(own.counts >= LEAST_ROWS)
    rows = [
        {
            "latent": n,
            "share": float(made.share[n]),
            "cosine": float(made.cosine[n]),
            "density": float(shown.density[n]),
            "examples": contexts.of(shown.strongest[n].tolist()),
        }
        for n in (shown.counts >= LEAST_ROWS).nonzero()[0].tolist()
    ]
    rows.sort(key=lambda row: row["share"])
    found["base_only"] = [row for row in rows if row["share"] <= ONE_MODEL[0]][: options.listed]
    found["tuned_only"] = [row for row in rows[::-1] if row["share"] >= ONE_MODEL[1]][: options.listed]
    found["most_base"], found["most_tuned"] = rows[: options.listed], rows[::-1][: options.listed]
    return found, pa.Table.from_pylist(rows)


def _fires(made: Crosscoder, first: Run, last: Run, options: DynamicsOptions) -> Firing:
    return firing(made.dictionary, both_models(first, last, "test", _BATCH_TOKENS), examples=options.examples)
