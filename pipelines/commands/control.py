"""The command that makes control runs and compares a run with them."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import Overrides, RunPath, parse_overrides, refuse_ranks, report_stages


def control(
    run: RunPath,
    *overrides: Overrides,
    kind: Annotated[
        list[str] | None,
        Parameter(
            help="Make these, one after the other: random, random-covariance, neurons, pca, frozen-decoder, "
            "soft-frozen, frozen-encoder, randomised-model, randomised-all, second-seed, second-corpus.",
            negative="",
        ),
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="Folder of the control run, with one --kind; default: RUN/controls/KIND.")
    ] = None,
    evaluate: Annotated[bool, Parameter(help="Also measure its fvu, l0 and cross-entropy.")] = False,
    list_: Annotated[
        bool, Parameter(name="--list", help="Only print which control runs there are.", negative="")
    ] = False,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Make runs that differ from a finished one in one switch, and print its labels beside theirs (docs/controls.md).

    Without --kind: compare with those that there are. Receipts C6 to C9 and C14b go into the run's evidence. Of the
    kinds that read text themselves (randomised-model, randomised-all, second-corpus) keys of [corpus] can be set as
    --corpus.key value.

    Example: saeql control runs/demo --kind random --kind frozen-decoder
    """
    from ..control_comparison import compare_controls, control_table, save_receipts, status_table
    from ..control_runs import ControlRunError, execute_control, kind_of, make_control
    from ..output import note, print_records
    from ..receipts.control_gaps import Trained
    from ..run import Run

    refuse_ranks()
    opened, style = Run.open(run), "json" if json else "table"
    if list_:
        return print_records(*status_table(opened), style)
    kinds = [kind_of(name).name for name in kind or ()]
    if out is not None and len(kinds) != 1:
        raise ControlRunError("--out names the folder of one control run: give it one --kind")
    keys = parse_overrides(overrides)
    if keys and not kinds:
        raise ControlRunError(f"--{next(iter(keys))} goes with a --kind that reads text itself")
    for name in kinds:
        made = make_control(opened, name, out=out, corpus=keys)
        note(f"{name}: {made.path}")
        report_stages(execute_control(opened, made, evaluate=evaluate))
    with opened.locked():
        trained = Trained(opened)
        receipts = compare_controls(trained)
        save_receipts(opened, receipts)
    print_records(*control_table(trained), style)
    if not json:
        whole = [r for r in receipts if r.feature is None]
        print_records(*_receipts(whole), style)
        if "store" in opened.finished():
            note(f"the receipts are in the evidence; `saeql store {run}` brings them into the store")


def _receipts(receipts: list) -> tuple[list[str], list[list]]:
    rows = []
    for r in receipts:
        value = "-" if r.value is None else f"{r.value:.3f}"
        between = f"{r.low:.3f} to {r.high:.3f}" if r.low is not None and r.high is not None else ""
        rows.append([r.control, value, between, r.n, r.verdict, r.detail.get("missing", "")])
    return ["receipt", "value", "95 % interval", "n", "verdict", ""], rows
