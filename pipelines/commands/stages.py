"""Commands for one stage of a run, and the check of its files."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .common import Overrides, RunPath, Truncate, open_with, refuse_ranks, report_stages, run_stage


def harvest(
    run: RunPath,
    *,
    config: Annotated[
        Path | None, Parameter(help="Make the run of this TOML configuration where it is not there yet.")
    ] = None,
    truncate: Truncate = False,
    resume: Annotated[
        bool, Parameter(help="Go on with an interrupted harvest instead of starting anew.", negative="")
    ] = False,
    join: Annotated[
        bool,
        Parameter(
            help="Take parts (harvest.parts) beside other processes that do the same, on this machine or others that "
            "share the folder; under torchrun every rank does.",
            negative="",
        ),
    ] = False,
    lease_seconds: Annotated[
        float, Parameter(help="With --join: take over a part of a process that gave no sign of life for so long.")
    ] = 180.0,
) -> None:
    """Read the corpus and store activations at the hook points.

    Example: saeql harvest runs/big --config big.toml --join
    """
    from ..run import Run

    if config is not None:
        from ..config import load_config

        Run.create(run, load_config(config))
    if not join:
        return run_stage("harvest", run, again=not resume, resume=resume, truncate=truncate)
    Run.open(run).join_harvest(truncate=truncate, lease_seconds=lease_seconds)
    print("harvest    finished", file=sys.stderr)


def train(
    run: RunPath,
    *,
    resume: Annotated[bool, Parameter(help="Go on from the last checkpoint instead of starting anew.")] = False,
    reshard: Annotated[
        bool,
        Parameter(help="With --resume: go on with another number of ranks, no longer bit for bit.", negative=""),
    ] = False,
    sweep: Annotated[
        bool, Parameter(help="Train every dictionary of [sweep] on one stream and compare them.", negative="")
    ] = False,
    report_to: Annotated[str, Parameter(help="none, wandb, trackio or tensorboard.")] = "none",
) -> None:
    """Train the dictionary on stored activations, or with --sweep many of them on one stream.

    Under torchrun or srun all ranks train together (docs/cluster.md). Exit code 75: stopped by SIGTERM or SIGUSR1, with
    a checkpoint.

    Example: saeql train runs/demo --resume
    """  # fmt: skip
    from ..ranks import joined
    from ..run import Run

    opened = Run.open(run)
    options = {"resume": resume, "reshard": reshard, "report_to": report_to}
    with joined(opened.config.train, opened.config.model.device) as comm:
        if sweep:
            _train_sweep(opened, comm, options)
        else:
            stages = opened.execute(("train",), again=True, comm=comm, **options)
            report_stages(stages, quiet=not comm.is_first)


def _train_sweep(run: Any, comm: Any, options: dict[str, Any]) -> None:
    import json

    from ..output import print_records
    from ..sweep import run_sweep

    rows = run_sweep(run, comm=comm, **options)
    if not comm.is_first:
        return
    columns = ["dictionary", "l0", "fvu", "dead_share", "ce_increase", "ce_recovered", "train_seconds"]
    print_records(columns, [[row.get(c) for c in columns] for row in rows], "table")
    for advice in json.loads((run.path / "sweep" / "sweep.json").read_text(encoding="utf-8"))["advice"]:
        print(f"at {advice['hook_point']} take {advice['dictionary'] or 'none'}: {advice['reason']}")
    print(f"report: {run.path / 'sweep' / 'sweep.html'}")


def index(
    run: RunPath,
    *,
    rebuild: Annotated[
        bool,
        Parameter(help="Only build features.duckdb anew from the Parquet evidence, damaged or not.", negative=""),
    ] = False,
    join: Annotated[
        bool,
        Parameter(
            help="Take ranges of rows (index.rows_per_part) beside other processes that do the same, on this machine "
            "or others that share the folder; under torchrun every rank does.",
            negative="",
        ),
    ] = False,
    lease_seconds: Annotated[
        float, Parameter(help="With --join: take over the rows of a process that gave no sign of life for so long.")
    ] = 180.0,
) -> None:
    """Run the dictionary over every split and write Parquet evidence.

    Example: saeql index runs/demo
    """
    if rebuild:
        return run_stage("store", run, rebuild=True)
    if not join:
        return run_stage("index", run)
    from ..run import Run

    Run.open(run).join_index(lease_seconds=lease_seconds)
    print("index      finished", file=sys.stderr)


def label(
    run: RunPath,
    *overrides: Overrides,
    receipts: Annotated[
        str | None,
        Parameter(help="Cost tier of the controls: fast, full, paper, or none; unset: label.receipts.", negative=""),
    ] = None,
    only: Annotated[
        str | None,
        Parameter(help='"unexplained", or features as 3,17: the others keep their labels and receipts.', negative=""),
    ] = None,
    explainer: Annotated[
        list[str] | None,
        Parameter(help="What proposes labels; may be given several times; unset: label.explainers.", negative=""),
    ] = None,
) -> None:
    """Label features: made on train, chosen on calibration, scored on test documents, checked by controls.

    Keys of [label] and [judge] can be set as --judge.key value, for this time.

    Example: saeql label runs/demo --receipts full --only unexplained
    """
    from ..label_job import LabelOptions
    from ..output import note

    refuse_ranks()
    opened = open_with(run, overrides, ("label", "judge"))
    options = LabelOptions(receipts, only, tuple(explainer or ()))
    report_stages(opened.execute(("label",), again=True, label=options))
    if (run / "features.duckdb").exists():
        note(f"the store has the labels of before: `saeql evaluate {run}` and `saeql store {run}` bring it up to date")


def evaluate(
    run: RunPath,
    *,
    dictionary: Annotated[
        str | None,
        Parameter(
            help="Another dictionary than the run's: a name in the run or its sweep, or a folder or file from "
            "anywhere, of ours or of another library. It is measured and printed; the run stays as it is."
        ),
    ] = None,
    reads: Annotated[
        list[str] | None, Parameter(help="Hook points that it reads; unset: what its metadata says.", negative="")
    ] = None,
    writes: Annotated[
        list[str] | None, Parameter(help="Hook points that it writes; unset: what its metadata says.", negative="")
    ] = None,
    allow_mismatch: Annotated[
        bool, Parameter(help="Measure on a model that the dictionary was not trained on.", negative="")
    ] = False,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Measure fvu, l0, dead latents, cross-entropy and divergence on test documents, with intervals over documents.

    Example: saeql evaluate runs/demo --dictionary path/to/dictionary --json
    """
    from ..evaluation_page import EVALUATION_FILE, run_headline
    from ..metric_table import print_evaluation
    from ..run import Run

    opened = Run.open(run)
    if dictionary is None and (reads or writes or allow_mismatch):
        from saeql.sae.config import ConfigError

        raise ConfigError("--reads, --writes and --allow-mismatch are of another dictionary: name it by --dictionary")
    if dictionary is None:
        run_stage("evaluate", run)
        name, places = opened.spec.name, opened.spec.places
        rows = opened.evidence.read("metrics").to_pylist()
        if not json:
            print(f"{run_headline(opened.evidence).text}; more in {opened.path / EVALUATION_FILE}", file=sys.stderr)
    else:
        from ..find_dictionary import find_dictionary

        name, found, places = find_dictionary(
            opened, dictionary, tuple(reads or ()), tuple(writes or ()), allow_mismatch=allow_mismatch
        )
        rows = opened.evaluator().metrics(found, places)
    print_evaluation(name, places.reads, places.writes, rows, as_json=json)


