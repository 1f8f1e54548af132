"""A sweep: many dictionaries learn from one harvest, and one report shows which l0 to take.

`[sweep]` names what varies; every combination is one dictionary, all trained on the same stream in one pass, each
measured on test documents. The report is a Pareto plot (PNG, and a page) and an advice with its reason.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from saeql.sae.architectures import architecture
from saeql.sae.comm import ALONE, Comm
from saeql.sae.config import ConfigError, DictionaryConfig
from saeql.sae.files import load_dictionary

from .atomic import write_whole
from .dictionaries import SWEEP_FOLDER, DictionarySpec, specify
from .pareto import advise, write_report
from .stopping import leave_if_asked
from .train import train_dictionaries
from .verify import recorded

if TYPE_CHECKING:
    from .config import RunConfig
    from .run import Run


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What varies between the dictionaries of `saeql train RUN --sweep`; an empty list keeps [dictionary]'s value."""

    architectures: tuple[str, ...] = ()
    """Architectures to train."""
    ks: tuple[int, ...] = ()
    """Values of k, for topk, batchtopk and matryoshka."""
    sparsity_coefficients: tuple[float, ...] = ()
    """Weights of the penalty, for relu and gated."""
    target_l0s: tuple[float, ...] = ()
    """Wanted l0, for jumprelu."""
    d_saes: tuple[int, ...] = ()
    """Numbers of latents."""
    seeds: tuple[int, ...] = ()
    """Seeds of initialisation."""
    hook_points: tuple[str, ...] = ()
    """Hook points to read, each harvested already (model.hook_point, model.more_hook_points)."""


def expand(config: "RunConfig") -> list[DictionarySpec]:
    """Every combination of the sweep. Raises ConfigError where one does not hold together or nothing varies."""
    specs = combinations(config)
    if len(specs) < 2:
        raise ConfigError("[sweep] names nothing that varies: give it at least two values of one key")
    return specs


def combinations(run: "RunConfig") -> list[DictionarySpec]:
    """Every combination of the sweep; none where [sweep] is empty. Raises ConfigError where one does not hold."""
    config, sweep = run.dictionary, run.sweep
    if sweep == SweepConfig():
        return []
    specs = []
    for kind in sweep.architectures or (config.architecture,):
        architecture(kind)
        for d_sae, level, seed, place in product(
            sweep.d_saes or (config.d_sae,),
            _levels(kind, config, sweep),
            sweep.seeds or (run.seed,),
            sweep.hook_points or ("",),
        ):
            varied = replace(config, architecture=kind, d_sae=d_sae, **level, reads=(place,) if place else config.reads)
            level_name = "".join(f"_{name[:1]}{value:g}" for name, value in level.items())
            name = f"{kind}_{d_sae}{level_name}"
            name += f"_seed{seed}" if len(sweep.seeds) > 1 else ""
            name += f"_{place}" if len(sweep.hook_points) > 1 else ""
            specs.append(specify(varied, run.model, seed, name))
    return specs


def _levels(kind: str, config: DictionaryConfig, sweep: SweepConfig) -> list[dict[str, Any]]:
    """The settings that move l0 for one architecture."""
    if kind in ("relu", "gated"):
        default = config.sparsity_coefficient or architecture(kind).default_sparsity_coefficient
        return [{"sparsity_coefficient": v} for v in sweep.sparsity_coefficients or (default,)]
    if kind == "jumprelu":
        targets = sweep.target_l0s or ((config.target_l0,) if config.target_l0 else (float(config.k),))
        return [{"target_l0": v} for v in targets]
    return [{"k": v} for v in sweep.ks or (config.k,)]


def run_sweep(
    run: "Run", *, resume: bool = True, report_to: str = "none", comm: Comm = ALONE, reshard: bool = False
) -> list[dict[str, Any]]:
    """Train every dictionary of the sweep on one stream, measure each, and write the report into `<run>/sweep/`.

    Returns one row a dictionary; of several ranks only the first measures, the others get none.
    Raises RunError before the harvest, ConfigError for a sweep that cannot be.
    """
    folder, specs = run.path / SWEEP_FOLDER, expand(run.config)
    with run.locked(comm), recorded(run.path, "sweep") if comm.is_first else nullcontext():
        comm.on_first(lambda: folder.mkdir(exist_ok=True))
        started = time.monotonic()
        step_seconds = train_dictionaries(
            run, specs, folder, resume=resume, report_to=report_to, comm=comm, reshard=reshard
        )
        seconds = time.monotonic() - started
        if not comm.is_first:
            return []
        leave_if_asked()
        evaluator, rows = run.evaluator(), []
        for spec in specs:
            metrics = evaluator.metrics(load_dictionary(folder / "dictionaries" / spec.name), spec.places)
            rows.append(
                {
                    "dictionary": spec.name,
                    "architecture": spec.config.architecture,
                    "d_sae": spec.config.d_sae,
                    "hook_point": " + ".join(spec.reads),
                    "seed": spec.seed,
                    "train_seconds": round(step_seconds[spec.name], 2),
                    "step_ms": round(1e3 * step_seconds[spec.name] / run.config.train.num_steps, 2),
                    **{m["metric"]: m["value"] for m in metrics},
                    **{
                        f"{m['metric']}_{end}": m[end] for m in metrics for end in ("low", "high") if m[end] is not None
                    },
                }
            )
        harvest_seconds = run.finished().get("harvest", {}).get("seconds")
        summary = {
            "harvest_seconds": harvest_seconds,
            "train_seconds": round(seconds, 1),
            "num_dictionaries": len(rows),
            "advice": advise(rows),
            "dictionaries": rows,
        }
        write_whole(folder / "sweep.json", json.dumps(summary, indent=2) + "\n")
        write_report(folder, summary)
    return rows
