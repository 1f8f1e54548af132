"""Whole training steps, ours and the peers', interleaved with the encoder's matmul alone."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_ceilings import encoder_gemm, precisions
from bench_clock import Clock, Deadline
from bench_peers import Step, peers
from bench_shapes import Shape, make_rows

from saeql.kernels.launch import fast_matmul_dtype
from saeql.sae.architectures import build
from saeql.sae.config import DictionaryConfig, TrainConfig
from saeql.sae.trainer import Trainer

OURS = "saeql, encoder"


class _NoSource:
    """The benchmark hands rows to the trainer itself."""

    def __init__(self, d_in: int):
        self.widths = {"rows": d_in}

    def batches(self, cursor: object = None):
        return iter(())


def base_precision(device: str) -> str:
    """Of the matmul that everything is a multiple of: the fastest of a card, float32 on a CPU."""
    return list(precisions(device))[-1] if device == "cuda" else "float32"


def gemm_name(device: str) -> str:
    return f"encoder GEMM, {base_precision(device)} (the floor)"


def ours(shape: Shape, dtype: torch.dtype | None) -> Step:
    """The trainer's own step."""
    dictionary = build(DictionaryConfig(d_sae=shape.d_sae, k=shape.k), shape.d_in).to(shape.device)
    config = TrainConfig(num_steps=10**6, batch_tokens=shape.rows)
    trainer = Trainer(config, {"a": dictionary}, _NoSource(shape.d_in), matmul_dtype=dtype)

    def step(x: torch.Tensor) -> None:
        if shape.num_dead:
            trainer.learners[0].idle_tokens[: shape.num_dead] = config.dead_after_tokens
        trainer.train_step(x)

    return step


def _gemm(shape: Shape) -> Step:
    run = encoder_gemm(shape, base_precision(shape.device))
    return lambda x: run()


def makers(device: str) -> dict[str, Callable[[Shape], Step]]:
    """The encoder's matmul, our step with each encoder precision of the device, the peers'."""
    dtypes = dict.fromkeys((None, fast_matmul_dtype(device)))
    names = {f"{OURS} {str(dtype or torch.float32).removeprefix('torch.')}": dtype for dtype in dtypes}
    return {
        gemm_name(device): _gemm,
        **{name: partial(ours, dtype=dtype) for name, dtype in names.items()},
        **peers(device),
    }


def measure(
    shape: Shape, rounds: int, clock: Clock, deadline: Deadline
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every step in interleaved rounds, at least 3 even where time is up; and why others do not run here."""
    pool, timed, left_out = make_rows(4, shape), {}, {}
    for name, make in makers(shape.device).items():
        try:
            step = make(shape)
            for x in pool[:2]:
                step(x)
            timed[name] = step
        except Exception as error:  # a library that is missing or fails here must not end the measurement of the others
            left_out[name] = f"{type(error).__name__}: {error}"[:200]
            print(f"left out: {name} ({left_out[name]})")
    times: dict[str, list[float]] = {name: [] for name in timed}
    for n in range(rounds):
        if n >= 3 and deadline.passed:
            break
        for name, step in timed.items():
            times[name].append(clock.seconds(partial(step, pool[n % len(pool)])))
    return times, left_out


def report(shape: Shape, times: dict[str, list[float]], floor_ms: float) -> list[dict[str, Any]]:
    """Print and return medians as multiples of the encoder's matmul and of the arithmetic floor.

    Files call the first `multiple_of_floor`: they did so before there was another one.
    """
    gemm = statistics.median(times[gemm_name(shape.device)])
    rows = []
    print(f"{'step':42} {'ms':>9} {'x GEMM':>8} {'x arithmetic floor':>19} {'tokens/s':>12}")
    for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        median = statistics.median(values)
        row = {
            "step": name,
            "milliseconds": round(median * 1e3, 2 if shape.device == "cpu" else 4),
            "multiple_of_floor": round(median / gemm, 3),
            "multiple_of_arithmetic_floor": round(median * 1e3 / floor_ms, 3),
            "tokens_per_second": round(shape.rows / median),
        }
        rows.append(row)
        print(
            f"{name:42} {median * 1e3:9.2f} {row['multiple_of_floor']:8.2f} {row['multiple_of_arithmetic_floor']:19.2f}"
            f" {row['tokens_per_second']:12,}"
        )
    return rows


def profile(shape: Shape, file: Path) -> None:
    """Write the profiler's table of one step of ours, with the device's fast encoder, by kernel."""
    pool, step = make_rows(3, shape), ours(shape, fast_matmul_dtype(shape.device))
    for x in pool[:2]:
        step(x)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if shape.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        step(pool[2])
        if shape.device == "cuda":
            torch.cuda.synchronize()
    order = f"self_{'device' if shape.device == 'cuda' else 'cpu'}_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=60)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{shape}\n{table}\n")
