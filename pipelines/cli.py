"""The `saeql` command: parses, calls the library, prints. Heavy imports wait until a command needs them."""

import errno
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

app = App(
    name="saeql",
    help="Sparse autoencoders you can query and act on: harvest, train, explain, SQL, steer.\n\n"
    "Start with `saeql demo`: a real model and real text, no network.",
    version_flags=["--version"],
    version=lambda: version("saeql"),
    help_format="plaintext",
    print_error=False,
    exit_on_error=False,
    result_action="return_value",
)

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
RunPath = Annotated[Path, Parameter(help="Run directory.")]
Truncate = Annotated[
    bool,
    Parameter(help="Harvest without the layers after the deepest hook point in memory (model.truncate).", negative=""),
]
DEMO_RUN = Path("runs/demo")


@app.command
def demo(
    *overrides: Overrides,
    out: Annotated[Path, Parameter(help="Run directory to fill, or to go on with.")] = DEMO_RUN,
    report_to: Annotated[str, Parameter(help="none, wandb, trackio or tensorboard.")] = "none",
) -> None:
    """The whole road on SmolLM2-135M-Instruct and Wikipedia pages: harvest, train, index, label, evaluate, steer.

    Example: saeql demo
    """
    from .config import load_config
    from .showcase import print_showcase

    made = _execute(out, load_config(None, _parse_overrides(overrides)), report_to=report_to, resume=True)
    print_showcase(made)


@app.command
def run(
    config: Annotated[Path, Parameter(help="TOML configuration; `saeql config` documents every key.")],
    *overrides: Overrides,
    out: Annotated[Path | None, Parameter(help="Run directory; default: runs/<name of the file>.")] = None,
    resume: Annotated[bool, Parameter(help="Let training go on from its last checkpoint.")] = True,
    truncate: Truncate = False,
    report_to: Annotated[str, Parameter(help="none, wandb, trackio or tensorboard.")] = "none",
) -> None:
    """Run every stage of a configuration that is not finished yet. Any key can be set as --section.key value.

    Example: saeql run my.toml --out runs/wide --dictionary.d_sae 9216 --train.num_steps 3000
    """
    from .config import load_config
    from .showcase import print_showcase

    made = _execute(
        out or Path("runs") / config.stem,
        load_config(config, {**_parse_overrides(overrides), **({"model.truncate": "true"} if truncate else {})}),
        report_to=report_to,
        resume=resume,
    )
    print_showcase(made)


@app.command
def plan(
    *config: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True, help="TOML configuration (none: that of `saeql demo`), --section.key value."
        ),
    ],
    gpu: Annotated[str | None, Parameter(help="Plan for h100, h200, a100 or rtx4090 instead of this machine.")] = None,
    nodes: Annotated[int, Parameter(help="Nodes of the cluster, with --gpu.")] = 1,
    gpus_per_node: Annotated[int | None, Parameter(help="GPUs of a node; 8 where there are several nodes.")] = None,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
    strict: Annotated[bool, Parameter(help="Exit with 1 where something does not fit.", negative="")] = False,
) -> None:
    """Memory, disk, speed and time of a configuration before anything runs, and what to change where it does not fit.

    Example: saeql plan my.toml --gpu h100 --nodes 8 --dictionary.d_sae 131072
    """
    from json import dumps

    from .config import load_config
    from .plan import make_plan
    from .plan_text import plan_text

    file = config[:1] if config and not config[0].startswith("--") else ()
    made = make_plan(
        load_config(file[0] if file else None, _parse_overrides(config[len(file) :])),
        gpu_name=gpu,
        nodes=nodes,
        gpus_per_node=gpus_per_node or (8 if nodes > 1 else 1),
    )
    print(dumps(made.to_dict(), indent=2) if json else plan_text(made))
    if strict and made.warnings:
        sys.exit(1)


def _execute(path: Path, config: Any, *, report_to: str, resume: bool) -> Any:
    from .run import Run

    made = Run.create(path, config)
    _report_stages(made.execute(resume=resume, report_to=report_to))
    return made


def _report_stages(stages: Any) -> None:
    for stage, seconds in stages:
        text = "reused" if seconds is None else f"{seconds:.1f} s"
        print(f"{stage:<10} {text}", file=sys.stderr, flush=True)


def _stage(stage: str, path: Path, **options: Any) -> None:
    from .run import Run

    _report_stages(Run.open(path).execute((stage,), again=True, **options))


@app.command
def harvest(run: RunPath, *, truncate: Truncate = False) -> None:
    """Read the corpus and store activations at the hook points.

    Example: saeql harvest runs/demo --truncate
    """
    _stage("harvest", run, truncate=truncate)


