"""Each kernel by itself: is it right on this device, how long does it take, and how near is that to the ceilings."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from bench_cases import Case, Pair, Workload, cases
from bench_ceilings import Ceilings
from bench_clock import Clock, Deadline
from bench_shapes import Shape

from saeql.kernels.launch import HAS_TRITON, INTERPRETED, Backend, backend

ROUNDS = {"cpu": 5, "cuda": 20}
#: Of one kernel on one backend.
LIMIT_SECONDS = {"cpu": 4.0, "cuda": 1.0}


def backends(device: str) -> tuple[Backend, ...]:
    """Those that a device can run."""
    return ("triton", "torch") if HAS_TRITON and (device == "cuda" or INTERPRETED) else ("torch",)


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """What the kernels are timed in: on a CPU the trainer keeps everything but the encoder's product in float32."""
    return (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)


def _label(case: Case, dtype: torch.dtype, name: Backend) -> dict[str, Any]:
    return {"kernel": case.name, "dtype": str(dtype).removeprefix("torch."), "backend": name}


def _excess(pair: Pair) -> tuple[float, dict[str, Any]]:
    """How many times its tolerance an output is off (at most 1 is right), and the numbers behind it."""
    actual, expected = pair.actual.detach().double(), pair.expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"{pair.output}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    worst = float((actual - expected).abs().amax()) if actual.numel() else 0.0
    largest = float(expected.abs().amax()) if expected.numel() else 0.0
    if not math.isfinite(worst):
        raise ValueError(f"{pair.output}: differs by {worst}")
    bound = pair.tolerance * largest
    numbers = {
        "output": pair.output,
        "largest_difference": float(f"{worst:.3g}"),
        "relative": float(f"{worst / largest if largest else worst:.3g}"),
        "tolerance": pair.tolerance,
    }
    return 0.0 if worst == 0 else worst / bound if bound else math.inf, numbers


def check(case: Case, dtype: torch.dtype, name: Backend) -> dict[str, Any]:
    """A kernel against its float64 reference: the output that is worst, or the error where it does not run."""
    label = _label(case, dtype, name)
    try:
        with backend(name):
            outcome = case.call(*case.inputs())
        excess, numbers = max((_excess(pair) for pair in case.compare(outcome)), key=lambda found: found[0])
    except Exception as error:  # whatever a compiler or a card reports: the other kernels are still worth a look
        return label | {"passed": False, "error": f"{type(error).__name__}: {error}"[:300]}
    return label | numbers | {"passed": excess <= 1}


def measure(case: Case, w: Workload, name: Backend, clock: Clock, ceilings: Ceilings) -> dict[str, Any]:
    """Milliseconds and rates of a kernel."""
    device = w.shape.device
    with backend(name):
        inputs = case.inputs()
        seconds = clock.median(lambda: case.call(*inputs), ROUNDS[device], LIMIT_SECONDS[device])
    moved, flops = w.count(case.bytes), w.count(case.flops)
    found = {
        **_label(case, w.dtype, name),
        "milliseconds": round(seconds * 1e3, 4),
        "gigabytes": round(moved / 1e9, 4),
        "bytes": case.bytes,
        "gigabytes_per_second": round(moved / seconds / 1e9, 1),
        "share_of_copy": round(moved / seconds / 1e9 / ceilings.copy, 3),
    }
    if flops:
        precision = "bfloat16" if "bfloat16" in f"{case.name} {w.dtype}" else "float32"
        rate = flops / seconds / 1e12
        found["tflops"] = round(rate, 4)
        if precision in ceilings.square:
            found["share_of_matmul"] = round(rate / ceilings.matmul(precision), 3)
    return found


def check_lines(shape: Shape, types: tuple[torch.dtype, ...], deadline: Deadline) -> Iterator[dict[str, Any]]:
    """Every kernel, in every dtype and on every backend of the device; stops when time is up."""
    for dtype in types:
        w = Workload(shape, dtype)
        for case in cases(w):
            for name in backends(shape.device):
                if deadline.passed:
                    return
                yield {"shape": str(shape)} | check(case, dtype, name)


def time_lines(shape: Shape, clock: Clock, ceilings: Ceilings, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """The same, timed; a kernel that does not run is named with its error."""
    for dtype in dtypes(shape.device):
        w = Workload(shape, dtype)
        for case in cases(w):
            for name in backends(shape.device):
                if deadline.passed:
                    return
                try:
                    yield measure(case, w, name, clock, ceilings)
                except Exception as error:  # as in `check`
                    yield {**_label(case, dtype, name), "error": f"{type(error).__name__}: {error}"[:300]}


def print_check(line: dict[str, Any]) -> None:
    """One line of a check."""
    verdict = "ok   " if line["passed"] else "WRONG"
    head = f"{verdict} {line['kernel']:28} {line['dtype']:9} {line['backend']:7}"
    if "error" in line:
        print(f"{head} {line['error']}")
        return
    print(
        f"{head} worst in {line['output']:13} {line['largest_difference']:.1e} ="
        f" {line['relative']:.1e} of the largest (at most {line['tolerance']:.0e})"
    )


HEADER = (
    f"{'kernel':28} {'dtype':9} {'backend':7} {'ms':>9} {'GB':>8} {'GB/s':>8}"
    f" {'of copy':>8} {'TFLOP/s':>8} {'of matmul':>9}"
)


def print_time(line: dict[str, Any]) -> None:
    """One line of the table under HEADER."""
    head = f"{line['kernel']:28} {line['dtype']:9} {line['backend']:7}"
    if "error" in line:
        print(f"{head} {line['error']}")
        return
    row = f"{head} {line['milliseconds']:9.3f} {line['gigabytes']:8.3f} {line['gigabytes_per_second']:8,.0f}"
    row += f" {line['share_of_copy']:8.0%}"
    if "tflops" in line:
        row += f" {line['tflops']:8.3g}" + (f" {line['share_of_matmul']:9.0%}" if "share_of_matmul" in line else "")
    print(row)
