"""The feature store at scale: what a build costs, and how long questions take.

    python scripts/bench_store.py [--features 131072] [--activations 50000000] [--folder FOLDER] [--json FILE]
    python scripts/bench_store.py --demo runs/demo        adds the questions on a real run's store
    python scripts/bench_store.py --keep FOLDER           leaves the stores there; they are only asked the next time
    python scripts/bench_store.py --activations 1000000000 --parquet-only   less disk: Parquet is asked alone

Makes the evidence of a dictionary that does not exist (firing by Zipf 0.8, fixed seed, see `synthetic_store.py`),
builds the store in a process of its own with two threads, adds labels, a dictionary and a corpus to it, and asks. A
question is asked `--repeats` times about different features, words and documents, after a first one that is not
counted; the file is in the page cache. The folder needs about 60 bytes an activation (with `--parquet-only` 36) and is
removed.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from synthetic_store import Size, write_embeddings, write_evidence, write_labels

from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.parquet_store import write_parquet

NAME = "synthetic"
#: (question, median and 95th percentile wanted, ms).
TARGETS = {
    "top 20 examples, hot feature": (5, 15),
    "top 20 examples, any feature": (5, 15),
    "features of a document": (10, 40),
    "what co-fires with a feature": (10, 40),
    "words in labels (BM25)": (20, 60),
    "meaning": (25, 60),
    "statistics over all features": (100, 100),
}


def build(folder: Path, threads: int) -> None:
    """Build or bring up to date; prints what it cost. Run in a process of its own: peak memory is that of a process."""
    steps: dict[str, float] = {}
    last = [time.perf_counter(), ""]

    def on_step(name: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if last[1]:
            steps[str(last[1])] = round(steps.get(str(last[1]), 0) + now - float(last[0]), 2)
        last[:] = [now, name]

    path = folder / "features.duckdb"
    evidence = [Evidence(f) for f in sorted(folder.glob("evidence*"))]
    began, cpu = time.perf_counter(), time.process_time()
    done = FeatureStore.sync(path, evidence, threads=threads, on_step=on_step)
    print(
        json.dumps(
            {
                "done": done,
                "seconds": round(time.perf_counter() - began, 2),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
                "file_bytes": path.stat().st_size,
                "steps": steps,
            }
        )
    )


def measured_build(folder: Path, threads: int) -> dict[str, Any]:
    """`build` in a process of its own."""
    command = [sys.executable, __file__, "--only-build", "--folder", str(folder), "--threads", str(threads)]
    made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return made | {"load": os.getloadavg()[0]}


def table_bytes(path: Path, table: str) -> int:
    """Bytes of the blocks of a table."""
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = connection.execute(
            f"SELECT count(DISTINCT block_id) * 262144 FROM pragma_storage_info('{table}')"
        ).fetchall()
    return rows[0][0]


def timed(question: Callable[[int], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of a question that is asked with 1, 2, ...; the first, uncounted, with 0.

    CPU time is that of all threads: what a busy machine does to the clock it does not do to it.
    """
    began = time.perf_counter()
    question(0)
    first = time.perf_counter() - began
    times, cpu = [], []
    for number in range(1, repeats + 1):
        began, busy = time.perf_counter(), time.process_time()
        question(number)
        times.append((time.perf_counter() - began) * 1000)
        cpu.append((time.process_time() - busy) * 1000)
    return {
        "first_ms": round(first * 1000, 1),
        "median_ms": round(statistics.median(times), 2),
        "p95_ms": round(float(np.quantile(times, 0.95)), 2),
        "median_cpu_ms": round(statistics.median(cpu), 2),
        "load": round(os.getloadavg()[0], 1),
    }


