"""Machines that a plan is made for: GPUs from their data sheets, and this machine as it is now."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from saeql.sae.config import ConfigError, suggestion


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links, as the maker's data sheet states them; dense matmul, no sparsity."""

    name: str
    bf16_flops: float  # a second
    memory_bytes: float
    memory_rate: float  # bytes a second
    node_link_rate: float  # bytes a second each way between GPUs of one node, per GPU
    network_rate: float  # bytes a second each way between nodes, per GPU
    node_ram_bytes: float  # of a usual node with such cards; not of the data sheet


#: Between nodes one 400 Gbit/s port a GPU (h100, h200), 200 Gbit/s (a100), 25 Gbit/s shared by four (rtx4090).
GPUS = {
    "h100": Gpu("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9, 2e12),  # H100 SXM5, NVLink 4
    "h200": Gpu("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 2e12),  # H200 SXM, NVLink 4
    "a100": Gpu("a100", 312e12, 80e9, 2.039e12, 300e9, 25e9, 2e12),  # A100 SXM 80 GB, NVLink 3
    "rtx4090": Gpu("rtx4090", 165e12, 24e9, 1.008e12, 32e9, 0.8e9, 128e9),  # PCIe 4.0 x16, no NVLink
}


def gpu(name: str) -> Gpu:
    """A GPU by name. Raises ConfigError for one that is not in the table."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name!r} is not known; there is {', '.join(GPUS)}{suggestion(name, list(GPUS))}")
    return GPUS[name]


@dataclass(frozen=True)
class Machine:
    """What this machine has free, and how fast it multiplies."""

    free_ram_bytes: int
    free_disk_bytes: int
    float32_flops: float  # a second, measured
    bfloat16_flops: float  # 0 where the processor has no such instructions


def this_machine(folder: Path) -> Machine:
    """Free memory, free disk at `folder`, and matmul speed measured for about half a second."""
    import torch

    from saeql.kernels.launch import fast_matmul_dtype

    has_bf16 = fast_matmul_dtype("cpu") is not None
    return Machine(
        _available_ram(),
        shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())).free,
        _matmul_flops(torch.float32),
        _matmul_flops(torch.bfloat16) if has_bf16 else 0.0,
    )


def _available_ram() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _matmul_flops(dtype: object, seconds: float = 0.25) -> float:
    """Operations a second of the matmul of a training step; the median, other programs also run here."""
    import torch

    x = torch.randn(1024, 576).to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    w = torch.randn(576, 4608).to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    torch.matmul(x, w)
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        torch.matmul(x, w)
        times.append(time.perf_counter() - start)
    return 2 * 1024 * 576 * 4608 / sorted(times)[len(times) // 2]
