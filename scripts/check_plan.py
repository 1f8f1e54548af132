"""What `saeql plan` predicts against what the stages need: peak memory, disk, and the cost of a sweep.

    python scripts/check_plan.py [--json FILE] [--keep FOLDER] [name ...]

Every stage runs in a process of its own. Its memory is the largest RssAnon of /proc/PID/status, read every 5 ms: memory
of its own, without page cache and mapped files. Takes several minutes on two cores: activations are harvested for real.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_about import about

from saeql.pipelines import Run, load_config
from saeql.pipelines.footprint import anonymous_bytes
from saeql.pipelines.models import cache_folder
from saeql.pipelines.plan import make_plan

WANTED = 0.15
_SMALL = {"train.num_steps": "60", "train.checkpoint_every_steps": "40", "evaluate.ce_windows": "16"}
#: name -> (configuration over the packaged demo, stages that are measured, configuration whose harvest is taken over)
CONFIGS = {
    "one topk dictionary": (
        {**_SMALL, "corpus.max_tokens": "24000", "train.shuffle_buffer_bytes": "12000000"},
        ("harvest", "train", "index", "label", "evaluate", "store"),
        None,
    ),
    "a sweep of four": (
        {
            **_SMALL,
            "corpus.max_tokens": "24000",
            "sweep.architectures": '["topk", "batchtopk"]',
            "sweep.ks": "[16, 32]",
        },
        ("train --sweep",),
        "one topk dictionary",
    ),
    "straight from the model": (
        {
            **_SMALL,
            "corpus.max_tokens": "24000",
            "train.source": "live",
            "train.num_steps": "30",
            "train.shuffle_buffer_bytes": "20000000",
            "train.checkpoint_every_steps": "15",
            "harvest.max_train_tokens": "4000",
        },
        ("harvest", "train"),
        None,
    ),
    "two hook points, d_sae 9216": (
        {
            **_SMALL,
            "corpus.max_tokens": "8000",
            "model.more_hook_points": '["resid_post.9"]',
            "dictionary.d_sae": "9216",
            "harvest.batch_windows": "32",
        },
        ("harvest", "train", "index"),
        None,
    ),
}
_STAGE = """
import sys, time, torch
from saeql.pipelines import Run
from saeql.pipelines.sweep import expand
from saeql.pipelines.train import train_dictionaries
torch.set_num_threads(1)
run, stage = Run.open(sys.argv[1]), sys.argv[2]
started = time.process_time()
if stage == "train --sweep":
    (run.path / "sweep").mkdir(exist_ok=True)
    train_dictionaries(run, expand(run.config), run.path / "sweep", resume=False)
else:
    list(run.execute((stage,), again=True))
print("seconds", time.process_time() - started)
"""


def measure(run: Path, stage: str) -> tuple[int, float]:
    """Peak anonymous bytes, and CPU seconds without imports, of a stage in its own process, nothing embedded before."""
    command = [sys.executable, "-c", _STAGE, str(run), stage]
    peak = 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryDirectory() as cache:
        (Path(cache) / "saeql").mkdir()
        for kept in cache_folder().glob("*"):
            if kept.is_dir():  # converted models; what was embedded are files
                (Path(cache) / "saeql" / kept.name).symlink_to(kept)
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment)
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.005)
        out.seek(0)
        text = out.read()
    if child.returncode:
        raise SystemExit(f"{stage} of {run} failed:\n{text[-2000:]}")
    return peak, float(text.rsplit("seconds ", 1)[1])


def disk(run: Path, stage: str) -> int:
    """Bytes that a stage has written."""
    places = {
        "harvest": ["activations"],
        "train": ["checkpoints", "dictionaries"],
        "train --sweep": ["sweep/checkpoints", "sweep/dictionaries"],
        "index": ["evidence"],
        "store": ["features.duckdb"],
    }
    files = [f for place in places.get(stage, []) for f in [run / place, *(run / place).rglob("*")] if f.is_file()]
    return sum(f.stat().st_size for f in files)


def check(name: str, folder: Path) -> list[dict]:
    """Rows of one configuration."""
    overrides, stages, harvested_by = CONFIGS[name]
    config = load_config(None, overrides)
    plan = make_plan(config, folder=folder)
    run = folder / name.replace(" ", "-").replace(",", "")
    Run.create(run, config)
    if harvested_by is not None:
        other = folder / harvested_by.replace(" ", "-")
        shutil.copytree(other / "activations", run / "activations", dirs_exist_ok=True)
    rows = []
    for stage in stages:
        planned = plan.stage(stage)
        peak, seconds = measure(run, stage)
        pairs = {"RAM": (planned.ram_bytes, peak), "disk": (planned.disk_bytes, disk(run, stage))}
        for kind, (predicted, measured) in pairs.items():
            if predicted and measured:
                error = predicted / measured - 1
                row = {
                    "config": name,
                    "stage": stage,
                    "what": kind,
                    "predicted_mb": round(predicted / 1e6, 1),
                    "measured_mb": round(measured / 1e6, 1),
                    "error": round(error, 3),
                    "cpu_seconds": round(seconds, 1),
                }
                rows.append(row)
                print(
                    f"{name:<28} {stage:<14} {kind:<5} {predicted / 1e6:8.1f} {measured / 1e6:8.1f} MB {error:+7.1%}"
                    f"{'' if abs(error) <= WANTED else '  OUTSIDE'}",
                    flush=True,
                )
    return rows


def sweep_cost(folder: Path) -> dict:
    """CPU seconds, one thread, of training four dictionaries together and each alone, interleaved."""
    import torch

    from saeql.pipelines.sweep import expand

    torch.set_num_threads(1)
    run = Run.open(folder / "a-sweep-of-four")
    specs = expand(run.config)
    alone, together = {spec.name: [] for spec in specs}, []
    for _ in range(2):
        for spec in specs:
            alone[spec.name].append(_train_seconds(run, [spec]))
        together.append(_train_seconds(run, specs))
    single = sum(min(seconds) for seconds in alone.values())
    result = {
        "steps": run.config.train.num_steps,
        "alone_cpu_seconds": {name: [round(s, 2) for s in seconds] for name, seconds in alone.items()},
        "together_cpu_seconds": [round(s, 2) for s in together],
        "together_over_sum_of_alone": round(min(together) / single, 3),
    }
    print(json.dumps(result, indent=2))
    return result


def _train_seconds(run: Run, specs: list) -> float:
    from saeql.pipelines.train import train_dictionaries

    (run.path / "cost").mkdir(exist_ok=True)
    started = time.process_time()
    train_dictionaries(run, specs, run.path / "cost", resume=False)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CONFIGS), help=", ".join(CONFIGS))
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--keep", type=Path, help="folder for the runs; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        rows = [row for name in arguments.names for row in check(name, folder)]
        cost = sweep_cost(folder) if "a sweep of four" in arguments.names else None
    worst = max(abs(row["error"]) for row in rows)
    print(f"largest error {worst:.1%}, wanted at most {WANTED:.0%}")
    if arguments.json:
        found = {"about": {**about(("transformers",)), "cores": os.cpu_count()}, "plan": rows, "sweep": cost}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
