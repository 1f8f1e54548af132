"""Time one training step as a multiple of the encoder GEMM alone, both interleaved in one process.

    python scripts/bench_train.py --rows 1024 --d-in 576 --d-sae 9216 --k 32 --threads 1 --rounds 9

One thread is timed in process CPU time, which a busy machine disturbs least; more threads in wall time. On CUDA the
step runs on the card and is timed with events. Rows are sparse mixtures of directions with a skewed prior, so that
latents fire unevenly.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from saeql.kernels.launch import fast_matmul_dtype
from saeql.sae.architectures import build
from saeql.sae.config import DictionaryConfig, TrainConfig
from saeql.sae.trainer import Trainer


class _NoSource:
    """The benchmark hands rows to the trainer itself."""

    def __init__(self, d_in: int):
        self.widths = {"rows": d_in}

    def batches(self, cursor: object = None):
        return iter(())


def make_rows(num: int, rows: int, d_in: int, device: torch.device) -> list[torch.Tensor]:
    """`num` batches [rows, d_in] with unit variance."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    prior = 1 / torch.arange(1, 4 * d_in + 1) ** 0.7
    batches = []
    for _ in range(num):
        chosen = torch.multinomial(prior, rows * 24, replacement=True, generator=generator).view(rows, 24)
        weight = torch.rand(rows, 24, generator=generator) + 0.5
        x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=weight, mode="sum")
        x += 0.05 * torch.randn(rows, d_in, generator=generator)
        batches.append(((x - x.mean(0)) / x.std()).to(device))
    return batches


def steps(arguments: argparse.Namespace, device: torch.device) -> dict[str, Callable[[torch.Tensor], object]]:
    """The floor and our step with each encoder precision that this device has."""
    d_in, d_sae = arguments.d_in, arguments.d_sae
    weight, bias = torch.randn(d_sae, d_in, device=device), torch.zeros(d_sae, device=device)
    out = torch.empty(arguments.rows, d_sae, device=device)
    found: dict[str, Callable[[torch.Tensor], object]] = {
        "encoder GEMM, float32 (the floor)": lambda x: torch.addmm(bias, x, weight.t(), out=out)
    }
    for dtype in dict.fromkeys((None, fast_matmul_dtype(device))):
        dictionary = build(DictionaryConfig(d_sae=d_sae, k=arguments.k), d_in).to(device)
        config = TrainConfig(num_steps=10**6, batch_tokens=arguments.rows)
        trainer = Trainer(config, {"a": dictionary}, _NoSource(d_in), matmul_dtype=dtype)
        found[f"saeql, encoder {str(dtype or torch.float32).removeprefix('torch.')}"] = trainer.train_step
    return found


def seconds(step: Callable[[torch.Tensor], object], x: torch.Tensor, threads: int) -> float:
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


def main() -> None:
    """Parse, time in interleaved rounds, print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1024), ("d-in", 576), ("d-sae", 9216), ("k", 32), ("threads", 1), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pool, timed = make_rows(4, arguments.rows, arguments.d_in, device), steps(arguments, device)
    for step in timed.values():
        for x in pool[:2]:
            step(x)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for n in range(arguments.rounds):
        for name, step in timed.items():
            times[name].append(seconds(step, pool[n % len(pool)], arguments.threads))
    floor = statistics.median(next(iter(times.values())))
    print(f"{device.type}, {arguments.threads} threads, torch {torch.__version__}, {vars(arguments)}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:36} {median * 1e3:8.1f} ms  {median / floor:5.2f} x  {arguments.rows / median:9,.0f} tokens/s")


if __name__ == "__main__":
    main()
