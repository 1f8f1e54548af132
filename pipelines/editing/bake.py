"""`saeql edit`: edits of a run's features or of vectors as an ordinary checkpoint, checked against the hooked model."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..atomic import write_whole
from ..model_build import build
from ..model_config import ModelConfig
from ..models import model_folder
from ..output import cell, note, visible
from ..steering.edits import Edit
from ..steering.selection import labels_of
from ..steering.steerer import Steerer
from ..steering.vectors import SteeringVector
from .affine import AffineChange, EditError, require_affine
from .checkpoint import EDIT_FILE, require_free, write_edited
from .tensor_files import weight_files
from .weight_plan import Planner, WeightPlan
from .what_moved import WhatMoved, heldout_windows, what_moved
from .writers import everywhere as all_writers

if TYPE_CHECKING:
    from ..run import Run

DTYPES = ("float32", "original")


@dataclass(frozen=True)
class Baked:
    """An edited checkpoint."""

    folder: Path
    edits: list[Edit]
    plan: WeightPlan
    moved: WhatMoved


def bake(
    run: "Run",
    edits: Sequence[Edit],
    out: Path,
    *,
    everywhere: bool = False,
    dtype: str = "float32",
    num_windows: int = 16,
    tolerance: float = 1e-4,
) -> Baked:
    """Write the model of `run` with `edits` in its weights to the folder `out`, and measure what moved.

    `everywhere` takes directions out of every writer of the residual stream (weight orthogonalisation, Arditi et al.
    2024, arXiv 2406.11717) instead of one hook point. Changed tensors are stored in float32, or rounded to the files'
    dtype ("original").
    Raises EditError, saying why, for what weights cannot hold, before anything is written; SteerError as steering does.
    """
    if num_windows < 1:
        raise EditError(f"--windows {num_windows}: at least 1 is measured on")
    if not 0 <= tolerance < math.inf:
        raise EditError(f"--tolerance {tolerance:g}: a difference of logits, 0 or more")
    for change in edits:
        change.check()
        require_affine(change)
    config = run.config.model
    if config.quantization or config.randomise != "none":
        what = "quantised" if config.quantization else "randomised"
        raise EditError(f"this run's model is {what} on loading: its weights are in no file that could be edited")
    require_free(out)
    windows = heldout_windows(run, num_windows)
    steerer = run.steerer(exact=True)
    plan, made = write_model(steerer, model_folder(config), edits, out, everywhere=everywhere, dtype=dtype)
    edited = build(out, ModelConfig(name=str(out), hook_point=config.hook_point), torch.float32, steerer.lm.device)
    moved = what_moved(steerer.lm, edited, lambda: steerer.applied(made), *windows, tolerance=tolerance)
    baked = Baked(out, list(edits), plan, moved)
    write_whole(out / EDIT_FILE, json.dumps(_record(run, baked, made), indent=2) + "\n")
    return baked


def write_model(
    steerer: Steerer,
    folder: Path,
    edits: Sequence[Edit],
    out: Path,
    *,
    everywhere: bool = False,
    dtype: str = "float32",
) -> tuple[WeightPlan, list[Edit]]:
    """Write the steerer's model, loaded from `folder`, with edits in its weights to `out`; the options of `bake`.

    Returns what changed, and the edits whose hooks do the same. Raises as `bake` does.
    """
    if dtype not in DTYPES:
        raise EditError(f"no dtype {dtype!r}: there is {', '.join(DTYPES)}")
    require_free(out)
    made = _everywhere(steerer, edits) if everywhere else list(edits)
    placed = steerer.placed([change for change in made if change.amount != 0])
    if not placed:
        raise EditError("strength 0 changes nothing: there is nothing to write")
    changes = {name: AffineChange.of(own) for name, own in placed.items()}
    files = weight_files(folder)
    plan = Planner(steerer.lm.model, folder, files).plan(changes)
    partial = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    write_edited(folder, files, plan, partial, widen=dtype == "float32")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return plan, made


def _everywhere(steerer: Steerer, edits: Sequence[Edit]) -> list[Edit]:
    """Edits of directions at every writer of the stream. Raises EditError for other edits, or several hook points."""
    names, made = all_writers(steerer.lm.model), []
    for change in edits:
        if change.mode != "ablate_direction":
            raise EditError(f"--everywhere takes directions out of all writers: mode {change.mode} has no such meaning")
        (_, row), *more = [(hook, own[0].row) for hook, own in steerer.placed([change]).items()]
        if more:
            raise EditError(
                f"{change.target} has a direction of its own at each of {1 + len(more)} hook points: name one"
            )
        name = change.target.replace(" ", "_")
        vector = SteeringVector(name, dict.fromkeys(names, row.cpu()), {}, made_by="saeql edit --everywhere")
        made.append(replace(change, feature=vector))
    return made


def _record(run: "Run", baked: Baked, made: Sequence[Edit]) -> dict[str, Any]:
    with run.store() as store:
        labels = labels_of(store, baked.edits, run.spec.name)
    identity = run.exact_language_model.identity
    return {
        "made_by": f"saeql {version('saeql')} edit",
        "model_name": identity.model_name,
        "model_sha256": identity.model_sha256,
        "dictionary": run.spec.name,
        "edits": [
            {
                "target": e.target,
                "label": label,
                "mode": e.mode,
                "strength": e.amount,
                "to": e.goal,
                "unit": e.unit,
                "describe": e.describe(),
            }
            for e, label in zip(baked.edits, labels, strict=True)
        ],
        "hook_points": sorted(run.steerer(exact=True).placed(made)),
        "tensors": sorted(baked.plan.tensors),
        "config": baked.plan.switches,
        "notes": baked.plan.notes,
        "measured": baked.moved.record(),
    }


def print_baked(baked: Baked, *, as_json: bool) -> None:
    """Print what was written, whether it is the hooked model, and what moved."""
    moved = baked.moved
    if as_json:
        print((baked.folder / EDIT_FILE).read_text(encoding="utf-8"), end="")
        return
    for change in baked.edits:
        print(change.describe())
    for text in baked.plan.notes:
        note(text)
    print(
        f"wrote {baked.folder}: {len(baked.plan.tensors)} tensors changed; "
        f"the way back: saeql edit --undo {baked.folder}"
    )
    verdict = (
        "the edited model is the hooked one" if moved.is_equal else "FAILED: the edited model is not the hooked one"
    )
    print(
        f"{verdict}: largest difference of a logit {moved.largest_difference:.2g} (at most {moved.tolerance:g} asked, "
        f"logits up to {moved.largest_logit:.3g}), {moved.num_windows} held-out windows, float32"
    )
    if (found := moved.rounding) is not None:
        print(
            f"more than asked at {moved.num_beyond} of {moved.num_windows * moved.window_tokens} tokens, most at "
            f"[{visible(found.text)}], token {found.position} of its window. In float64 that window is "
            f"{found.largest_in_float64:.2g} apart: the rest is rounding. In float32 the hooked model's logits at that "
            f"token are {found.of_hooked:.2g} from those that it has in float64, the edited one's {found.of_edited:.2g}"
        )
    for name, found in (
        ("cross-entropy before", moved.ce_before),
        ("after", moved.ce_after),
        ("increase", moved.ce_increase),
        ("KL divergence", moved.kl),
        ("next tokens changed", moved.changed_share),
    ):
        interval = "" if found.low is None else f"  ({cell(found.low)} to {cell(found.high)})"
        print(f"  {name:<22}{cell(found.value)}{interval}")
    print(f"  n = {moved.num_tokens} predictions; 95 % intervals over documents")
    for name, tokens in (("likelier", moved.risen), ("less likely", moved.fallen)):
        print(f"  {name:<22}" + " ".join(f"[{visible(t)}] {p:+.2g}" for t, p in tokens))