@app.command
def train(
    run: RunPath,
    *,
    resume: Annotated[bool, Parameter(help="Go on from the last checkpoint instead of starting anew.")] = False,
    sweep: Annotated[
        bool, Parameter(help="Train every dictionary of [sweep] on one stream and compare them.", negative="")
    ] = False,
    report_to: Annotated[str, Parameter(help="none, wandb, trackio or tensorboard.")] = "none",
) -> None:
    """Train the dictionary on stored activations, or with --sweep many of them on one stream.

    Example: saeql train runs/demo --resume
    """  # fmt: skip
    if not sweep:
        return _stage("train", run, resume=resume, report_to=report_to)
    import json

    from .output import print_records
    from .run import Run
    from .sweep import run_sweep

    opened = Run.open(run)
    rows = run_sweep(opened, resume=resume, report_to=report_to)
    columns = ["dictionary", "l0", "fvu", "dead_share", "ce_increase", "ce_recovered", "train_seconds"]
    print_records(columns, [[row.get(c) for c in columns] for row in rows], "table")
    for advice in json.loads((opened.path / "sweep" / "sweep.json").read_text(encoding="utf-8"))["advice"]:
        print(f"at {advice['hook_point']} take {advice['dictionary'] or 'none'}: {advice['reason']}")
    print(f"report: {opened.path / 'sweep' / 'sweep.html'}")


@app.command
def index(run: RunPath) -> None:
    """Run the dictionary over every split and write Parquet evidence.

    Example: saeql index runs/demo
    """
    _stage("index", run)


@app.command
def label(run: RunPath) -> None:
    """Label every feature: made on train, chosen on calibration, scored on test documents.

    Example: saeql label runs/demo
    """
    _stage("label", run)


@app.command
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
    from .metric_table import print_evaluation
    from .run import Run

    opened = Run.open(run)
    if dictionary is None:
        _stage("evaluate", run)
        name, places = opened.spec.name, opened.spec.places
        rows = opened.evidence.read("metrics").to_pylist()
    else:
        from .find_dictionary import find_dictionary

        name, found, places = find_dictionary(
            opened, dictionary, tuple(reads or ()), tuple(writes or ()), allow_mismatch=allow_mismatch
        )
        rows = opened.evaluator().metrics(found, places)
    print_evaluation(name, places.reads, places.writes, rows, as_json=json)


@app.command
def store(run: RunPath) -> None:
    """Build features.duckdb from the Parquet evidence.

    Example: saeql store runs/demo
    """
    _stage("store", run)


@app.command
def report(run: RunPath) -> None:
    """Write report.html.

    Example: saeql report runs/demo
    """
    _stage("report", run)


@app.command
def verify(run: RunPath) -> None:
    """Read every file of a run again and compare it with its hash; damage is named with file and byte, exit code 1.

    Example: saeql verify runs/demo
    """
    from .run import Run

    found = Run.open(run).verify()
    for line in found.damage:
        print(f"saeql: {line}", file=sys.stderr)
    for name in found.unrecorded:
        print(f"no hash was recorded for {name}")
    state = f"{len(found.damage)} damaged" if found.damage else "all whole"
    print(f"{found.num_files} files, {found.num_bytes / 1e9:.3f} GB: {state}")
    if found.damage:
        sys.exit(1)


