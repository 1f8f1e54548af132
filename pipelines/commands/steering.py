"""Commands that change what the model writes: steer, vector."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .common import FeatureStrengths, RunPath, Search, Vectors, Where, writing_options

if TYPE_CHECKING:
    from ..run import Run
    from ..steering.edits import Edit


def steer(
    run: RunPath,
    *,
    prompt: Annotated[list[str], Parameter(help="Text to continue; several are continued in one batch.", negative="")],
    feature: FeatureStrengths = None,
    search: Search = None,
    where: Where = None,
    top: Annotated[int, Parameter(help="Features taken of --search and --where.")] = 1,
    vector: Vectors = None,
    mode: Annotated[
        str,
        Parameter(
            help="add; clamp, scale, ablate, ablate_mean (the feature's activation); replace, cap, ablate_direction "
            "(the component along its direction)."
        ),
    ] = "add",
    strength: Annotated[
        float | None,
        Parameter(help="add: multiples of --unit; other modes: share of the way, 1. 0 changes nothing."),
    ] = None,
    to: Annotated[
        float | None,
        Parameter(
            help="Goal of clamp (multiples of the feature's p99; 1), scale (of its activation; 0), replace and cap "
            "(of the median activation norm; 0)."
        ),
    ] = None,
    unit: Annotated[
        str,
        Parameter(
            help="Unit of add: norm (the median activation norm; 0.1 to 0.5), p99 (the feature's own) or raw (the "
            "direction as it is)."
        ),
    ] = "norm",
    positions: Annotated[
        str,
        Parameter(
            help="all, prompt, generated, or indices of tokens such as 0,3,-1; -1 is the prompt's last.",
            allow_leading_hyphen=True,
        ),
    ] = "all",
    schedule: Annotated[str, Parameter(help="Over tokens: constant, fade:N, first:N or every:N.")] = "constant",
    keep_error: Annotated[
        bool,
        Parameter(help="Leave what the dictionary does not reconstruct in place.", negative="--reconstruct"),
    ] = True,
    tokens: Annotated[int, Parameter(help="Tokens to write.")] = 40,
    temperature: Annotated[float, Parameter(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, Parameter(help="Of sampling, at a temperature above 0.")] = 0,
    repetition_penalty: Annotated[float, Parameter(help="1: none.")] = 1.2,
    stream: Annotated[bool, Parameter(help="Print the steered text while it is written.", negative="")] = False,
    any_strength: Annotated[bool, Parameter(help="Allow strengths at which models only break.", negative="")] = False,
    allow_mismatch: Annotated[
        bool, Parameter(help="Steer a model that the dictionary was not trained on.", negative="")
    ] = False,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Continue prompts with and without features changed, side by side.

    Example: saeql steer runs/demo --feature 123 --feature 45:0.2 --prompt "I think that"
    """
    from ..output import print_labels, print_steering
    from ..run import Run
    from ..steering.edits import Edit, SteerError
    from ..steering.selection import labels_of

    if stream and (json or len(prompt) > 1):
        raise SteerError("--stream prints one text as it is written: leave --json out, and give one --prompt")
    opened = Run.open(run)
    pattern = Edit(0, mode, strength, to, unit, parsed_positions(positions), schedule, any_strength)
    edits = named_edits(opened, pattern, feature, search, where, top, vector)
    for change in edits:
        change.check()
    options = writing_options(tokens, temperature, repetition_penalty)
    steerer = opened.steerer(allow_mismatch=allow_mismatch)
    steerer.placed(edits)  # refuses what cannot be made before anything is written
    with opened.store() as store:
        labels = labels_of(store, edits, opened.spec.name)

    def write(changes: list[Edit], **more: Any) -> list[str]:
        import torch

        torch.manual_seed(seed)
        return steerer.generate_all(prompt, changes, keep_error=keep_error, **options, **more)

    if stream:
        from transformers import TextStreamer

        print_labels(edits, labels)
        write(edits, streamer=TextStreamer(steerer.lm.tokenizer, skip_prompt=True))
        return
    print_steering(edits, prompt, write([]), write(edits), labels=labels, as_json=json)


def vector(
    run: RunPath,
    *,
    out: Annotated[Path | None, Parameter(help="File to write: .safetensors, or .gguf for llama.cpp.")] = None,
    method: Annotated[str, Parameter(help="diff_mean, caa, pca, logistic (of texts) or unembedding (of tokens).")] = (
        "diff_mean"
    ),
    positive: Annotated[
        Path | None,
        Parameter(help="Texts, one a line; or .jsonl lines with positive and negative, then without --negative."),
    ] = None,
    negative: Annotated[Path | None, Parameter(help="Texts, one a line.")] = None,
    token: Annotated[
        list[str] | None, Parameter(help='For unembedding: a token such as " law"; as often as wanted.', negative="")
    ] = None,
    hook_point: Annotated[
        str, Parameter(help="Where texts are read and the vector is added; unset: where the dictionary writes.")
    ] = "",
    rows: Annotated[str, Parameter(help="Rows of a text: its last token, their mean, or all.")] = "last",
    name: Annotated[str, Parameter(help="Name of the vector; unset: that of the file.")] = "",
    of: Annotated[
        Path | None,
        Parameter(help="Instead of making one: a vector that is there, to show or to write in another form."),
    ] = None,
    features: Annotated[int, Parameter(help="Most features that the vector is taken apart into; 0: not at all.")] = 8,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Make a steering vector from texts or tokens, and say which features are in it.

    Example: saeql vector runs/demo --positive happy.txt --negative sad.txt --out happy.safetensors
    """
    from ..run import Run
    from ..steering.vector_files import check_name, load_vector, save_vector
    from ..steering.vector_job import make_vector, print_parts, taken_apart

    if out is not None:
        check_name(out)
    opened = Run.open(run)
    made = load_vector(of) if of is not None else make_vector(
        opened, method, positive=positive, negative=negative, tokens=tuple(token or ()), hook_point=hook_point,
        rows=rows, name=name or (out.stem if out else method),
    )  # fmt: skip
    if out is not None:
        save_vector(made, out, opened.language_model)
        print(f"saeql: wrote {out}", file=sys.stderr)
    print_parts(opened, made, taken_apart(opened, made, features), as_json=json)


def named_edits(
    run: "Run",
    pattern: "Edit",
    features: list[str] | None,
    search: str | None,
    where: str | None,
    top: int,
    vectors: list[Path] | None,
) -> "list[Edit]":
    """One edit like `pattern` for every feature and vector that the parameters name. Raises what `chosen` raises."""
    from ..steering.selection import chosen
    from ..steering.vector_files import load_vector

    with run.store() as store:
        loaded = [load_vector(file) for file in vectors or ()]
        return chosen(store, pattern, features=features or (), search=search, where=where, top=top, vectors=loaded)


def parsed_positions(text: str) -> Any:
    """Positions as a command line gives them. Raises SteerError for what is none."""
    from ..steering.edits import SteerError

    if text in ("all", "prompt", "generated"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SteerError(f"--positions {text!r}: all, prompt, generated, or indices such as 0,3,-1") from None
