"""What several commands share: parameters, overrides of configuration keys, running stages."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
RunPath = Annotated[Path, Parameter(help="Run directory.")]
StorePath = Annotated[Path, Parameter(help="Run directory, a folder that was imported, or a store: a file or Parquet.")]
Truncate = Annotated[
    bool,
    Parameter(help="Harvest without the layers after the deepest hook point in memory (model.truncate).", negative=""),
]


def execute(path: Path, config: Any, *, report_to: str, resume: bool) -> Any:
    from ..run import Run

    refuse_ranks()
    made = Run.create(path, config)
    report_stages(made.execute(resume=resume, report_to=report_to))
    return made


def report_stages(stages: Any, *, quiet: bool = False) -> None:
    for stage, seconds in stages:
        text = "reused" if seconds is None else f"{seconds:.1f} s"
        if not quiet:
            print(f"{stage:<10} {text}", file=sys.stderr, flush=True)


def run_stage(stage: str, path: Path, *, again: bool = True, **options: Any) -> None:
    from ..run import Run

    refuse_ranks()
    report_stages(Run.open(path).execute((stage,), again=again, **options))


def refuse_ranks() -> None:
    """Raise RunError where several processes were started together for what one does."""
    from saeql.sae.rank_place import rank_place

    from ..run import RunError

    size = rank_place().size
    if size > 1:
        raise RunError(
            f"{size} ranks were started for what one process does: only `saeql train`, "
            "`saeql harvest --join` and `saeql index --join` share their work out"
        )


def parse_overrides(tokens: tuple[str, ...]) -> dict[str, str]:
    """`--section.key value` and `--section.key=value` pairs."""
    from saeql.sae.config import ConfigError

    found, pending = {}, list(tokens)
    while pending:
        token = pending.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise ConfigError(f'unexpected argument "{token}"; configuration keys are set as --section.key value')
        if not equals:
            if not pending:
                raise ConfigError(f'"{token}" needs a value')
            value = pending.pop(0)
        found[key.replace("-", "_")] = value
    return found
