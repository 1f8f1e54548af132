"""Control runs: ordinary runs that differ from a finished one in one switch, so that its scores have something to beat.

    controls/<kind>/config.toml       the parent's configuration, one switch changed
    controls/<kind>/control.json      kind, parent, and what of the parent it was made of
    controls/<kind>/activations       a link to the parent's, where the model is the same
    controls/<kind>/dictionaries, evidence, stages.json, ...   as in every run

What is made here is compared by the controls C6 to C9 (`receipts/`).
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saeql.sae.config import suggestion

from .atomic import write_whole
from .config import RunConfig
from .harvest_merge import TABLES_OF_HARVEST
from .run import Run
from .sweep import SweepConfig
from .verify import CONTROLS_FOLDER

CONTROL_FILE = "control.json"
#: What is made for a comparison of labels; the last one where asked for.
CONTROL_STAGES = ("harvest", "train", "index", "label", "evaluate")


class ControlRunError(ValueError):
    """A control run cannot be made, or no longer belongs to its parent."""


@dataclass(frozen=True)
class ControlKind:
    """One switch. `reads` names the stages of the parent that its result depends on."""

    name: str
    code: str  # of the control that compares it
    summary: str
    switch: Callable[[Run], RunConfig]
    reads: tuple[str, ...] = ("harvest",)

    @property
    def has_own_activations(self) -> bool:
        """Whether it reads another model, and so harvests."""
        return not self.reads


def _fixed(start: str) -> Callable[[Run], RunConfig]:
    def switch(run: Run) -> RunConfig:
        own = run.config.dictionary
        width = sum(run.harvest_info.widths[name] for name in run.spec.reads)
        most = 2 * width if start in ("neurons", "pca") else own.d_sae
        fixed = replace(
            own,
            architecture="jumprelu",
            start=start,
            freeze="all",
            start_from="",
            rates_from=str(run.dictionary_path.resolve()),
            d_sae=min(own.d_sae, most),
            k=min(own.k, most),
        )
        return replace(run.config, dictionary=fixed, train=replace(run.config.train, resample_every_steps=0))

    return switch


def _frozen(freeze: str) -> Callable[[Run], RunConfig]:
    return lambda run: replace(
        run.config,
        dictionary=replace(run.config.dictionary, freeze=freeze, start_from=""),
        train=replace(run.config.train, resample_every_steps=0),
    )


def _randomised(what: str) -> Callable[[Run], RunConfig]:
    return lambda run: replace(run.config, model=replace(run.config.model, randomise=what))


_RATES = ("harvest", "train", "index")
KINDS = {
    kind.name: kind
    for kind in (
        ControlKind("random", "C6", "random Gaussian rows, nothing trained", _fixed("random"), _RATES),
        ControlKind(
            "random-covariance", "C6", "Gaussian rows with the activations' covariance", _fixed("random_covariance"),
            _RATES,
        ),
        ControlKind("neurons", "C6", "single coordinates of the activations", _fixed("neurons"), _RATES),
        ControlKind("pca", "C6", "principal directions of the activations", _fixed("pca"), _RATES),
        ControlKind("frozen-decoder", "C7", "the decoder stays at its random start", _frozen("decoder")),
        ControlKind("soft-frozen", "C7", "decoder rows keep a cosine of 0.8 with it", _frozen("soft_decoder")),
        ControlKind("frozen-encoder", "C7", "the encoder stays at its random start", _frozen("encoder")),
        ControlKind("randomised-model", "C8", "weights redrawn, embeddings kept", _randomised("weights"), ()),
        ControlKind("randomised-all", "C8", "embeddings redrawn too", _randomised("all"), ()),
        ControlKind(
            "second-seed", "C9", "another initialisation and order of rows",
            lambda run: replace(run.config, seed=run.config.seed + 1),
        ),
    )
}  # fmt: skip


def kind_of(name: str) -> ControlKind:
    """A kind by its name. Raises ControlRunError, listing those that exist."""
    if name not in KINDS:
        raise ControlRunError(f"no control {name!r}: there is {', '.join(KINDS)}{suggestion(name, tuple(KINDS))}")
    return KINDS[name]


def command(run: Run, kind: str) -> str:
    """What makes a control run."""
    return f"saeql control {run.path} --kind {kind}"


def control_path(run: Run, kind: str) -> Path:
    """Where a control run of a run is found."""
    return run.path / CONTROLS_FOLDER / kind


def is_control(run: Run) -> bool:
    """Whether a run is itself a control run of another."""
    return (run.path / CONTROL_FILE).exists()


def make_control(run: Run, kind: str, *, out: Path | None = None) -> Run:
    """The control run of a kind, begun or as it was left; `out`: in another folder, to which a link is kept.

    Raises ControlRunError where the parent is not far enough, or has changed since; RunError where the folder holds
    something else.
    """
    wanted, finished = kind_of(kind), run.finished()
    if is_control(run):
        raise ControlRunError(f"{run.path} is a control itself: name the run that it was made of")
    for stage in ("harvest", *wanted.reads):
        if stage not in finished:
            raise ControlRunError(
                f"{run.path}: control {kind} needs what {stage} makes, which is missing or out of date: "
                f"`saeql {stage} {run.path}` first"
            )
    place = control_path(run, kind)
    if out is not None and out.resolve() != place.resolve():
        if place.exists() or place.is_symlink():
            raise ControlRunError(f"{run.path} has its control {kind} in {place.resolve()}: remove it to make another")
        out.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(os.path.relpath(out.resolve(), place.parent.resolve()))
    if (place / CONTROL_FILE).exists():
        changed = changes(run, kind)
        if changed:
            raise ControlRunError(
                f"{place} was made before the last {changed[0]} of {run.path}: remove it to make it anew"
            )
        return Run.open(place)
    config = replace(wanted.switch(run), sweep=SweepConfig())
    control = Run.create(place, config)
    if not wanted.has_own_activations and not control.activations.exists():
        share_harvest(run, control)
    write_whole(place / CONTROL_FILE, json.dumps(_record(run, wanted), indent=2) + "\n")  # last: all is there
    return control


def changes(run: Run, kind: str) -> list[str]:
    """Stages of the parent that were run again since a control run was made of them."""
    file = control_path(run, kind) / CONTROL_FILE
    made_of = json.loads(file.read_text(encoding="utf-8"))["made_of"]
    finished = run.finished()
    return [stage for stage, record in made_of.items() if finished.get(stage) != record]


def execute_control(
    run: Run, control: Run, *, evaluate: bool = True, **options: Any
) -> Iterator[tuple[str, float | None]]:
    """Run the stages of a control run that are not finished, the parent held against other writers meanwhile."""
    stages = CONTROL_STAGES if evaluate else CONTROL_STAGES[:-1]
    with run.locked(shared=True):
        yield from control.execute(stages, **options)


def find_control(run: Run, kind: str) -> Run | None:
    """A control run that can be compared: labelled, and made of what the parent still holds; None for none."""
    if status(run, kind) != "finished":
        return None
    return Run.open(control_path(run, kind))


def status(run: Run, kind: str) -> str:
    """ "finished" (labelled), "none", "out of date", or how far it is."""
    place = control_path(run, kind)
    if not (place / CONTROL_FILE).exists() or not (place / "config.toml").exists():
        return "none"
    changed = changes(run, kind)
    if changed:
        return f"out of date: {changed[0]} ran again"
    finished = Run.open(place).finished()
    if "label" in finished:
        return "finished"
    return f"{[*finished][-1]} done" if finished else "begun"


def _record(run: Run, kind: ControlKind) -> dict[str, Any]:
    finished = run.finished()
    return {
        "kind": kind.name,
        "of": str(run.path.resolve()),
        "made_of": {stage: finished[stage] for stage in kind.reads},
    }


def share_harvest(run: Run, control: Run) -> None:
    """Let a run read another's rows: shards by a link, the small tables of text as the same files."""
    for table in TABLES_OF_HARVEST:
        for file in run.evidence.files(table):
            copy = control.evidence.folder / file.relative_to(run.evidence.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                _link(file.resolve(), copy)
    harvest = {"harvest": run.finished()["harvest"]}
    write_whole(control.path / "stages.json", json.dumps(harvest, indent=2) + "\n")
    target = os.path.relpath(run.activations.resolve(), control.path.resolve())
    control.activations.symlink_to(target)


def _link(file: Path, copy: Path) -> None:
    """Tables are replaced, never written into, so one file may have two names."""
    try:
        copy.hardlink_to(file)
    except OSError:  # another file system
        write_whole(copy, file.read_bytes())
