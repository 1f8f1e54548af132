"""Reading shards into training batches: bytes a second, and the anonymous memory that it takes.

    python scripts/bench_shards.py [--json FILE]            speed, on 1M rows in a temporary folder
    python scripts/bench_shards.py --memory [--json FILE]   a training from a cache of 20 GB, on 80 MB of disk

Speed is that of `ShardSource`, the reader that training uses: warm, one thread, pinned to one core, the reading
thread included. A "stored byte" is one of the activations as stored (bfloat16 stays bfloat16). `one copy` is a plain
sequential copy of the mapped file on the same core, in the same rounds.

The cache of 20 GB consists of hard links to one shard, so every row is real and none of it is anonymous memory.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_about import about

from saeql.pipelines.sources import ShardSource
from saeql.sae.architectures import architecture
from saeql.sae.config import DictionaryConfig, TrainConfig
from saeql.sae.stream import ActivationBatch
from saeql.sae.trainer import Trainer
from saeql.store.manifest import append_record, read_manifest
from saeql.store.shards import ShardReader, ShardWriter

CONTEXT_TOKENS = 128


def write_shards(folder: Path, num_rows: int, d_in: int, dtype: str, windows_per_shard: int = 512) -> None:
    """Random rows around a common mean, in windows of 128 positions."""
    random = np.random.default_rng(0)
    windows = num_rows // CONTEXT_TOKENS
    with ShardWriter(
        folder,
        d_in=d_in,
        context_tokens=CONTEXT_TOKENS,
        attributes={},
        windows_per_shard=windows_per_shard,
        dtype=dtype,
    ) as writer:
        for start in range(0, windows, 64):
            count = min(64, windows - start)
            acts = torch.from_numpy(random.standard_normal((count, CONTEXT_TOKENS, d_in), dtype=np.float32)) + 0.5
            stored = acts.bfloat16().view(torch.uint16) if dtype == "bfloat16" else acts
            ids = random.integers(0, 50_000, (count, CONTEXT_TOKENS)).astype(np.int32)
            window_ids = np.arange(start, start + count, dtype=np.int32)
            writer.append(stored.numpy(), ids, ids, window_ids, acts.norm(dim=-1).numpy())


def consume(batches: Iterator[ActivationBatch], num_bytes: int) -> int:
    """Take batches until `num_bytes` of activations have come; returns how many."""
    taken = 0
    for batch in batches:
        taken += batch.acts.numel() * batch.acts.element_size()
        if taken >= num_bytes:
            break
    return taken


def copy_in_order(reader: ShardReader) -> int:
    """Copy every block of the mapped shards once."""
    block, taken = np.empty((1024, reader.d_in), reader.acts(0).dtype), 0
    for shard, record in enumerate(reader.records):
        for start in range(0, record.rows, 1024):
            rows = reader.rows(shard, start, min(start + 1024, record.rows))
            block[: len(rows)] = rows
            taken += rows.nbytes
    return taken


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """(gigabytes a second of CPU time, of wall time)."""
    cpu, wall = time.process_time(), time.perf_counter()
    taken = work()
    return taken / (time.process_time() - cpu) / 1e9, taken / (time.perf_counter() - wall) / 1e9


def measure_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of every way of reading, interleaved; medians."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = []
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            folder = Path(temporary)
            write_shards(folder, args.rows, args.d_in, dtype)
            limits = {"a": float("inf")}
            # streams run on from round to round: their memory is theirs already
            sources = {
                f"shuffled, batches of {size}": ShardSource(
                    {"a": folder}, batch_tokens=size, norm_limits=limits, shuffle_seed=0, buffer_bytes=args.buffer_bytes
                ).batches()
                for size in (1024, 4096)
            }
            reader = ShardReader(folder)
            total = sum(r.rows for r in reader.records) * args.d_in * (2 if dtype == "bfloat16" else 4)
            ways = {name: partial(consume, source, 4 * total) for name, source in sources.items()}
            ways["one copy, in order"] = partial(copy_in_order, reader)
            for way in ways.values():
                way()
            rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, way in ways.items():
                    rounds[name].append(timed(way))
            for name, values in rounds.items():
                cpu, wall = (statistics.median(v) for v in zip(*values, strict=True))
                results.append({"dtype": dtype, "way": name, "gb_per_cpu_second": cpu, "gb_per_wall_second": wall})
                print(f"{dtype:9} {name:28} {cpu:6.2f} GB per CPU second {wall:6.2f} GB per second", flush=True)
    return results


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system's /proc/self/status has no RssAnon")


class Peak:
    """Highest anonymous memory while the block runs."""

    def __enter__(self) -> "Peak":
        self.bytes, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def linked_cache(folder: Path, d_in: int, gigabytes: float) -> None:
    """A folder of shards that are all hard links to its first one."""
    write_shards(folder, 512 * CONTEXT_TOKENS, d_in, "bfloat16")
    (first,) = read_manifest(folder)
    for number in range(1, int(gigabytes * 1e9 / first.bytes) + 1):
        record = replace(first, file=f"shard-{number:05d}.h5")
        (folder / record.file).hardlink_to(folder / first.file)
        append_record(folder, record)


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Anonymous memory of a training over several groups of a cache, above that of the same training without one."""
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        linked_cache(folder, args.d_in, args.gigabytes)
        config = TrainConfig(num_steps=args.steps, batch_tokens=4096, init_tokens=8192, log_every_steps=100)

        def train(steps: int, buffer_bytes: int) -> int:
            source = ShardSource(
                {"a": folder},
                batch_tokens=config.batch_tokens,
                norm_limits={"a": float("inf")},
                shuffle_seed=0,
                buffer_bytes=buffer_bytes,
            )
            torch.manual_seed(0)
            dictionary = architecture("topk")(DictionaryConfig(d_sae=256, k=4), args.d_in, args.d_in)
            trainer = Trainer(replace(config, num_steps=steps), {"a": dictionary}, source)
            with Peak() as peak:
                trainer.fit()
            return peak.bytes

        least = 2 * (args.d_in * 2 + 40) * 5 * 1024  # two groups of a batch and what is left out, in whole blocks
        base = train(20, least)  # torch, the model, its optimizer, the batches: everything but the buffer
        peak = train(args.steps, args.buffer_bytes)
        stored = sum(r.rows for r in read_manifest(folder)) * args.d_in * 2
    result = {
        "cache_bytes": stored,
        "buffer_bytes": args.buffer_bytes,
        "steps": args.steps,
        "batch_tokens": config.batch_tokens,
        "groups_read": args.steps * config.batch_tokens * args.d_in * 2 / (args.buffer_bytes / 2),
        "anonymous_bytes_with_smallest_buffer": base,
        "anonymous_bytes_at_peak": peak,
        "reading_bytes": peak - base + least,
        "share_of_budget": (peak - base + least) / args.buffer_bytes,
        "whole_process_share_of_budget": peak / args.buffer_bytes,
    }
    for name, value in result.items():
        print(f"{name:40} {value:,.3f}" if isinstance(value, float) else f"{name:40} {value:,}")
    return result


def main() -> None:
    """Measure, print, and with --json write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--buffer-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--folder", type=Path, help="where temporary shards go")
    parser.add_argument("--json", type=Path, help="file that the numbers are added to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    key, found = ("memory", measure_memory(args)) if args.memory else ("speed", measure_speed(args))
    if args.json:
        data = json.loads(args.json.read_text()) if args.json.exists() else {}
        data |= {
            **about(("numpy", "h5py")),
            "shape": {"rows": args.rows, "d_in": args.d_in, "context_tokens": CONTEXT_TOKENS},
            "buffer_bytes": args.buffer_bytes,
            key: found,
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
