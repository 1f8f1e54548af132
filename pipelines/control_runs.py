"""Control runs: ordinary runs that differ from a finished one in one switch, so that its scores have something to beat.

    controls/<kind>/config.toml       the parent's configuration, one switch changed
    controls/<kind>/control.json      kind, parent, and what of the parent it was made of
    controls/<kind>/activations       a link to the parent's, where the model is the same
    controls/<kind>/dictionaries, evidence, stages.json, ...   as in every run

What is made here is compared by the controls C6 to C9 (`receipts/`). One kind is the run's own dictionary on another
text, which its labels were not made from (C14b).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saeql.sae.config import suggestion, with_keys

from .atomic import remove_folder, write_whole
from .config import RunConfig
from .corpus import EMBEDDED_TEXT
from .harvest_merge import TABLES_OF_HARVEST
from .run import Run
from .stages import StageRecord
from .sweep import SweepConfig
from .verify import CONTROLS_FOLDER, recorded

CONTROL_FILE = "control.json"
#: What is made for a comparison of labels.
CONTROL_STAGES = ("harvest", "train", "index", "label")
#: Tokens of a second corpus, where nothing else is asked for.
SECOND_CORPUS_TOKENS = 200_000


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
    has_own_dictionary: bool = True
    """False: it takes the parent's, and has no labels of its own."""

    @property
    def has_own_activations(self) -> bool:
        """Whether it reads another model or another text, and so harvests."""
        return "harvest" not in self.reads

    @property
    def stages(self) -> tuple[str, ...]:
        """What has to be finished before it is compared."""
        return CONTROL_STAGES if self.has_own_dictionary else CONTROL_STAGES[:-1]


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


def _second_corpus(run: Run) -> RunConfig:
    corpus = run.config.corpus
    most = min(corpus.max_tokens or SECOND_CORPUS_TOKENS, SECOND_CORPUS_TOKENS)
    return replace(run.config, corpus=replace(corpus, source=EMBEDDED_TEXT, mixture=(), max_tokens=most))


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
        ControlKind(
            "second-corpus", "C14b", "the same dictionary on another text", _second_corpus, ("train",),
            has_own_dictionary=False,
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
    text = "" if kind_of(kind).has_own_dictionary else " --corpus.source FILE"
    return f"saeql control {run.path} --kind {kind}{text}"


def control_path(run: Run, kind: str) -> Path:
    """Where a control run of a run is found."""
    return run.path / CONTROLS_FOLDER / kind


def is_control(run: Run) -> bool:
    """Whether a run is itself a control run of another."""
    return (run.path / CONTROL_FILE).exists()


def make_control(run: Run, kind: str, *, out: Path | None = None, corpus: Mapping[str, str] | None = None) -> Run:
    """The control run of a kind, begun or as it was left; `out`: in another folder, to which a link is kept.

    `corpus` sets keys of [corpus] ({"corpus.max_tokens": "500000"}) of a control that harvests for itself. Raises
    ControlRunError where the parent is not far enough, or has changed since, or the keys do not fit; RunError where the
    folder holds something else.
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
    _check_corpus(wanted, place, corpus or {})
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
        made = Run.open(place)
        return Run.create(place, with_keys(made.config, corpus)) if corpus else made
    config = with_keys(replace(wanted.switch(run), sweep=SweepConfig()), corpus or {})
    control = Run.create(place, config)
    if not wanted.has_own_activations and not control.activations.exists():
        share_harvest(run, control)
    write_whole(place / CONTROL_FILE, json.dumps(_record(run, wanted), indent=2) + "\n")  # last: all is there
    return control


def _check_corpus(kind: ControlKind, place: Path, corpus: Mapping[str, str]) -> None:
    foreign = [key for key in corpus if not key.startswith("corpus.")]
    if foreign:
        raise ControlRunError(f"--{foreign[0]} cannot be set here: only keys of [corpus] can")
    if corpus and not kind.has_own_activations:
        own = ", ".join(k.name for k in KINDS.values() if k.has_own_activations)
        raise ControlRunError(
            f"--{next(iter(corpus))}: control {kind.name} reads the run's activations; keys of [corpus] go with {own}"
        )
    if not kind.has_own_dictionary and "corpus.source" not in corpus and not (place / "config.toml").exists():
        raise ControlRunError(f"control {kind.name} needs a text that the run has not read: --corpus.source FILE")


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
    kind = kind_of(json.loads((control.path / CONTROL_FILE).read_text(encoding="utf-8"))["kind"])
    with run.locked(shared=True):
        if not kind.has_own_dictionary:
            yield from control.execute(("harvest",), **options)
            with control.locked():
                _take_dictionary(run, control)
        yield from control.execute((*kind.stages, "evaluate") if evaluate else kind.stages, **options)


def _take_dictionary(run: Run, control: Run) -> None:
    """Give a control run the parent's dictionary as it is, in place of a training."""
    if "train" in control.finished():
        return
    with recorded(control.path, "train"):
        remove_folder(control.dictionary_path)
        shutil.copytree(run.dictionary_path, control.dictionary_path)
    StageRecord(control.path).mark_finished("train", 0.0)


def find_control(run: Run, kind: str) -> Run | None:
    """A control run that can be compared: finished, and made of what the parent still holds; None for none."""
    if status(run, kind) != "finished":
        return None
    return Run.open(control_path(run, kind))


def status(run: Run, kind: str) -> str:
    """ "finished" (it can be compared), "none", "out of date", or how far it is."""
    place = control_path(run, kind)
    if not (place / CONTROL_FILE).exists() or not (place / "config.toml").exists():
        return "none"
    changed = changes(run, kind)
    if changed:
        return f"out of date: {changed[0]} ran again"
    finished = Run.open(place).finished()
    if kind_of(kind).stages[-1] in finished:
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
