"""Commands about a whole run: demo, run, plan, config, hooks, submit."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .common import Overrides, RunPath, Text, Truncate, execute, parse_overrides

DEMO_RUN = Path("runs/demo")


def demo(
    *overrides: Overrides,
    out: Annotated[Path, Parameter(help="Run directory to fill, or to go on with.")] = DEMO_RUN,
    text: Text = None,
    report_to: Annotated[str, Parameter(help="none, wandb, trackio or tensorboard.")] = "none",
) -> None:
    """The whole road on SmolLM2-135M-Instruct and Wikipedia pages: harvest, train, index, label, evaluate, steer.

    Example: saeql demo
    """
    from ..config import load_config, with_text
    from ..showcase import print_showcase

    made = execute(
        out, with_text(load_config(None, parse_overrides(overrides)), text or ()), report_to=report_to, resume=True
    )
    print_showcase(made)


def run(
    config: Annotated[Path, Parameter(help="TOML configuration; `saeql config` documents every key.")],
    *overrides: Overrides,
    out: Annotated[Path | None, Parameter(help="Run directory; default: runs/<name of the file>.")] = None,
    text: Text = None,
    resume: Annotated[bool, Parameter(help="Let training go on from its last checkpoint.")] = True,
    truncate: Truncate = False,
    report_to: Annotated[str, Parameter(help="none, wandb, trackio or tensorboard.")] = "none",
) -> None:
    """Run every stage of a configuration that is not finished yet. Any key can be set as --section.key value.

    Example: saeql run my.toml --out runs/wide --dictionary.d_sae 9216 --train.num_steps 3000
    """
    from ..config import load_config, with_text
    from ..showcase import print_showcase

    keys = {**parse_overrides(overrides), **({"model.truncate": "true"} if truncate else {})}
    made = execute(
        out or Path("runs") / config.stem,
        with_text(load_config(config, keys), text or ()),
        report_to=report_to,
        resume=resume,
    )
    print_showcase(made)


def plan(
    *config: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True, help="TOML configuration (none: that of `saeql demo`), --section.key value."
        ),
    ],
    text: Text = None,
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

    from ..config import load_config, with_text
    from ..plan import make_plan
    from ..plan_text import plan_text

    file = config[:1] if config and not config[0].startswith("--") else ()
    made = make_plan(
        with_text(load_config(file[0] if file else None, parse_overrides(config[len(file) :])), text or ()),
        gpu_name=gpu,
        nodes=nodes,
        gpus_per_node=gpus_per_node or (8 if nodes > 1 else 1),
    )
    print(dumps(made.to_dict(), indent=2) if json else plan_text(made))
    if strict and made.warnings:
        sys.exit(1)


def config() -> None:
    """Print every configuration key with its default and meaning, as TOML to start from.

    Example: saeql config > my.toml
    """
    from ..config import reference

    print(reference())


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

    from ..hook_points import list_hook_points
    from ..model_config import ModelConfig
    from ..output import print_records

    config = ModelConfig(name=model, revision=revision, trust_remote_code=trust_remote_code)
    records = [asdict(line) for line in list_hook_points(config, pattern)]
    print_records(list(records[0]), [list(record.values()) for record in records], "json" if json else "table")


def submit(
    run: RunPath,
    *,
    nodes: Annotated[int, Parameter(help="Nodes.")] = 1,
    gpus_per_node: Annotated[int | None, Parameter(help="GPUs of a node, a rank each; unset: none.")] = None,
    ranks_per_node: Annotated[int | None, Parameter(help="Ranks of a node where there are no GPUs.")] = None,
    minutes: Annotated[int, Parameter(help="Time of one job; a training that needs more is queued again.")] = 240,
    partition: Annotated[str | None, Parameter(help="SLURM partition.")] = None,
    cluster: Annotated[str, Parameter(help="slurm, or local to try it on this machine.")] = "slurm",
    reshard: Annotated[bool, Parameter(help="Like saeql train --reshard.", negative="")] = False,
    sweep: Annotated[bool, Parameter(help="Like saeql train --sweep.", negative="")] = False,
) -> None:
    """Queue the training of a harvested run on SLURM with submitit; its logs are in RUN.jobs (docs/cluster.md).

    Example: saeql submit runs/wide --nodes 8 --gpus-per-node 8 --minutes 240 --partition gpu
    """  # fmt: skip
    from ..run import Run
    from ..submit import submit_training

    job = submit_training(
        Run.open(run).path, cluster=cluster, nodes=nodes, gpus_per_node=gpus_per_node, minutes=minutes,
        ranks_per_node=ranks_per_node or gpus_per_node or 1, partition=partition,
        flags=(*(["--reshard"] if reshard else []), *(["--sweep"] if sweep else [])),
    )  # fmt: skip
    print(f"job {job.job_id}, logs in {job.paths.folder}")