@app.command
def search(
    run: RunPath,
    text: Annotated[str, Parameter(help="Words to look for in labels and in promoted and activating tokens.")],
    *,
    limit: Annotated[int, Parameter(help="Number of features.")] = 10,
    where: Annotated[str | None, Parameter(help="SQL condition on the view features.")] = None,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Find features by words, best first, with what matched.

    Example: saeql search runs/demo "music" --where "density < 0.01"
    """
    from .output import print_records
    from .run import Run

    with Run.open(run).store() as opened:
        hits = opened.search(text, limit=limit, where=where)
    print_records(
        ["feature", "score", "label", "kind", "auroc", "density", "matched"],
        [[h.feature, h.score, h.label, h.kind, h.auroc, h.density, h.matched] for h in hits],
        "json" if json else "table",
    )


@app.command
def show(
    run: RunPath,
    feature: Annotated[int, Parameter(help="Feature id.")],
    *,
    examples: Annotated[int, Parameter(help="Number of top examples.")] = 5,
    split: Annotated[str, Parameter(help="Split of the examples: train or test.")] = "train",
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """One feature: label and score, statistics, promoted tokens, neighbours, top examples.

    Example: saeql show runs/demo 123
    """
    from .output import print_feature
    from .run import Run

    with Run.open(run).store() as opened:
        print_feature(opened, feature, num_examples=examples, split=split, as_json=json)


@app.command
def sql(
    run: RunPath,
    query: Annotated[
        str,
        Parameter(
            help="SQL over the views dictionaries, features, examples, documents, labels, "
            "neighbours, logit_effects, activations, metrics."
        ),
    ],
    *,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
    csv: Annotated[bool, Parameter(help="Print CSV.", negative="")] = False,
    max_rows: Annotated[int, Parameter(help="Rows to print at most.")] = 1000,
) -> None:
    """Ask the feature store in SQL. Read-only.

    Example: saeql sql runs/demo "SELECT feature, label, density FROM features ORDER BY density DESC LIMIT 5"
    """  # fmt: skip
    from .output import print_records
    from .run import Run

    with Run.open(run).store() as opened:
        table = opened.sql(query, max_rows=max_rows)
    rows = [list(row.values()) for row in table.to_pylist()]
    print_records(table.column_names, rows, "json" if json else "csv" if csv else "table")


@app.command
def steer(
    run: RunPath,
    *,
    feature: Annotated[int, Parameter(help="Feature id.")],
    prompt: Annotated[str, Parameter(help="Text to continue.")],
    strength: Annotated[
        float,
        Parameter(
            help="add: share of the median activation norm (0.1 to 0.5); clamp: multiple "
            "of the feature's largest activation."
        ),
    ] = 0.4,
    mode: Annotated[str, Parameter(help="add, clamp or ablate.")] = "add",
    tokens: Annotated[int, Parameter(help="Tokens to write.")] = 40,
    allow_mismatch: Annotated[
        bool, Parameter(help="Steer a model that the dictionary was not trained on.", negative="")
    ] = False,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Continue a prompt with and without a feature, side by side.

    Example: saeql steer runs/demo --feature 123 --strength 0.4 --prompt "I think that"
    """  # fmt: skip
    from .output import print_steering
    from .run import Run
    from .steer import Edit

    steerer = Run.open(run).steerer(allow_mismatch=allow_mismatch)
    edits = [Edit(feature, mode, strength)]
    steered = steerer.generate(prompt, edits, max_new_tokens=tokens)
    baseline = steerer.generate(prompt, [], max_new_tokens=tokens)
    print_steering(edits[0], prompt, baseline, steered, as_json=json)


@app.command(name="import")
def import_(
    source: Annotated[str, Parameter(help="Folder or file of another library, or a hub repository.")],
    out: Annotated[Path, Parameter(help="Dictionary folder to write.")],
    *,
    format: Annotated[
        str | None,
        Parameter(
            help="saelens, sparsify, dictionary_learning, gemma_scope, gemma_scope_2, "
            "openai, llama_scope or llamascopium; unset: the files decide."
        ),
    ] = None,
    revision: Annotated[str | None, Parameter(help="Revision of a hub repository.")] = None,
) -> None:
    """Turn a dictionary of another library into one of ours; docs/formats.md says what is kept.

    Example: saeql import path/to/sparsify/layers.5 imported --format sparsify
    """  # fmt: skip
    from .exchange import import_dictionary

    print(import_dictionary(source, out, format=format, revision=revision))


@app.command
def export(
    source: Annotated[Path, Parameter(help="Run directory or dictionary folder.")],
    out: Annotated[Path, Parameter(help="Folder to write.")],
    *,
    format: Annotated[str, Parameter(help="saelens, sparsify or dictionary_learning.")] = "saelens",
) -> None:
    """Write a dictionary in another library's format.

    Example: saeql export runs/demo exported --format sparsify
    """
    from .exchange import export_dictionary

    print(export_dictionary(source, out, format=format))


@app.command
def hooks(
    model: Annotated[str, Parameter(help="Local folder, hub name, or the embedded default.")],
    pattern: Annotated[str, Parameter(help="Name or glob, such as resid_post.* or layers.*.mlp: list each.")] = "",
    *,
    revision: Annotated[str | None, Parameter(help="Hub revision.")] = None,
    trust_remote_code: Annotated[str, Parameter(help="The model's name again, to run the code it comes with.")] = "",
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """The hook points of a model, with their shapes: what model.hook_point can name. Reads no weights.

    Example: saeql hooks embedded:smollm2-135m-instruct "resid_post.*"
    """
    from dataclasses import asdict

    from .hook_points import list_hook_points
    from .model_config import ModelConfig
    from .output import print_records

    config = ModelConfig(name=model, revision=revision, trust_remote_code=trust_remote_code)
    records = [asdict(line) for line in list_hook_points(config, pattern)]
    print_records(list(records[0]), [list(record.values()) for record in records], "json" if json else "table")


@app.command
def config() -> None:
    """Print every configuration key with its default and meaning, as TOML to start from.

    Example: saeql config > my.toml
    """
    from .config import reference

    print(reference())


def _parse_overrides(tokens: tuple[str, ...]) -> dict[str, str]:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> None:
    """Entry point. What a user can mend ends in one line on stderr and exit code 2, everything else in a traceback."""
    try:
        app(argv)
    except cyclopts.CycloptsError as error:
        sys.exit(_fail(error))
    except KeyboardInterrupt:
        print("saeql: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        # every exception class that saeql defines is a message to its user
        is_ours = type(error).__module__.startswith("saeql.")
        is_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
        is_disk = is_disk or "No space left on device" in str(error)  # libraries that hide the number
        if not is_ours and not is_disk:
            raise
        sys.exit(_fail(error))


def _fail(error: BaseException) -> int:
    print(f"saeql: {_one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
