"""The command that probes activations and latents for properties."""

from typing import Annotated

from cyclopts import Parameter

from .common import RunPath, refuse_ranks


def probe(
    run: RunPath,
    *,
    task: Annotated[
        str,
        Parameter(
            help="A labelled file (.jsonl, .csv, .parquet), a planted concept such as months, or planted: all of them."
        ),
    ] = "planted",
    level: Annotated[
        str, Parameter(help="What a file labels: document (text, label) or token (tokens, labels; or text, spans).")
    ] = "document",
    hook_point: Annotated[
        str, Parameter(help="Hook point, harvested or not; unset: what the run's dictionary reads.")
    ] = "",
    text_column: Annotated[str, Parameter(help="Column of a file that holds the text.")] = "text",
    label_column: Annotated[str, Parameter(help="Column of a file that holds the label of a document.")] = "label",
    max_cases: Annotated[int, Parameter(help="Cases drawn of every split.")] = 1000,
    randomised: Annotated[
        bool,
        Parameter(
            help="Also the same probe on the model with its weights drawn anew: a forward pass over the text.",
            negative="",
        ),
    ] = False,
    every_probe: Annotated[
        bool, Parameter(help="A table of all probes for each task, where there are several.", negative="")
    ] = False,
    save: Annotated[bool, Parameter(help="Keep what was found as receipts of the run.")] = True,
    seed: Annotated[int, Parameter(help="Seed of what is drawn.")] = 0,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Probe a property: latents, activations and baselines side by side, each against control tasks.

    Probes that do no better on the task than on labels that mean nothing are struck out (docs/probing.md).

    Example: saeql probe runs/demo --task months
    """
    from contextlib import nullcontext
    from json import dumps

    from ..output import note
    from ..probing.plans import ProbeSettings
    from ..probing.probe_receipts import save_receipts
    from ..probing.sources import Asked, prepare
    from ..probing.table import print_overview, print_task, result_dict
    from ..progress import progress
    from ..run import Run

    refuse_ranks()
    opened = Run.open(run)
    settings = ProbeSettings(max_cases=max_cases, seed=seed)
    asked = Asked(
        task=task,
        level=level,
        hook_point=hook_point,
        text_column=text_column,
        label_column=label_column,
        randomised=randomised,
    )
    with opened.locked() if save else nullcontext():
        prepared = prepare(opened, asked, settings)
        with progress("probe", len(prepared.plans), "tasks") as advance:
            results = prepared.probed(settings, advance)
        if save and not save_receipts(opened, results):
            note(f"receipts saved; the store takes them in with `saeql store {run}`")
    for line in prepared.notes:
        note(line)
    if json:
        print(dumps([result_dict(result) for result in results], ensure_ascii=False))
        return
    if len(results) == 1 or every_probe:
        for result in results:
            if not result.not_measured:
                print_task(result)
    if len(results) > 1:
        print_overview(results)
