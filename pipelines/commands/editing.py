"""The command that bakes edits into weights: edit."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import FeatureStrengths, Search, Vectors, Where


def edit(
    run: Annotated[Path | None, Parameter(help="Run directory.")] = None,
    *,
    out: Annotated[Path, Parameter(help="Folder to write: a checkpoint for transformers.")],
    feature: FeatureStrengths = None,
    search: Search = None,
    where: Where = None,
    top: Annotated[int, Parameter(help="Features taken of --search and --where.")] = 1,
    vector: Vectors = None,
    mode: Annotated[str, Parameter(help="add, replace or ablate_direction: what weights can hold.")] = "add",
    strength: Annotated[
        float | None, Parameter(help="add: multiples of --unit, 0.4; other modes: share of the way, 1.")
    ] = None,
    to: Annotated[float | None, Parameter(help="replace: the component's goal, in median activation norms; 0.")] = None,
    unit: Annotated[str, Parameter(help="Unit of add: norm, p99 or raw.")] = "norm",
    positions: Annotated[str, Parameter(help="Only all: weights act alike on every token.")] = "all",
    schedule: Annotated[str, Parameter(help="Only constant: weights act alike at every step.")] = "constant",
    everywhere: Annotated[
        bool,
        Parameter(
            help="Take directions out of every writer of the residual stream (ablate_direction): weight "
            "orthogonalisation.",
            negative="",
        ),
    ] = False,
    dtype: Annotated[str, Parameter(help="Of changed tensors: float32, or original: rounded to the files' own.")] = (
        "float32"
    ),
    windows: Annotated[int, Parameter(help="Held-out windows that the edited model is measured on.")] = 16,
    tolerance: Annotated[float, Parameter(help="Largest difference of a logit from the hooked model's.")] = 1e-4,
    any_strength: Annotated[bool, Parameter(help="Allow strengths at which models only break.", negative="")] = False,
    undo: Annotated[
        Path | None, Parameter(help="Instead: restore the checkpoint that this folder was edited from, to --out.")
    ] = None,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Bake edits into the weights: a checkpoint that behaves as the steered model, without hooks.

    Exit code 1: it was written, but its logits are not those of the hooked model within --tolerance.

    Example: saeql edit runs/demo --feature 123 --strength 0.3 --out edited
    """
    from ..editing.affine import EditError
    from ..editing.checkpoint import undo as restore
    from ..run import Run
    from ..steering.edits import Edit
    from .steering import named_edits, parsed_positions

    if undo is not None:
        if run is not None or feature or search or where or vector:
            raise EditError("--undo restores a folder as it was: name nothing but --undo and --out")
        names = restore(undo, out)
        print(f"restored {out}: {len(names)} files, each with the bytes that it had")
        return
    if run is None:
        raise EditError("name a run whose model is edited, or a folder to --undo")
    from ..editing.bake import bake, print_baked

    opened = Run.open(run)
    pattern = Edit(0, mode, strength, to, unit, parsed_positions(positions), schedule, any_strength)
    edits = named_edits(opened, pattern, feature, search, where, top, vector)
    baked = bake(opened, edits, out, everywhere=everywhere, dtype=dtype, num_windows=windows, tolerance=tolerance)
    print_baked(baked, as_json=json)
    if not baked.moved.is_equal:
        sys.exit(1)
