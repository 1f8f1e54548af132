"""The command that follows features over checkpoints of a model."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import Overrides, parse_overrides, refuse_ranks


def dynamics(
    config: Annotated[Path, Parameter(help="Configuration (TOML): text, hook point, dictionary, training.")],
    *overrides: Overrides,
    models: Annotated[list[str], Parameter(help="Checkpoint: a folder or name; in order, as often.", negative="")],
    out: Annotated[Path, Parameter(help="Folder for the runs and what is found.")],
    start: Annotated[
        str, Parameter(help="A later dictionary starts from the previous one's weights, or from scratch.")
    ] = "previous",
    later_steps: Annotated[
        int | None, Parameter(help="Training steps of dictionaries after the first; unset: as many.")
    ] = None,
    cosine: Annotated[float, Parameter(help="Decoder cosine from which a feature is still the same.")] = 0.7,
    control: Annotated[
        bool,
        Parameter(
            help="Also what training alone moves: of every step, the checkpoint before it again.",
            negative="--no-control",
        ),
    ] = True,
    crosscoder: Annotated[
        bool, Parameter(help="Also a crosscoder over the first and last model.", negative="--no-crosscoder")
    ] = True,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Follow features over checkpoints of a model: what is kept, drifts, dies and is born; what fine-tuning changed.

    Example: saeql dynamics recipe.toml --models tuned/step-0 --models tuned/step-200 --out dynamics
    """
    from ..config import load_config
    from ..dynamics.job import DynamicsOptions, follow
    from ..dynamics.report import print_dynamics
    from ..output import note

    refuse_ranks()
    options = DynamicsOptions(tuple(models), start, later_steps, cosine, control, crosscoder)
    found = follow(load_config(config, parse_overrides(overrides)), options, out, note)
    found.save(out)
    note(f"wrote {out}/dynamics.json, dynamics.png and features.parquet")
    print_dynamics(found, as_json=json)
