"""The command that compares dictionaries."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def compare(
    *sources: Annotated[
        str,
        Parameter(help="Run directories, RUN:NAME (a dictionary of a run's sweep) or dictionary folders, in order."),
    ],
    out: Annotated[
        Path | None, Parameter(help="Folder for comparison.html, .json and the tables features, matches, splitting.")
    ] = None,
    save: Annotated[
        bool, Parameter(help="Keep what is found in the stores of the runs named: stability, first_seen, matches.")
    ] = False,
    shared_cosine: Annotated[float, Parameter(help="Decoder cosine from which a pair is one feature.")] = 0.7,
    split_cosine: Annotated[
        float, Parameter(help="Decoder cosine from which a feature of a wider dictionary is part of a narrower's.")
    ] = 0.5,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Match the features of dictionaries: between seeds, widths, layers, or checkpoints in the order of training.

    Example: saeql compare runs/seed0 runs/seed1 runs/wide --out runs/compared --save
    """
    from contextlib import nullcontext
    from json import dumps

    from ..compare import compare as compare_all
    from ..compare import find_compared
    from ..compare_report import print_comparison, write_comparison
    from ..comparison_evidence import held_runs, save_comparison
    from ..output import note
    from ..progress import progress

    with held_runs(sources) if save else nullcontext():
        found = find_compared(sources)
        with progress("compare", None, "pairs") as advance:
            result = compare_all(found, shared_cosine=shared_cosine, split_cosine=split_cosine, on_pair=advance.to)
        for run, is_built in save_comparison(result).items() if save else ():
            note(f"saved in {run}" + ("" if is_built else f"; its store is not up to date: `saeql store {run}`"))
    if out is not None:
        write_comparison(result, out)
    if json:
        print(dumps(result.summary(), ensure_ascii=False))
    else:
        print_comparison(result, out)
