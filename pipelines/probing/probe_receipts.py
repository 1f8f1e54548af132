"""What probes showed, as receipts of the run's dictionary, kept in its evidence and its store."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.compute as pc

from saeql.store.feature_store import FeatureStore

from ..provenance import more_evidence
from ..receipts.receipt import FAILED, PASSED, REPORTED, Receipt, judged, receipts_table
from ..verify import recorded
from .scores import Interval
from .suite import DENSE, SPARSE, TABLE, ProbeResult, TaskResult, named
from .table import planted_medians

if TYPE_CHECKING:
    from ..run import Run

#: Part files of the evidence table `receipts` begin with it.
PART = "probing-"
#: Least median AUROC of single latents on the planted tasks, against logistic regression on the activations.
SINGLE_LATENT_MARGIN = -0.10
_LATENTS = "C12 latents against dense"


class ProbedTask(NamedTuple):
    """What tells one probed task from another."""

    task: str
    level: str
    hook_point: str


def task_receipts(result: TaskResult) -> list[Receipt]:
    """C10, C11 and C12 of one task, all about the whole dictionary."""
    yes, no = result.num_cases["test"]
    where = {
        "task": result.task,
        "level": result.level,
        "hook_point": result.hook_point,
        "unit": result.unit,
        "cases": {split: list(counts) for split, counts in result.num_cases.items()},
        "documents": result.num_documents,
    }
    found = [_selectivity(probe, yes + no, where) for probe in result.probes]
    for name, twin in result.twins.items():
        if twin is not None:
            found.append(
                _receipt(f"C11 {name} twin", twin[1], yes + no, {**where, "probe": DENSE, "twin_auroc": twin[0]})
            )
    for k in SPARSE:
        probe = result.of(named(k, "latent"))
        if probe is not None and probe.against_dense is not None:
            others = {name: _value(result.of(name)) for name in (named(k, "channel"), named(k, "random latent"), TABLE)}
            found.append(
                _receipt(
                    _LATENTS,
                    probe.against_dense,
                    yes + no,
                    {**where, "k": k, "latents": list(probe.columns), "auroc": probe.auroc.value, **others},
                )
            )
    return found


def _selectivity(probe: ProbeResult, n: int, where: dict[str, Any]) -> Receipt:
    return _receipt(
        "C10 selectivity",
        probe.selectivity,
        n,
        {
            **where,
            "probe": probe.probe,
            "accuracy": probe.accuracy.value,
            "control_accuracy": probe.control_accuracy,
            "auroc": asdict(probe.auroc),
            "compression": probe.compression,
            "control_compression": probe.control_compression,
            "columns": list(probe.columns),
        },
    )


def _value(probe: ProbeResult | None) -> float | None:
    return None if probe is None else probe.auroc.value


def _receipt(control: str, found: Interval, n: int, detail: dict[str, Any]) -> Receipt:
    """Passed where the whole interval lies above 0."""
    known = found.low == found.low
    return Receipt(
        control=control,
        value=found.value if found.value == found.value else None,
        verdict=PASSED if known and found.low > 0 else FAILED,
        threshold=0.0,
        n=n,
        low=found.low if known else None,
        high=found.high if known else None,
        detail=detail,
    )


def collection_receipts(results: Sequence[TaskResult]) -> list[Receipt]:
    """C12 of the planted tasks together: single latents against logistic regression, and on uses of one word."""
    medians = planted_medians(results)
    if medians is None:
        return []
    latent, dense, num = medians
    found = [
        Receipt(
            control="C12 one latent on planted tasks",
            value=latent - dense,
            verdict=judged(latent - dense, SINGLE_LATENT_MARGIN),
            threshold=SINGLE_LATENT_MARGIN,
            n=num,
            detail={"median_auroc": latent, "median_auroc_dense": dense},
        )
    ]
    for result in results:
        one, table = result.of("1 latent"), result.of(TABLE)
        if result.planted and result.unit != "word type" and one is not None and table is not None:
            above = one.auroc.value - table.auroc.value
            detail = {"task": result.task, "auroc": one.auroc.value, "auroc_token_table": table.auroc.value}
            found.append(
                Receipt(
                    control="C12 one latent above the token table",
                    value=above,
                    verdict=PASSED if above > 0 else FAILED,
                    threshold=0.0,
                    n=sum(result.num_cases["test"]),
                    detail=detail,
                )
            )
    skipped = [r.task for r in results if r.not_measured]
    if skipped:
        why = {"not_measured": {r.task: r.not_measured for r in results if r.not_measured}}
        found.append(
            Receipt(control="C12 tasks not measured", value=len(skipped), verdict=REPORTED, n=len(results), detail=why)
        )
    return found


def save_receipts(run: "Run", results: Sequence[TaskResult]) -> bool:
    """Keep the receipts of these tasks in place of the same tasks' old ones, and bring a built store up to date.

    To be called within `run.locked()`. Returns whether the store holds them.
    """
    is_built = "store" in run.finished()
    with recorded(run.path, "probe"):
        write_receipts(run, results)
        if is_built:
            FeatureStore.sync(run.path / "features.duckdb", [run.evidence, *more_evidence(run.path)])
    return is_built


def write_receipts(run: "Run", results: Sequence[TaskResult]) -> None:
    """Write a part of the evidence table `receipts` for every task, and one for all of them together."""
    name, evidence = run.spec.name, run.evidence
    for result in results:
        if not result.not_measured:
            table = receipts_table(name, task_receipts(result))
            evidence.write("receipts", table, part=PART + _slug(f"{result.hook_point}-{result.task}"))
    if len(results) > 1 and (together := collection_receipts(results)):
        evidence.write("receipts", receipts_table(name, together), part=PART + _slug(results[0].hook_point))


def single_latents(run: "Run") -> dict[ProbedTask, float]:
    """AUROC of the best latent alone in every task that the run's dictionary was probed with; empty before."""
    if not run.evidence.has("receipts"):
        return {}
    wanted = (pc.field("control") == _LATENTS) & (pc.field("dictionary") == run.spec.name)
    found = [json.loads(row) for row in run.evidence.read("receipts").filter(wanted)["detail"].to_pylist()]
    return {ProbedTask(d["task"], d["level"], d["hook_point"]): d["auroc"] for d in found if d["k"] == 1}


def remove_receipts(run: "Run") -> None:
    """Drop what was kept about a dictionary that is about to be another."""
    for old in (run.evidence.folder / "receipts").glob(f"{PART}*.parquet"):
        old.unlink()


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-")
