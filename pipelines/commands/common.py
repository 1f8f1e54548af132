"""What several commands share: parameters, overrides of configuration keys, running stages."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
RunPath = Annotated[Path, Parameter(help="Run directory.")]
Text = Annotated[
    list[str] | None,
    Parameter(
        help="Read this file, folder or hub dataset (hf:NAME) too, beside the configured corpus; corpus.max_tokens and "
        "corpus.max_document_tokens say how much of all of it.",
        negative="",
    ),
]
StorePath = Annotated[Path, Parameter(help="Run directory, a folder that was imported, or a store: a file or Parquet.")]
#: Features that an edit is about, as `named_edits` of `steering` takes them.
FeatureStrengths = Annotated[
    list[str] | None, Parameter(help="Feature id, or id:strength; as often as wanted.", negative="")
]
Search = Annotated[str | None, Parameter(help="Features that these words find (--top of them).")]
Where = Annotated[
    str | None, Parameter(help="Features that meet this SQL condition on the view features (--top of them).")
]
Vectors = Annotated[
    list[Path] | None,
    Parameter(help="Steering vector, of `saeql vector` (.safetensors) or llama.cpp (.gguf).", negative=""),
]
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


def writing_options(tokens: int, temperature: float, repetition_penalty: float) -> dict[str, Any]:
    """Options of `generate`: the likeliest token at a temperature of 0, else drawn. Raises ConfigError for none."""
    from saeql.sae.config import ConfigError

    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: at least 1 is written")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature {temperature:g}: 0, for the likeliest token, or more")
    if not 0 < repetition_penalty < math.inf:
        raise ConfigError(f"--repetition-penalty {repetition_penalty:g}: above 0; 1 is none")
    drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    return {"max_new_tokens": tokens, "repetition_penalty": repetition_penalty, **drawn}


def report_stages(stages: Any, *, quiet: bool = False) -> None:
    for stage, seconds in stages:
        text = "reused" if seconds is None else f"{seconds:.1f} s"
        if not quiet:
            print(f"{stage:<10} {text}", file=sys.stderr, flush=True)


def run_stage(stage: str, path: Path, *, again: bool = True, **options: Any) -> None:
    from ..run import Run

    refuse_ranks()
    report_stages(Run.open(path).execute((stage,), again=again, **options))


def open_with(path: Path, overrides: tuple[str, ...], sections: tuple[str, ...]) -> Any:
    """The run in `path`, with other keys of `sections` for this command alone: nothing is written.

    Raises ConfigError where an override is of another section.
    """
    from saeql.sae.config import ConfigError

    from ..config import load_config
    from ..run import Run

    opened, changes = Run.open(path), parse_overrides(overrides)
    foreign = [key for key in changes if key.split(".")[0] not in sections]
    if foreign:
        allowed = " and ".join(f"[{section}]" for section in sections)
        raise ConfigError(f"--{foreign[0]} cannot be set here: only keys of {allowed} can")
    return Run(path, load_config(path / "config.toml", changes)) if changes else opened


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
