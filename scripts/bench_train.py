"""Time our training step and the peers', and every kernel by itself, against what the device can do at best.

    python scripts/bench_train.py [--shapes 1024,576,9216,32 --sections steps --rounds 9 --threads 1 --dead 0.2 --save]

For each shape (rows,d_in,d_sae,k; without `--shapes` those of docs/performance.md for this device):

    check    every kernel against its float64 reference; the script ends with 1 where one is wrong
    steps    one training step, interleaved with the encoder's matmul and the steps of SAELens, sparsify and
             dictionary_learning where they can be imported, as multiples of that matmul and of the arithmetic floor
    kernels  milliseconds, bytes by count, GB/s and TFLOP/s of every kernel as shares of the measured ceilings

Matmul and copy ceilings are measured first, and kernels are also checked at an odd shape that needs every mask. One
thread is timed in process CPU time, which a busy machine disturbs least; more threads in wall time; a card with events.
`--save` appends to docs/benchmarks/<device>-<date>.json, `--out DIR` to the like file in DIR; it is written again with
every result, so that a run cut short keeps what it has.
"""

import argparse
import datetime
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from bench_about import ROOT, about, describe_device
from bench_ceilings import Ceilings, floor, measure_ceilings, measure_encoder, precisions
from bench_clock import Clock, Deadline
from bench_kernels import HEADER, check_lines, dtypes, print_check, print_time, time_lines
from bench_peers import PACKAGES
from bench_shapes import DEFAULTS, ODD, Shape, parse_shape
from bench_steps import OURS, base_precision, measure, profile, report

from saeql.pipelines.atomic import write_whole

OUT = ROOT / "docs" / "benchmarks"
SECTIONS = ("check", "steps", "kernels")
ROUNDS = {"cpu": 9, "cuda": 50}
#: A card is often lent for ten minutes at a time.
BUDGET_SECONDS = {"cpu": float("inf"), "cuda": 500.0}


