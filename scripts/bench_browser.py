"""How long the pages of `saeql serve` take on a large store, what its process holds, and how soon it answers.

    python scripts/bench_browser.py [--features 131072] [--activations 50000000] [--json FILE]
    python scripts/bench_browser.py --store FOLDER/features.duckdb      a store that is there already

The store is of made-up evidence (see `synthetic_store.py`). The server is a process of its own that is asked one
request after the other over one connection; every request is about another feature, word or token, and the first of
each kind is told apart. CPU time is that of the server, all threads. The file is in the page cache.

Search by meaning comes last, after the memory is read, and where the default sentence encoder is installed: texts that
no run has asked before go through it, and are compared with a random unit vector for every feature.
"""

import argparse
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from bench_store import machine
from synthetic_store import Size, word, write_embeddings, write_evidence, zipf_table

from saeql.pipelines.embedder import Embedder, EmbedderConfig, EmbedderError
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore

TOKEN = "bench-bench-bench"
#: (median, 95th percentile) wanted, ms.
TARGET = (25, 80)
TARGETS = {"meaning": (80, 200)}
FIRST_BYTE_SECONDS, MEMORY_MB = 2.0, 400


def addresses(features: int, vocabulary: int) -> dict[str, Callable[[int], str]]:
    """What is asked; every question takes a number and asks about something else for each."""
    random = np.random.default_rng(0)
    any_feature = random.integers(0, features, 4096)
    words = zipf_table(vocabulary, 1.0, 2**16)[random.integers(0, 2**16, 4096)]  # as often as text has them
    sorts = ("auroc", "density", "label", "max_activation", "feature")
    kinds = ("lexical", "structural", "semantic", "none")
    last = features // 50

    def listed(n: int) -> str:
        return f"/features?sort={sorts[n % 5]}&kind={kinds[n % 4]}&min_density={(n % 7) * 1e-6:g}&page={1 + n % 40}"

    return {
        "list, any page": lambda n: f"/features?page={1 + int(any_feature[n]) % last}",
        "list, filtered and sorted": listed,
        "words": lambda n: f"/features?q={word(int(words[n]))}",
        "two words": lambda n: f"/features?q={word(int(words[n]))}+{word(int(words[n + 1000]))}",
        "token it promotes": lambda n: f"/features?by=effect&q={quote(' ' + word(int(words[n])))}",
        "token it fires on": lambda n: f"/features?by=token&q={quote(' ' + word(int(words[n])))}",
        "feature": lambda n: f"/features/{any_feature[n]}",
        "feature as JSON": lambda n: f"/api/v1/features/{any_feature[n]}",
    }


def meaning(vocabulary: int) -> Callable[[int], str]:
    """Search by meaning, of texts that are in no cache: the time of asking is among their words."""
    random, now = np.random.default_rng(1), time.time_ns()
    words = zipf_table(vocabulary, 1.0, 2**16)[random.integers(0, 2**16, (4096, 3))]
    return lambda n: f"/features?by=meaning&q={'+'.join(word(int(w)) for w in words[n])}+{word(now + n)}"


def encoder() -> str | None:
    """What a store must say that its embeddings are of to be asked; None where there is no encoder."""
    try:
        return Embedder(EmbedderConfig()).identity
    except EmbedderError:
        return None


def serve(store: Path, port: int) -> tuple[subprocess.Popen[bytes], float]:
    """A fresh server, and the seconds from its start to the first byte of the feature list."""
    command = [sys.executable, "-m", "saeql.pipelines", "serve", str(store), "--port", str(port), "--token", TOKEN]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/features")
            connection.getresponse().read(1)
            return process, time.perf_counter() - began
        except ConnectionRefusedError:
            time.sleep(0.01)


