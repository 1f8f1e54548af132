"""What a benchmark's numbers were taken on: said in one way in every file of results."""

import datetime
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def describe_device(device: str) -> dict[str, Any]:
    """Its name, and what matters of its abilities."""
    if device == "cuda":
        return {"name": torch.cuda.get_device_name().replace(" ", "-"), "cuda": torch.version.cuda}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in flags.replace("\n", " ")]
    return {"name": f"cpu-{platform.machine()}", "flags": known}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of this checkout; None where there is no git or only a copy of the files."""
    if shutil.which("git") is None:
        return None
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or None


def about(packages: Iterable[str], *, device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Date, commit, device, threads, and versions of Python, torch and `packages`: None where one is not installed."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": describe_device(device),
        "threads": torch.get_num_threads() if threads is None else threads,
        "versions": {**versions, **{package: _version(package) for package in packages}},
    }