class Results:
    """The entries of one device and day; with a folder they are in its file whenever `save` has been called."""

    def __init__(self, folder: Path | None, device: str):
        name = f"{device}-{datetime.date.today().isoformat()}"
        self.path = None if folder is None else folder / f"{name}.json"
        self._entries: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            self._entries = json.loads(self.path.read_text())

    def add(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A new entry, to be filled in and saved."""
        self._entries.append(entry)
        self.save()
        return entry

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self._entries, indent=1) + "\n")


@dataclass
class Benchmark:
    """The sections of one shape. Each fills in the entry and saves it as it goes along."""

    shape: Shape
    clock: Clock
    ceilings: Ceilings
    results: Results
    entry: dict[str, Any]
    deadline: Deadline

    def rates(self) -> None:
        """The encoder's matmul by precision, and the arithmetic floor by the best rates seen."""
        shape, precision = self.shape, base_precision(self.shape.device)
        gemm = measure_encoder(shape, self.clock, self.ceilings)
        size = precisions(shape.device)[precision].itemsize
        least = floor(shape, size, self.ceilings.matmul(precision), self.ceilings.copy)
        self.entry["ceilings"] = self.ceilings.as_json()
        self.entry["encoder_gemm_milliseconds"] = {name: round(ms, 4) for name, ms in gemm.items()}
        self.entry["arithmetic_floor"] = {"precision": precision, **{name: round(ms, 4) for name, ms in least.items()}}
        speeds = (f"{name} {ms:.3f} ms ({self.ceilings.encoder[name]:.3g} TFLOP/s)" for name, ms in gemm.items())
        parts = " + ".join(f"{name} {ms:.3f}" for name, ms in least.items() if name != "milliseconds")
        print(f"\n{shape}\nencoder GEMM: {', '.join(speeds)}")
        print(f"arithmetic floor, {precision}: {least['milliseconds']:.3f} ms = {parts}")
        self.results.save()

    def check(self, types: tuple[torch.dtype, ...]) -> None:
        """Every kernel against its reference."""
        print(f"\ncheck: {self.shape}")
        for line in check_lines(self.shape, types, self.deadline):
            print_check(line)
            self.entry["check"].append(line)
            self.results.save()

    def steps(self, rounds: int) -> None:
        """Whole training steps, in at most half of the time that is left."""
        print()
        share = Deadline(self.deadline.left / 2)
        times, self.entry["left_out"] = measure(self.shape, rounds, self.clock, share)
        self.entry["rounds"] = len(next(iter(times.values())))
        self.entry["steps"] = report(self.shape, times, self.entry["arithmetic_floor"]["milliseconds"])
        self.results.save()

    def kernels(self) -> None:
        """Every kernel timed."""
        print(f"\n{HEADER}")
        self.entry["kernels"] = []
        for line in time_lines(self.shape, self.clock, self.ceilings, self.deadline):
            print_time(line)
            self.entry["kernels"].append(line)
            self.results.save()

    def run(self, sections: Sequence[str], rounds: int) -> None:
        """All of `sections`, as far as time allows; steps always."""
        self.rates()
        if "check" in sections:
            self.check(dtypes(self.shape.device))
        if "steps" in sections:
            self.steps(rounds)
        if "kernels" in sections:
            self.kernels()
        if self.deadline.passed:
            self.entry["out_of_time"] = True
            print("out of time: kernels that are missing here were not looked at (see --time-budget)")
            self.results.save()


def failures(entries: list[dict[str, Any]]) -> list[str]:
    """Kernels that are wrong or do not run, and steps of ours that do not run."""
    lines = [line for entry in entries for line in entry["check"] if not line["passed"]]
    lines += [line for entry in entries for line in entry.get("kernels", []) if "error" in line]
    kernels = {f"{line['kernel']} ({line['dtype']}, {line['backend']})" for line in lines}
    return sorted(kernels | {name for entry in entries for name in entry.get("left_out", {}) if name.startswith(OURS)})


def write_profile(shape: Shape, folder: Path, device: str) -> None:
    """The profiler's table of one step, beside the results."""
    sizes = f"{shape.rows}-{shape.d_in}-{shape.d_sae}-{shape.k}"
    file = folder / f"{device}-{datetime.date.today().isoformat()}-{sizes}-profile.txt"
    profile(shape, file)
    print(f"\nprofile of a step of {shape} in {file}")


def parse(argv: list[str] | None, device: str) -> argparse.Namespace:
    """The command line; `shapes` become Shape objects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", default=DEFAULTS[device], metavar="ROWS,D_IN,D_SAE,K")
    add("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    add("--rounds", type=int, default=ROUNDS[device], help="of all steps; fewer where time is up")
    add("--threads", type=int, default=1)
    add("--dead", type=float, default=0.0, help="share of latents declared dead, so that auxiliary losses run")
    add("--time-budget", type=float, default=BUDGET_SECONDS[device], help="seconds for everything")
    add("--save", action="store_true", help="append the results to a file in docs/benchmarks/")
    add("--out", type=Path, default=OUT, metavar="DIR", help="append them to a file in DIR instead")
    add("--peers", type=Path, help="a folder to import peers from, after the installed packages")
    add("--profile", action="store_true", help="write the profiler's table of one step too")
    arguments = parser.parse_args(argv)
    try:
        arguments.shapes = [parse_shape(text, arguments.dead, device) for text in arguments.shapes]
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save. Returns 1 where a kernel is wrong, or a kernel or step of ours does not run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = parse(argv, device)
    deadline = Deadline(arguments.time_budget)
    if arguments.peers:
        sys.path.append(str(arguments.peers.resolve()))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock, described, entries = Clock(device, arguments.threads), describe_device(device), []
    results = Results(arguments.out if arguments.save or arguments.out != OUT else None, described["name"])
    print(f"{described}, {arguments.threads} threads, torch {torch.__version__}")
    ceilings = measure_ceilings(clock)
    square = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in ceilings.square.items())
    print(f"ceilings: copy {ceilings.copy:,.0f} GB/s read and written; square products {square}")
    for n, shape in enumerate(arguments.shapes):
        if deadline.passed:
            print(f"left out: {shape} (out of time, see --time-budget)")
            continue
        entries.append(
            results.add(
                {
                    **about(("triton", *PACKAGES.values()), device=device, threads=arguments.threads),
                    "shape": vars(shape),
                    "check": [],
                }
            )
        )
        share = Deadline(deadline.left / (len(arguments.shapes) - n))
        benchmark = Benchmark(shape, clock, ceilings, results, entries[-1], share)
        if n == 0 and "check" in arguments.sections:
            odd = parse_shape(ODD, 0.0, device)
            replace(benchmark, shape=odd, deadline=deadline).check((torch.float32, torch.bfloat16))
        benchmark.run(arguments.sections, arguments.rounds)
        if device == "cuda":  # a peer's trainer may be a circle
            gc.collect()
            torch.cuda.empty_cache()
    if results.path is not None:
        print(f"\nsaved to {results.path}")
    if arguments.profile:
        write_profile(arguments.shapes[0], arguments.out, described["name"])
    wrong = failures(entries)
    if wrong:
        print(f"\nWRONG: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