def memory_mb(process: subprocess.Popen[bytes]) -> float | None:
    """Most that the process has held, where the system tells."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu_ms(process: subprocess.Popen[bytes]) -> float | None:
    """Processor time that the process has taken, where the system tells, to the hundredth of a second."""
    status = Path(f"/proc/{process.pid}/stat")
    if not status.exists():
        return None
    ticks = status.read_text().rsplit(")", 1)[1].split()[11:13]
    return sum(map(int, ticks)) * 1000 / os.sysconf("SC_CLK_TCK")


def measure(port: int, address: Callable[[int], str], repeats: int, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Milliseconds until the whole page is there, and of the server's processor."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    times, sizes, busy = [], [], None
    for n in range(repeats + 1):
        if n == 1:
            busy = cpu_ms(process)
        began = time.perf_counter()
        connection.request("GET", address(n), headers={"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        body = answer.read()
        times.append((time.perf_counter() - began) * 1000)
        if answer.status not in (200, 400):  # 400: a word that no tokenizer has as a token
            raise SystemExit(f"{address(n)} was answered with {answer.status}: {body[:200]!r}")
        problem = body.partition(b'<p class="notice" role="status">')[2]
        if problem and b"as one token" not in problem:
            raise SystemExit(f"{address(n)} was not answered: {problem[:300]!r}")
        sizes.append(len(body))
    spent = cpu_ms(process)
    return {
        "mean_cpu_ms": None if spent is None or busy is None else round((spent - busy) / max(repeats, 1), 1),
        "first_ms": round(times[0], 1),
        "median_ms": round(statistics.median(times[1:]), 1),
        "p95_ms": round(float(np.quantile(times[1:], 0.95)), 1),
        "median_bytes": int(statistics.median(sizes)),
        "n": repeats,
        "load": round(os.getloadavg()[0], 1),
    }


def build(folder: Path, size: Size) -> Path:
    """A store of made-up evidence."""
    write_evidence(folder / "evidence", size)
    model = encoder()
    if model is not None:
        write_embeddings(Evidence(folder / "evidence"), size, "synthetic", model)
    made = FeatureStore.build(folder / "features.duckdb", [Evidence(folder / "evidence")])
    shutil.rmtree(folder / "evidence")
    return made


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    """Parse, build where asked, serve, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=Size.features)
    parser.add_argument("--activations", type=int, default=Size.activations)
    parser.add_argument("--store", type=Path, help="A store that was made by this script with --keep.")
    parser.add_argument("--keep", type=Path, help="Folder to leave the store in.")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="bench-browser-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        store = arguments.store or build(folder, Size(features=arguments.features, activations=arguments.activations))
        port = free_port()
        result: dict[str, Any] = {"machine": machine(), "store_bytes": store.stat().st_size, "starts": []}
        process = None
        for _ in range(3):
            if process is not None:
                process.terminate()
                process.wait()
            process, seconds = serve(store, port)
            result["starts"].append(round(seconds, 2))
        assert process is not None
        result["memory_mb_at_start"] = memory_mb(process)
        try:
            result["pages"] = {
                name: measure(port, address, arguments.repeats, process)
                for name, address in addresses(arguments.features, Size.vocabulary).items()
            }
            result["memory_mb"] = memory_mb(process)
            with FeatureStore.open(store) as asked:
                has_meaning = asked.embedding_model() is not None and asked.embedding_model() == encoder()
            if has_meaning:
                result["pages"]["meaning"] = measure(port, meaning(Size.vocabulary), arguments.repeats, process)
                result["memory_mb_with_meaning"] = memory_mb(process)
        finally:
            process.terminate()
            process.wait()
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    with_targets(result)
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def with_targets(result: dict[str, Any]) -> None:
    """Puts what was wanted beside every number, and whether it was met."""
    for name, found in result["pages"].items():
        median, most = TARGETS.get(name, TARGET)
        found |= {"median_ms_wanted": median, "p95_ms_wanted": most}
        found["is_met"] = found["median_ms"] <= median and found["p95_ms"] <= most
    first = statistics.median(result["starts"])
    result["first_byte"] = {"median_s": first, "wanted_s": FIRST_BYTE_SECONDS, "is_met": first <= FIRST_BYTE_SECONDS}
    memory = result["memory_mb"]
    is_met = None if memory is None else memory <= MEMORY_MB
    result["memory"] = {"mb": memory, "wanted_mb": MEMORY_MB, "is_met": is_met}


def report(result: dict[str, Any]) -> None:
    """Numbers beside their targets."""
    print(f"first byte of a fresh server: {min(result['starts'])} s of {result['starts']}   <= {FIRST_BYTE_SECONDS} s")
    print(f"memory: {result['memory_mb']:.0f} MB, {result['memory_mb_at_start']:.0f} MB at first   <= {MEMORY_MB} MB")
    for name, found in result["pages"].items():
        median, most = TARGETS.get(name, TARGET)
        times = f"{found['median_ms']:7.1f} / {found['p95_ms']:7.1f} ms (first {found['first_ms']:.0f})"
        busy = "" if found["mean_cpu_ms"] is None else f"{found['mean_cpu_ms']:6.1f} ms of CPU"
        met = "met" if found["is_met"] else "MISSED"
        print(f"{name:<28} {times} {busy}   <= {median} / {most} ms {met}   {found['median_bytes']:,} bytes")
    if "memory_mb_with_meaning" in result:
        print(f"memory after search by meaning: {result['memory_mb_with_meaning']:.0f} MB")


if __name__ == "__main__":
    main()
