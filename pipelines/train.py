"""shards, or the model itself -> dictionary folders: one or many dictionaries, in one process or in ranks."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saeql.kernels.launch import fast_matmul_dtype
from saeql.sae.comm import ALONE, Comm, CommError
from saeql.sae.config import to_dict
from saeql.sae.files import save_dictionary
from saeql.sae.rank_place import rank_place
from saeql.sae.trainer import Trainer

from .atomic import write_whole
from .dictionaries import DictionarySpec, start_dictionary
from .fixed_dictionaries import fit_fixed
from .harvest import HarvestInfo, module_names
from .models import load_skeleton
from .progress import progress
from .ranks import rank_device
from .stopping import asked, deferred, stopped
from .tracking import MetricsLog
from .training_stream import belongs_to, training_stream

if TYPE_CHECKING:
    from .run import Run

#: In a run while its training stands still because it was asked to stop: torchrun does not pass on the exit code.
STOPPED_FILE = "stopped.json"


def train_dictionaries(
    run: "Run",
    specs: Sequence[DictionarySpec],
    folder: Path,
    *,
    resume: bool = True,
    report_to: str = "none",
    comm: Comm = ALONE,
    reshard: bool = False,
) -> dict[str, float]:
    """Train dictionaries on one stream into `folder`: checkpoints, metrics.jsonl, `dictionaries/<name>/`.

    Returns the seconds that each one's steps took. All ranks of `comm` call it; the first writes what is written once,
    and they part at the end. `reshard` lets a resume go on with another number of ranks.
    Raises Stopped, after a checkpoint, where a rank was asked to stop; CommError where ranks have not joined.
    """
    train, info = run.config.train, run.harvest_info
    if (comm.size, comm.feature_size) != (rank_place().size, train.feature_shards):
        raise CommError(
            f"{rank_place().size} ranks were started with train.feature_shards {train.feature_shards}, and "
            f"{comm.size} have joined: pass comm, as saeql.pipelines.ranks.joined gives it"
        )
    device = rank_device(run.config.model.device)
    if comm.is_first:
        (run.path / STOPPED_FILE).unlink(missing_ok=True)
    needed = {hook_point for spec in specs for hook_point in (*spec.reads, *spec.writes)}
    widths = {name: width for name, width in info.widths.items() if name in needed}
    with deferred(), ExitStack() as held:
        log, advance = _telling(run, folder, report_to, held) if comm.is_first else (None, lambda steps: None)
        source = held.enter_context(
            training_stream(
                run.config, run.activations, info, widths, device, run.reading_model,
                rank=comm.data_rank, num_ranks=comm.data_size, should_stop=asked,
            )
        )  # fmt: skip
        trainer = Trainer(
            train,
            {
                spec.name: start_dictionary(spec, _width(info, spec.reads), _width(info, spec.writes), comm)
                for spec in specs
            },
            source,
            places={spec.name: spec.places for spec in specs},
            pretrained=[spec.name for spec in specs if spec.config.start_from],
            start_seeds={spec.name: spec.seed for spec in specs},
            folder=folder / "checkpoints",
            on_log=log,
            on_step=advance,
            matmul_dtype=matmul_dtype(train.matmul_dtype, device),
            comm=comm,
            reshard=reshard,
            device=device,
            belongs_to={**belongs_to(run.config, info, widths), **_dictionaries(specs)},
            should_stop=asked,
        )
        if not (resume and trainer.resume()):  # what another start left would be taken for this one's by a later resume
            comm.on_first(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))
        advance(trainer.step)
        if log:
            log.keep_until(trainer.step)
        for change in trainer.resharded if comm.is_first else ():
            print(f"saeql: no longer bit-exact since {change}", file=sys.stderr)
        trainer.fit()
        if not trainer.stopped:
            fit_fixed(run, trainer, specs, folder, device, resume=resume)
        whole = {} if trainer.stopped else trainer.finish()
        if trainer.stopped and comm.is_first:  # before any rank ends: a launcher then ends the others
            where = {"step": trainer.step, "of": train.num_steps, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            write_whole(run.path / STOPPED_FILE, json.dumps(where) + "\n")
        comm.close()
    if trainer.stopped:
        raise stopped(f" at step {trainer.step} of {train.num_steps}")
    for spec in specs if whole else ():
        dictionary = whole[spec.name]
        dictionary.metadata = _metadata(run, spec, info)
        if trainer.resharded:
            dictionary.metadata["saeql"]["resharded"] = trainer.resharded
        save_dictionary(dictionary, folder / "dictionaries" / spec.name)
    return {learner.name: learner.seconds for learner in trainer.learners}


def _telling(run: "Run", folder: Path, report_to: str, held: ExitStack) -> tuple[MetricsLog, Callable[[int], None]]:
    """Where lines of metrics go, and what moves the progress bar by some steps."""
    train, settings = run.config.train, {"name": run.path.name, **to_dict(run.config)}
    bar = held.enter_context(progress("train", train.num_steps * train.batch_tokens, "tok"))
    log = MetricsLog(folder / "metrics.jsonl", report_to, run_name=run.path.name, config=settings)
    return held.enter_context(log), lambda steps: bar(steps * train.batch_tokens)


def _dictionaries(specs: Sequence[DictionarySpec]) -> dict[str, Any]:
    """What the weights depend on besides [train] and the rows: a resume refuses another value."""
    found: dict[str, Any] = {"dictionaries": [spec.name for spec in specs]}
    for spec in specs:
        found |= {f"{spec.name}.{key}": value for key, value in to_dict(spec.config).items()}
        found |= {f"{spec.name}.seed": spec.seed}
    return found


def _metadata(run: "Run", spec: DictionarySpec, info: HarvestInfo) -> dict[str, Any]:
    """Metadata of a dictionary: SAELens's keys, then ours."""
    config = run.config
    # the model's weights are not needed to train, and are not loaded for its names
    names = info.module_names or module_names(load_skeleton(config.model), list(info.widths))
    metadata = {
        "model_name": info.identity.model_name,
        "hook_name": " + ".join(names[name][0] for name in spec.reads),
        "hf_hook_name": " + ".join(names[name][1] for name in spec.reads),
        "hook_head_index": None,
        "context_size": config.harvest.context_tokens,
        "prepend_bos": config.corpus.bos != "never",
        "dataset_path": config.corpus.title,
    }
    if spec.writes != spec.reads:
        target = names[spec.writes[0]]
        metadata |= {"hook_name_out": target[0], "hf_hook_name_out": target[1]}
    ours = {
        "identity": asdict(info.identity.at(spec.reads)),
        "writes": {name: info.widths[name] for name in spec.writes},
        "median_norms": {name: info.median_norms[name] for name in spec.writes},
        "massive_norm_multiple": info.massive_norm_multiple,
        "text": {key: getattr(config.corpus, key) for key in ("bos", "separator", "pack")},
        "seed": spec.seed,
    }
    if config.model.randomise != "none":
        ours["randomised"] = config.model.randomise
    return {**metadata, "saeql": ours}


def _width(info: HarvestInfo, hook_points: Sequence[str]) -> int:
    return sum(info.widths[name] for name in hook_points)


def matmul_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """What `train.matmul_dtype` means on a device; None: that of the weights."""
    return fast_matmul_dtype(device) if name == "auto" else getattr(torch, name)
