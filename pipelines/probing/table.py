"""Probes as tables for people and as plain data for programs; probes that show nothing are struck out."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..output import console
from .plans import PERMUTED, TOSSED
from .scores import Interval
from .suite import DENSE, RANDOMISED, TABLE, ProbeResult, TaskResult, named

#: Probes of the overview of several tasks, beside which their AUROC stands.
OVERVIEW = (DENSE, "1 latent", "16 latents", "1 channel", "1 random latent", TABLE, RANDOMISED)
_STRUCK = "selectivity's interval does not lie above 0: struck out, the probe may only memorise"


def result_dict(result: TaskResult) -> dict[str, Any]:
    """A task's result for JSON: intervals as value, low and high, null where they are not known."""
    probes = [{**asdict(p), "columns": list(p.columns), "struck_out": p.is_struck} for p in result.probes]
    return _finite({**asdict(result), "probes": probes, "twins": _twin_dicts(result)})


def _twin_dicts(result: TaskResult) -> dict[str, Any]:
    return {
        name: None if found is None else {"auroc": found[0], "gap": asdict(found[1])}
        for name, found in result.twins.items()
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def print_task(result: TaskResult) -> None:
    """One task: a row a probe, then the twins."""
    out = console()
    (yes, no), (train, _) = result.num_cases["test"], result.num_cases["train"]
    out.print(
        Text(f"{result.task} at {result.hook_point}", "bold").append(
            f"   learned on {train} + {train} {_cases(result)}, scored on {yes} with it and {no} without in "
            f"{result.num_documents} test documents",
            "not bold",
        )
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("probe", "left"), ("AUROC", "right"), ("95 % interval", "left"), ("minus dense", "right"),
        ("95 % interval", "left"), ("accuracy", "right"), ("control", "right"), ("selectivity", "right"),
        ("95 % interval", "left"), ("compression", "right"), ("control", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
    is_plain = not out.is_terminal
    for probe in result.probes:
        style = "strike dim" if probe.is_struck else ""
        name = probe.probe + (f" ({probe.columns[0]})" if len(probe.columns) == 1 else "")
        cells = [
            f"~~{name}~~" if is_plain and probe.is_struck else name,
            *_pair(probe.auroc),
            *(_pair(probe.against_dense, signed=True) if probe.against_dense else ("", "")),
            f"{probe.accuracy.value:.3f}",
            f"{probe.control_accuracy:.3f}",
            *_pair(probe.selectivity, signed=True),
            f"{probe.compression:.2f}",
            f"{probe.control_compression:.2f}",
        ]
        table.add_row(*(Text(cell, style) for cell in cells))
    out.print(table)
    for line in _twin_lines(result):
        out.print(Text(line, "dim"))


def _cases(result: TaskResult) -> str:
    return "documents" if result.level == "document" else "tokens"


def _pair(found: Interval, *, signed: bool = False) -> tuple[str, str]:
    if math.isnan(found.value):
        return "", "not known"
    form = "+.3f" if signed else ".3f"
    if math.isnan(found.low):
        return f"{found.value:{form}}", "one document"
    return f"{found.value:{form}}", f"{found.low:{form}} to {found.high:{form}}"


def _twin_lines(result: TaskResult) -> list[str]:
    words = {
        PERMUTED: f"the same labels on other {result.unit}s",
        TOSSED: f"labels tossed for each {result.unit}",
    }
    lines = []
    for name, found in result.twins.items():
        if found is None:
            lines.append(f"{words[name]}: too few cases in a split to be measured")
            continue
        value, low, high = found[0], *(f"{x:+.3f}" for x in (found[1].low, found[1].high))
        lines.append(
            f"{words[name]}: AUROC {value:.3f} of {DENSE}; the task is {found[1].value:+.3f} above ({low} to {high})"
        )
    return lines


def print_overview(results: Sequence[TaskResult]) -> None:
    """Several tasks: a row a task, AUROC of the main probes, what its twin gives, and the selectivity of the first."""
    out = console()
    shown = [name for name in OVERVIEW if any(r.of(name) for r in results)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    for name in ("yes", "no", "documents", *shown, "twin", "selectivity"):
        table.add_column(name, justify="right")
    table.add_column("95 % interval")
    is_plain = not out.is_terminal
    for result in results:
        if result.not_measured:
            continue
        yes, no = result.num_cases["test"]
        cells = [_auroc(result.of(name), is_plain) for name in shown]
        twin, dense = result.twins.get(PERMUTED), result.of(DENSE)
        assert dense is not None
        table.add_row(
            Text(result.task),
            *map(Text, (str(yes), str(no), str(result.num_documents))),
            *cells,
            Text("" if twin is None else f"{twin[0]:.3f}"),
            *map(Text, _pair(dense.selectivity, signed=True)),
        )
    out.print(Text("AUROC on test documents", "bold"))
    out.print(table)
    for result in results:
        if result.not_measured:
            out.print(Text(f"not measured: {result.not_measured}", "dim"))
    for line in summary(results):
        out.print(Text(line))


def _auroc(probe: ProbeResult | None, is_plain: bool) -> Text:
    if probe is None:
        return Text("")
    value = f"{probe.auroc.value:.3f}"
    if not probe.is_struck:
        return Text(value)
    return Text(f"~~{value}~~" if is_plain else value, "strike dim")


def summary(results: Sequence[TaskResult]) -> list[str]:
    """What the tasks together say of single latents, with what was asked of them."""
    measured = [r for r in results if not r.not_measured]
    lines = []
    found = planted_medians(measured)
    if found is not None:
        latent, dense, num = found
        lines.append(
            f"median AUROC of 1 latent on {num} planted tasks: {latent:.3f}; of {DENSE}: {dense:.3f} "
            f"({latent - dense:+.3f}; asked: at least -0.10)"
        )
    helped = [
        r.task for r in measured for p in r.probes
        if p.probe in _LATENTS and p.against_dense is not None and p.against_dense.low > 0
    ]  # fmt: skip
    if any(r.of("1 latent") for r in measured):
        names = ", ".join(dict.fromkeys(helped)) or "no task"
        lines.append(f"latents do better than {DENSE} of the activations, interval above 0, on: {names}")
    if any(p.is_struck for r in measured for p in r.probes):
        lines.append(f"~~...~~ or a line through it: {_STRUCK}")
    return lines


_LATENTS = tuple(named(k, "latent") for k in (1, 5, 16))


def planted_medians(results: Sequence[TaskResult]) -> tuple[float, float, int] | None:
    """Median AUROC of the best single latent and of logistic regression over planted tasks, and their number."""
    pairs = [(r.of("1 latent"), r.of(DENSE)) for r in results if r.planted]
    values = [(a.auroc.value, b.auroc.value) for a, b in pairs if a is not None and b is not None]
    if not values:
        return None
    latent, dense = np.median(values, axis=0)
    return float(latent), float(dense), len(values)