def store(
    run: RunPath,
    *,
    add: Annotated[
        list[Path] | None,
        Parameter(help="Runs or evidence folders whose dictionaries and texts go into this store too.", negative=""),
    ] = None,
    name: Annotated[
        str | None,
        Parameter(
            name="--as",
            help="With --add: what its dictionary is called in this store; where its name is taken, NAME@RUN.",
        ),
    ] = None,
    parquet: Annotated[
        Path | None,
        Parameter(help="Also write the store to this folder as Parquet, to share or to keep on a bucket.", negative=""),
    ] = None,
) -> None:
    """Bring features.duckdb up to date with the Parquet evidence: what is new is added, what changed is built anew.

    Example: saeql store runs/demo --add runs/other
    """
    from saeql.sae.config import ConfigError

    from ..provenance import added_evidence

    if name is not None and not add:
        raise ConfigError("--as names the dictionary of the run that --add adds: say --add RUN2 too")
    with added_evidence(run, add or [], name) as new:
        run_stage("store", run)
    for evidence in new:
        for own, called in evidence.names.items():
            print(f"{own} of {evidence.folder} is called {called} in this store", file=sys.stderr)
    if parquet is not None:
        from saeql.store.parquet_store import write_parquet

        write_parquet(run / "features.duckdb", parquet)


def report(run: RunPath) -> None:
    """Write report.html.

    Example: saeql report runs/demo
    """
    run_stage("report", run)


def verify(run: RunPath) -> None:
    """Read every file of a run again and compare it with its hash; damage is named with file and byte, exit code 1.

    Example: saeql verify runs/demo
    """
    from ..run import Run

    found = Run.open(run).verify()
    for line in found.damage:
        print(f"saeql: {line}", file=sys.stderr)
    for name in found.unrecorded:
        print(f"no hash was recorded for {name}")
    state = f"{len(found.damage)} damaged" if found.damage else "all whole"
    print(f"{found.num_files} files, {found.num_bytes / 1e9:.3f} GB: {state}")
    if found.damage:
        sys.exit(1)