def questions(store: FeatureStore) -> dict[str, Callable[[int], Any]]:
    """What is asked; every question takes a number and asks about something else for each."""
    random = np.random.default_rng(0)
    order = store.trusted_sql("SELECT feature FROM features WHERE max_activation > 0 ORDER BY density DESC")[
        "feature"
    ].to_numpy()
    hot, any_feature = order[: max(len(order) // 1000, 20)], random.permutation(order)
    documents = random.permutation(store.trusted_sql("SELECT document_id FROM documents")["document_id"].to_numpy())
    labels = store.trusted_sql("SELECT label FROM labels WHERE kind <> 'none' ORDER BY hash(feature) LIMIT 1000")
    words = [" ".join(label.split()[:2]) for label in labels["label"].to_pylist()] or ["music"]
    made: dict[str, Callable[[int], Any]] = {
        "top 20 examples, hot feature": lambda n: store.examples(int(hot[n % len(hot)]), limit=20),
        "top 20 examples, any feature": lambda n: store.examples(int(any_feature[n % len(any_feature)]), limit=20),
        "features of a document": lambda n: store.document_features(int(documents[n % len(documents)])),
        "what co-fires with a feature": lambda n: store.cofirings(int(any_feature[n % len(any_feature)]), limit=64),
        "words in labels (BM25)": lambda n: store.search(words[n % len(words)]),
        "statistics over all features": lambda n: store.trusted_sql(
            "SELECT kind, count(*), avg(density), quantile_cont(density, [0.5, 0.9]), avg(auroc), max(max_activation), "
            f"avg(token_entropy) + {n} FROM features GROUP BY kind"
        ),
        "the same examples through the view": lambda n: store.trusted_sql(
            "SELECT * FROM examples WHERE feature = $f AND kind = 'top' AND split = 'train' ORDER BY rank",
            {"f": int(any_feature[n % len(any_feature)])},
        ),
        "one feature's page: card, examples, neighbours, effects": lambda n: page(
            store, int(any_feature[n % len(order)])
        ),
    }
    if store.embedding_model():
        vectors = random.standard_normal((64, store.embedding_width())).astype(np.float32)
        made["meaning"] = lambda n: store.search_vector(vectors[n % 64])
    return made


def page(store: FeatureStore, feature: int) -> None:
    """What a page of one feature asks for."""
    store.feature(feature)
    store.examples(feature, limit=20)
    store.neighbours(feature)
    store.logit_effects(feature)
    store.cofirings(feature)


def ask(path: Path, repeats: int, threads: int) -> dict[str, Any]:
    """All questions on one store."""
    with FeatureStore.open(path, threads=threads) as store:
        return {name: timed(question, repeats) for name, question in questions(store).items()}


def ask_both(folder: Path, written: int, repeats: int, threads: int, *, parquet_only: bool = False) -> dict[str, Any]:
    """The file's size and questions, and those of the same store on Parquet, which is written where it is missing.

    `parquet_only`: the file is not asked, and removed before Parquet is.
    """
    path, shared = folder / "features.duckdb", folder / "parquet"
    made: dict[str, Any] = {
        "bytes_an_activation": {
            "by feature": round(table_bytes(path, "evidence.activations_by_feature") / written, 2),
            "by document": round(table_bytes(path, "evidence.activations_by_document") / written, 2),
            "everything, embeddings included": round(path.stat().st_size / written, 2),
        },
        "questions": {} if parquet_only else ask(path, repeats, threads),
    }
    print(json.dumps(made["questions"], indent=1), file=sys.stderr)
    began = time.perf_counter()
    if not shared.exists():
        write_parquet(path, shared)
    if parquet_only:
        path.unlink()
    made["the same on Parquet"] = {
        "seconds": round(time.perf_counter() - began, 1),
        "bytes": sum(file.stat().st_size for file in shared.iterdir()),
        "questions": ask(shared, max(repeats // 4, 1), threads),
    }
    return made


def run(
    folder: Path, size: Size, repeats: int, threads: int, *, keep: bool, parquet_only: bool = False
) -> dict[str, Any]:
    """Everything on made-up evidence."""
    if (folder / "features.duckdb").exists():
        with FeatureStore.open(folder / "features.duckdb") as store:
            counted = store.trusted_sql("SELECT count(*) AS n FROM evidence.activations_by_feature").to_pylist()
        return {"activations": counted[0]["n"], **ask_both(folder, counted[0]["n"], repeats, threads)}
    began = time.perf_counter()
    written = write_evidence(folder / "evidence", size, NAME)
    write_embeddings(Evidence(folder / "evidence"), size, NAME)
    made: dict[str, Any] = {"activations": written, "evidence_seconds": round(time.perf_counter() - began, 1)}
    made["build"] = measured_build(folder, threads)
    print(made["build"], file=sys.stderr)
    if parquet_only:
        shutil.rmtree(folder / "evidence")
    made |= ask_both(folder, written, repeats, threads, parquet_only=parquet_only)
    if keep or parquet_only:
        return made
    shutil.rmtree(folder / "parquet")
    write_labels(Evidence(folder / "evidence"), size, NAME, seed=9)
    made["new labels for all features"] = measured_build(folder, threads)
    small = Size(features=4096, activations=size.activations // 50, seed=1)
    write_evidence(folder / "evidence-second", small, "small")
    made[f"a new corpus with a new dictionary, {small.activations:,} activations"] = measured_build(folder, threads)
    made["nothing new"] = measured_build(folder, threads)
    return made


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "duckdb": duckdb.__version__,
        "numpy": np.__version__,
        "load_at_start": os.getloadavg()[0],
    }


def report(result: dict[str, Any]) -> None:
    """Questions beside their targets."""
    places = {
        "file": result["synthetic"],
        "Parquet": result["synthetic"]["the same on Parquet"],
        "demo": result.get("demo", {}),
    }
    for where, measured in places.items():
        for name, found in measured.get("questions", {}).items():
            wanted = TARGETS.get(name) if where != "Parquet" else None
            target = f"<= {wanted[0]} / {wanted[1]} ms" if wanted else ""
            times = f"{found['median_ms']:8.2f} / {found['p95_ms']:8.2f} ms, {found['median_cpu_ms']:8.2f} ms of CPU"
            print(f"{where:<10} {name:<58} {times}   {target}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=Size.features)
    parser.add_argument("--activations", type=int, default=Size.activations)
    parser.add_argument("--folder", type=Path, help="Where to work; default: a temporary folder.")
    parser.add_argument("--keep", type=Path, help="Where the stores stay, to be asked again.")
    parser.add_argument("--parquet-only", action="store_true", help="Build, write Parquet, ask only that.")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--demo", type=Path, help="A run whose store is asked as well.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-build", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_build:
        return build(arguments.folder, arguments.threads)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="bench-store-", dir=arguments.folder))
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "machine": machine(),
        "zipf": Size.zipf,
        "features": arguments.features,
        "repeats": arguments.repeats,
    }
    try:
        size = Size(features=arguments.features, activations=arguments.activations)
        keep, alone = bool(arguments.keep), arguments.parquet_only
        result["synthetic"] = run(folder, size, arguments.repeats, arguments.threads, keep=keep, parquet_only=alone)
        _save(arguments.json, result)
        if arguments.demo:
            result["demo"] = {
                "questions": ask(arguments.demo / "features.duckdb", arguments.repeats, arguments.threads)
            }
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    result["machine"]["load_at_end"] = os.getloadavg()[0]
    report(result)
    _save(arguments.json, result)


def _save(file: Path | None, result: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
