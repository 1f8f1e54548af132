"""A sweep: many dictionaries learn from one harvest, and one report shows which l0 to take.

`[sweep]` names what varies; every combination is one dictionary, all trained on the same stream in one pass, each
measured on test documents. The report is a Pareto plot (PNG, and a page) and an advice with its reason.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeql.sae.architectures import architecture
from saeql.sae.config import ConfigError, DictionaryConfig
from saeql.sae.files import load_dictionary

from .atomic import write_whole
from .dictionaries import DictionarySpec, specify

if TYPE_CHECKING:
    from .config import RunConfig
    from .run import Run

SWEEP_FOLDER = "sweep"
#: Share of the best fvu improvement per octave of l0 below which more l0 is not worth it.
KNEE_SHARE = 0.25


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
        return [{"sparsity_coefficient": v} for v in sweep.sparsity_coefficients or (config.sparsity_coefficient,)]
    if kind == "jumprelu":
        targets = sweep.target_l0s or ((config.target_l0,) if config.target_l0 else (float(config.k),))
        return [{"target_l0": v} for v in targets]
    return [{"k": v} for v in sweep.ks or (config.k,)]


def run_sweep(run: "Run", *, resume: bool = True, report_to: str = "none") -> list[dict[str, Any]]:
    """Train every dictionary of the sweep on one stream, measure each, and write the report into `<run>/sweep/`.

    Returns one row a dictionary. Raises RunError before the harvest, ConfigError for a sweep that cannot be.
    """
    folder, specs = run.path / SWEEP_FOLDER, expand(run.config)
    folder.mkdir(exist_ok=True)
    with run.locked():
        started = time.monotonic()
        run.train_together(specs, folder, resume=resume, report_to=report_to)
        seconds = time.monotonic() - started
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
        write_pareto(folder, summary)
    return rows


def pareto(rows: Sequence[dict[str, Any]], metric: str = "fvu") -> list[dict[str, Any]]:
    """Rows that no other row beats in both l0 and `metric`, by rising l0."""
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["l0"], r[metric])):
        if not front or row[metric] < front[-1][metric]:
            front.append(row)
    return front


def advise(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The dictionary to take and why: the last step along the Pareto front of fvu against log2 l0 that still pays.

    A step pays where fvu falls by at least a quarter (`KNEE_SHARE`) of the steepest fall per octave of l0. Dictionaries
    with more than a tenth of dead latents are passed over where there are others.
    """
    from math import log2

    alive = [r for r in rows if r["dead_share"] <= 0.1 and r["l0"] > 0] or [r for r in rows if r["l0"] > 0]
    front = pareto(alive)
    if not front:
        return {"dictionary": "", "reason": "no dictionary has an active latent"}
    if len(front) == 1:
        best = front[0]
        return {"dictionary": best["dictionary"], "reason": "no other dictionary of the sweep is better in l0 or fvu"}
    slopes = [(before["fvu"] - after["fvu"]) / log2(after["l0"] / before["l0"]) for before, after in pairwise(front)]
    chosen = max(n for n, slope in enumerate(slopes, 1) if slope >= KNEE_SHARE * max(slopes))
    best = front[chosen]
    reason = (
        f"up to l0 = {best['l0']:.1f} each doubling of l0 lowers fvu by at least {KNEE_SHARE * max(slopes):.3f}, "
        f"a quarter of the steepest fall on the front; fvu {best['fvu']:.3f}"
    )
    if chosen == len(front) - 1:
        reason += "; it is the largest l0 tried, and a larger one may pay too"
    return {"dictionary": best["dictionary"], "reason": reason}


def write_pareto(folder: Path, summary: dict[str, Any]) -> None:
    """`sweep.png`, and `sweep.html` with the same plot and a table. Raises ConfigError without matplotlib."""
    from base64 import b64encode

    from jinja2 import Environment, PackageLoader

    png = _plot(summary["dictionaries"], summary["advice"]["dictionary"])
    write_whole(folder / "sweep.png", png)
    environment = Environment(loader=PackageLoader("saeql.pipelines", "templates"), autoescape=True)
    columns = ["dictionary", "hook_point", "l0", "fvu", "dead_share", "ce_increase", "ce_recovered"]
    page = environment.get_template("sweep.html").render(
        **summary, columns=columns, front={r["dictionary"] for r in pareto(summary["dictionaries"])},
        plot=b64encode(png).decode(),
    )  # fmt: skip
    write_whole(folder / "sweep.html", page)


def _plot(rows: list[dict[str, Any]], chosen: str) -> bytes:
    """PNG of fvu, cross-entropy increase and dead share against l0, one mark an architecture and width."""
    from io import BytesIO

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the sweep's plot needs matplotlib: pip install 'saeql[plots]'") from None
    titles = {"fvu": "variance unexplained", "ce_increase": "cross-entropy increase (nats)", "dead_share": "dead share"}
    panels = [(metric, title) for metric, title in titles.items() if any(metric in r for r in rows)]
    figure = Figure(figsize=(5 * len(panels), 4), dpi=120, layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if metric in row and row["l0"] > 0:
                groups.setdefault(f"{row['architecture']} {row['d_sae']} {row['hook_point']}", []).append(row)
        for name, group in groups.items():
            group.sort(key=lambda r: r["l0"])
            axis.plot([r["l0"] for r in group], [r[metric] for r in group], "o-", label=name, markersize=4)
        for row in rows:
            if row["dictionary"] == chosen and metric in row:
                axis.plot(row["l0"], row[metric], "o", markersize=12, markerfacecolor="none", color="black")
        axis.set(xscale="log", xlabel="l0", ylabel=title)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
