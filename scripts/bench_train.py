"""Time one training step, ours and the peers', as multiples of the encoder GEMM alone, interleaved in one process.

    python scripts/bench_train.py --rows 1024 --d-in 576 --d-sae 9216 --k 32 --threads 1 --rounds 9 [--dead 0.2 --save]

One thread is timed in process CPU time, which a busy machine disturbs least; more threads in wall time. On CUDA the
steps run on the card, are timed with events, and the measured matmul and copy ceilings are printed too. Rows are sparse
mixtures of directions with a skewed prior, so that latents fire unevenly. `--save` appends the result to
docs/benchmarks/<device>-<date>.json. SAELens, sparsify and dictionary_learning take part where they are installed.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from bench_peers import PACKAGES, PEERS, Shape, Step

from saeql.kernels.launch import fast_matmul_dtype
from saeql.sae.architectures import build
from saeql.sae.config import DictionaryConfig, TrainConfig
from saeql.sae.trainer import Trainer

ROOT = Path(__file__).parent.parent
FLOOR = "encoder GEMM, float32 (the floor)"


class _NoSource:
    """The benchmark hands rows to the trainer itself."""

    def __init__(self, d_in: int):
        self.widths = {"rows": d_in}

    def batches(self, cursor: object = None):
        return iter(())


def make_rows(num: int, shape: Shape) -> list[torch.Tensor]:
    """`num` batches [rows, d_in] with unit variance."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * shape.d_in, shape.d_in, generator=generator), dim=1)
    prior = 1 / torch.arange(1, 4 * shape.d_in + 1) ** 0.7
    batches = []
    for _ in range(num):
        chosen = torch.multinomial(prior, shape.rows * 24, replacement=True, generator=generator).view(shape.rows, 24)
        weight = torch.rand(shape.rows, 24, generator=generator) + 0.5
        x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=weight, mode="sum")
        x += 0.05 * torch.randn(shape.rows, shape.d_in, generator=generator)
        batches.append(((x - x.mean(0)) / x.std()).to(shape.device))
    return batches


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


def steps(shape: Shape) -> dict[str, Step]:
    """The floor, ours with each encoder precision of this device, and the peers that are installed."""
    weight = torch.randn(shape.d_sae, shape.d_in, device=shape.device)
    bias = torch.zeros(shape.d_sae, device=shape.device)
    out = torch.empty(shape.rows, shape.d_sae, device=shape.device)
    found: dict[str, Step] = {FLOOR: lambda x: torch.addmm(bias, x, weight.t(), out=out)}
    for dtype in dict.fromkeys((None, fast_matmul_dtype(shape.device))):
        found[f"saeql, encoder {str(dtype or torch.float32).removeprefix('torch.')}"] = ours(shape, dtype)
    for name, make in PEERS.items():
        try:
            found[name] = make(shape)
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return found


def seconds(step: Step, x: torch.Tensor, threads: int) -> float:
    """Time of one step."""
    if x.is_cuda:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step(x)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    clock = time.process_time if threads == 1 else time.perf_counter
    begin = clock()
    step(x)
    return clock() - begin


def ceilings() -> dict[str, float]:
    """Measured bf16 matmul (TFLOP/s) and copy (TB/s) rates of the card."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(big)
    for _ in range(3):
        _ = a @ a
        target.copy_(big)
    matmul = min(seconds(lambda x: x @ x, a, 1) for _ in range(10))
    copy = min(seconds(lambda x: target.copy_(x), big, 1) for _ in range(10))
    return {"matmul_tflops": 2 * 8192**3 / matmul / 1e12, "copy_tb_per_second": 2 * 2**30 / copy / 1e12}


def describe_device() -> dict[str, Any]:
    """What the numbers were taken on."""
    if torch.cuda.is_available():
        return {"name": torch.cuda.get_device_name().replace(" ", "-"), **ceilings()}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in flags.replace("\n", " ")]
    return {"name": f"cpu-{platform.machine()}", "flags": known}


def measure(shape: Shape, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of every step in interleaved rounds."""
    pool, timed = make_rows(4, shape), steps(shape)
    for step in timed.values():
        for x in pool[:2]:
            step(x)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for n in range(rounds):
        for name, step in timed.items():
            times[name].append(seconds(step, pool[n % len(pool)], threads))
    return times


def report(shape: Shape, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Print and return medians, as multiples of the floor."""
    floor = statistics.median(times[FLOOR])
    rows = []
    for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        median = statistics.median(values)
        rows.append(
            {"step": name, "milliseconds": round(median * 1e3, 2), "multiple_of_floor": round(median / floor, 3)}
        )
        print(f"{name:36} {median * 1e3:8.1f} ms  {median / floor:6.2f} x floor  {shape.rows / median:11,.0f} tokens/s")
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(entry: dict[str, Any], device: str) -> Path:
    """Append to docs/benchmarks/<device>-<date>.json."""
    path = ROOT / "docs" / "benchmarks" / f"{device}-{entry['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*entries, entry], indent=1) + "\n")
    return path


def main() -> None:
    """Parse, time in interleaved rounds, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1024), ("d-in", 576), ("d-sae", 9216), ("k", 32), ("threads", 1), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--dead", type=float, default=0.0, help="share of latents declared dead, so that auxiliary losses run"
    )
    parser.add_argument("--save", action="store_true", help="append to docs/benchmarks/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(arguments.rows, arguments.d_in, arguments.d_sae, arguments.k, arguments.dead, device)
    about = describe_device()
    print(f"{about}, {arguments.threads} threads, torch {torch.__version__}, {shape}")
    rows = report(shape, measure(shape, arguments.rounds, arguments.threads))
    if arguments.save:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        entry = {
            "date": datetime.date.today().isoformat(),
            "commit": commit.strip(),
            "device": about,
            "threads": arguments.threads,
            "versions": {"torch": torch.__version__, **{name: _version(p) for name, p in PACKAGES.items()}},
            "shape": vars(shape),
            "rounds": arguments.rounds,
            "steps": rows,
        }
        print(f"saved to {save(entry, about['name']).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
