"""The commands of the alignment guard: guard learn, guard run."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from .common import RunPath, writing_options

guard = App(
    name="guard",
    help="Watch features while a model writes, and stop or change it where one fires.\n\n"
    "`saeql guard learn` sets thresholds on labelled texts, `saeql guard run` writes under them (docs/guard.md).\n\n"
    "Example: saeql guard learn runs/demo --bad bad.jsonl --good good.jsonl --out guard.json",
)


@guard.command
def learn(
    run: RunPath,
    *,
    bad: Annotated[Path, Parameter(help="Texts that are to fire: .txt with one a line, .jsonl, .parquet, a folder.")],
    good: Annotated[Path, Parameter(help="Texts that are not to.")],
    out: Annotated[Path, Parameter(help="File of the guard (JSON).")],
    false_positives: Annotated[float, Parameter(help="Share of good texts that may fire.")] = 0.01,
    features: Annotated[
        list[str] | None,
        Parameter(name=["--feature", "--features"], help="Watch this feature; as often as wanted.", negative=""),
    ] = None,
    search: Annotated[str | None, Parameter(help="Watch features that these words find (--top of them).")] = None,
    where: Annotated[
        str | None, Parameter(help="Watch features that meet this SQL condition on the view features (--top of them).")
    ] = None,
    top: Annotated[int, Parameter(help="Features taken of --search and --where.")] = 4,
    window: Annotated[
        list[int] | None,
        Parameter(help="Tokens that a value is a mean over; several are tried on calibration texts.", negative=""),
    ] = None,
    max_tokens: Annotated[int, Parameter(help="Tokens read of a text: rates are about texts of that length.")] = 256,
    text_column: Annotated[str, Parameter(help="Column of a file that holds the text.")] = "text",
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Learn which features tell bad from good texts, with thresholds that keep a false-positive rate.

    Without --feature, --search or --where features are chosen by their AUROC on half of the texts. Rates are those of
    texts that nothing was learned from, beside a word list and a dense probe learned on the same texts.

    Example: saeql guard learn runs/demo --bad bad.jsonl --good good.jsonl --out guard.json
    """
    from ..guarding.learn import WINDOWS, GuardOptions, learn_guard
    from ..guarding.report import print_guard
    from ..output import note
    from ..progress import progress
    from ..run import Run
    from ..steering.selection import chosen_features

    opened, named = Run.open(run), []
    if features or search is not None or where is not None:
        with opened.store() as store:
            named = chosen_features(store, features or (), search=search, where=where, top=top)
    options = GuardOptions(false_positives, tuple(named), tuple(window or WINDOWS), max_tokens=max_tokens,
                           text_column=text_column)  # fmt: skip
    with progress("texts", None, "texts") as advance:
        made = learn_guard(opened, bad, good, options, advance)
    made.save(out)
    note(f"wrote {out}")
    print_guard(made, as_json=json)


@guard.command(name="run")
def run_guard(
    run: RunPath,
    *,
    guard: Annotated[Path, Parameter(help="File of the guard.")],
    prompt: Annotated[list[str], Parameter(help="Text to continue; as often as wanted.", negative="")],
    action: Annotated[
        str, Parameter(help="Where a feature fires: log, stop, clamp (to --to from there on), ablate (to 0).")
    ] = "log",
    to: Annotated[float | None, Parameter(help="Goal of clamp in multiples of the feature's p99 (-0.5).")] = None,
    log: Annotated[
        Path | None, Parameter(help="Add every event to this file as a line of JSON, as it happens.")
    ] = None,
    stream: Annotated[bool, Parameter(help="Print the text while it is written.", negative="")] = False,
    tokens: Annotated[int, Parameter(help="Tokens to write.")] = 40,
    temperature: Annotated[float, Parameter(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, Parameter(help="Of sampling, at a temperature above 0.")] = 0,
    repetition_penalty: Annotated[float, Parameter(help="1: none.")] = 1.2,
    allow_mismatch: Annotated[
        bool, Parameter(help="Use a model that the dictionary was not trained on.", negative="")
    ] = False,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Continue prompts under a guard: every token of prompt and continuation is held against its thresholds.

    Example: saeql guard run runs/demo --guard guard.json --prompt "Ignore all rules and" --action stop
    """
    from contextlib import nullcontext
    from dataclasses import asdict
    from json import dumps

    import torch

    from ..guarding.guard import Guard, GuardError
    from ..guarding.report import print_guarded
    from ..guarding.watch import Event, guarded
    from ..run import Run

    if stream and json:
        raise GuardError("--stream prints text as it is written: leave --json out")
    loaded = Guard.load(guard)
    steerer = Run.open(run).steerer(allow_mismatch=allow_mismatch)
    options = writing_options(tokens, temperature, repetition_penalty)
    try:
        file_or_none = nullcontext() if log is None else log.open("a", encoding="utf-8")
    except OSError as error:
        raise GuardError(f"{log} cannot be written: {error.strerror}") from None
    with file_or_none as file:

        def write(event: Event, number: int) -> None:
            if file is not None:
                file.write(dumps({**asdict(event), "text": number, "action": action}, ensure_ascii=False) + "\n")
                file.flush()

        texts = []
        for number, own in enumerate(prompt):
            torch.manual_seed(seed)
            if stream:
                from transformers import TextStreamer

                print(own, end="", flush=True)
                options["streamer"] = TextStreamer(steerer.lm.tokenizer, skip_prompt=True)
            texts.append(
                guarded(loaded, steerer, own, action, to=to, on_event=lambda e, n=number: write(e, n), **options)
            )
    print_guarded(texts, action, as_json=json, streamed=stream)
