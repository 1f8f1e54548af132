"""Synthetic evidence of any size: features fire by Zipf, windows are packed from documents of one split.

Run as a program it builds one store and prints what the build cost:
`python tests/store/synthetic.py --folder /tmp/bench --features 4608 --windows 2900 --activations 11500000`.
"""

import argparse
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from saeql.store.evidence import Evidence
from saeql.store.records import SPLITS


@dataclass(frozen=True)
class Size:
    """How much evidence; `activations` is for every dictionary, before duplicates are dropped."""

    features: int = 40
    windows: int = 60
    context_tokens: int = 32
    activations: int = 8_000
    vocabulary: int = 300
    dictionaries: tuple[str, ...] = ("topk",)
    window_tokens_a_document: int = 50


WORDS = ("river", "London", "music", "running", "engines", "Tuesday", "seven", "colour", "planet", "Ärger")


def write(folder: Path, size: Size, seed: int = 0, labels: bool = True, metrics: bool = True) -> Evidence:
    """Write every evidence table of `size` into `folder`. Feature 3 is about rivers and always fires on ' river'."""
    random = np.random.default_rng(seed)
    evidence = Evidence(folder)
    tokens = _write_text(evidence, size, random)
    _write_dictionaries(evidence, size, random)
    for name in size.dictionaries:
        _write_activations(evidence, name, size, tokens, random)
    if labels:
        _write_labels(evidence, size)
    if metrics:
        names = ("fvu", "l0", "dead_share", "ce_increase", "ce_recovered")
        rows = [(d, s, m) for d in size.dictionaries for s in ("calibration", "test") for m in names]
        evidence.write(
            "metrics",
            pa.table(
                {
                    "dictionary": [r[0] for r in rows],
                    "split": [r[1] for r in rows],
                    "metric": [r[2] for r in rows],
                    "value": [0.1 * names.index(r[2]) + (r[1] == "test") for r in rows],
                    "n": [100] * len(rows),
                    "low": [None] * len(rows),
                    "high": [None] * len(rows),
                }
            ),
        )
    return evidence


def window_split(window_id: np.ndarray) -> np.ndarray:
    """Six windows of ten are train, one calibration, three test."""
    return np.array(SPLITS)[np.where(window_id % 10 < 6, 0, np.where(window_id % 10 == 6, 1, 2))]


def token_text(token_id: int) -> str:
    """' river' for 0, other words of WORDS next, then made-up ones."""
    return f" {WORDS[token_id]}" if token_id < len(WORDS) else f" tok{token_id}"


def _write_text(evidence: Evidence, size: Size, random: np.random.Generator) -> np.ndarray:
    window_ids = np.arange(size.windows, dtype=np.int32)
    splits = window_split(window_ids)
    shape = (size.windows, size.context_tokens)
    token_ids = np.minimum(random.zipf(1.3, shape) - 1, size.vocabulary - 1).astype(np.int32)
    documents = np.zeros(shape, np.int32)
    next_document = 0
    for split in SPLITS:
        mine = np.flatnonzero(splits == split)
        flat = np.arange(len(mine) * size.context_tokens) // size.window_tokens_a_document + next_document
        documents[mine] = flat.reshape(len(mine), -1)
        next_document = int(flat[-1]) + 1 if len(flat) else next_document
    evidence.write(
        "windows",
        pa.table(
            {
                "window_id": window_ids,
                "split": splits.tolist(),
                "token_ids": pa.array(list(token_ids)),
                "document_ids": pa.array(list(documents)),
            }
        ),
    )
    ids, first, counts = np.unique(documents, return_index=True, return_counts=True)
    evidence.write(
        "documents",
        pa.table(
            {
                "document_id": ids,
                "split": splits[first // size.context_tokens].tolist(),
                "title": [f"Title {i}" for i in ids],
                "source": ["synthetic"] * len(ids),
                "num_tokens": counts,
                "sha256": [f"{i:064x}" for i in ids],
            }
        ),
    )
    evidence.write(
        "vocabulary",
        pa.table({"token_id": np.arange(size.vocabulary), "token": [token_text(i) for i in range(size.vocabulary)]}),
    )
    windows = np.array([(splits == s).sum() for s in SPLITS])
    rows = windows * size.context_tokens
    evidence.write(
        "split_rows",
        pa.table(
            {
                "split": list(SPLITS),
                "num_documents": [1] * 3,
                "num_windows": windows,
                "num_rows": rows,
                "num_kept_rows": rows - windows,
                "num_first_position_rows": windows,
                "num_massive_rows": [0] * 3,
            }
        ),
    )
    return token_ids


def _write_dictionaries(evidence: Evidence, size: Size, random: np.random.Generator) -> None:
    names = list(size.dictionaries)
    text = {
        c: ["x"] * len(names) for c in ("architecture", "model_name", "model_sha256", "tokenizer_sha256", "hook_point")
    }
    numbers = {"d_in": [576] * len(names), "d_sae": [size.features] * len(names), "k": [32] * len(names)}
    evidence.write(
        "dictionaries", pa.table({"dictionary": names, **text, **numbers, "config": [json.dumps({})] * len(names)})
    )
    effects, neighbours = [], []
    for name in names:
        feature = np.repeat(np.arange(size.features), 20)
        rank = np.tile(np.arange(10), 2 * size.features)
        token_id = (feature * 7 + rank * 3 + 11) % size.vocabulary
        token_id[(feature == 3) & (rank == 0)] = 0
        effects.append(
            pa.table(
                {
                    "dictionary": [name] * len(feature),
                    "feature": feature,
                    "direction": np.tile(np.repeat(["promoted", "suppressed"], 10), size.features).tolist(),
                    "rank": rank,
                    "token_id": token_id,
                    "effect": random.random(len(feature)),
                }
            )
        )
        feature = np.repeat(np.arange(size.features), 5)
        rank = np.tile(np.arange(5), size.features)
        neighbours.append(
            pa.table(
                {
                    "dictionary": [name] * len(feature),
                    "feature": feature,
                    "rank": rank,
                    "neighbour": (feature + rank + 1) % size.features,
                    "cosine": 0.9 - 0.1 * rank,
                }
            )
        )
    evidence.write("logit_effects", pa.concat_tables(effects))
    evidence.write("neighbours", pa.concat_tables(neighbours))


def _write_activations(
    evidence: Evidence, name: str, size: Size, tokens: np.ndarray, random: np.random.Generator
) -> None:
    """Rows in (split, window, position) order in two parts; the last feature never fires, position 0 is left out."""
    share = 1 / (np.arange(size.features - 1) + 5.0) ** 0.8
    feature = random.choice(size.features - 1, size.activations, p=share / share.sum())
    window = random.integers(0, size.windows, size.activations)
    position = random.integers(1, size.context_tokens, size.activations)
    keep = (feature != 3) | (tokens[window, position] == 0)
    where = np.argwhere(tokens == 0)
    rivers = where[where[:, 1] > 0][:2000]
    feature = np.concatenate([feature[keep], np.full(len(rivers), 3)])
    window = np.concatenate([window[keep], rivers[:, 0]])
    position = np.concatenate([position[keep], rivers[:, 1]])
    split = np.where(window % 10 < 6, 2, np.where(window % 10 == 6, 0, 1))  # calibration, test, train: by name
    key = ((split * size.windows + window) * size.context_tokens + position) * size.features + feature
    _, first = np.unique(key, return_index=True)
    feature, window, position, split = feature[first], window[first], position[first], split[first]
    table = pa.table(
        {
            "dictionary": pa.DictionaryArray.from_arrays(np.zeros(len(first), np.int32), [name]).cast(pa.string()),
            "split": pa.DictionaryArray.from_arrays(split.astype(np.int32), ["calibration", "test", "train"]).cast(
                pa.string()
            ),
            "feature": feature,
            "window_id": window,
            "position": position,
            "token_id": tokens[window, position],
            "activation": random.gamma(2.0, 1.0, len(first)).astype(np.float32).clip(1e-3),
        }
    )
    half = len(first) // 2
    evidence.write("activations", table.slice(0, half), part=f"{name}-0")
    evidence.write("activations", table.slice(half), part=f"{name}-1")


def _write_labels(evidence: Evidence, size: Size) -> None:
    rows = []
    for name in size.dictionaries:
        for feature in range(size.features):
            explained = feature == 3 or feature % 4 == 0
            label = (
                "rivers and streams" if feature == 3 else f"the token {token_text(feature % size.vocabulary).strip()}"
            )
            rows.append(
                {
                    "dictionary": name,
                    "feature": feature,
                    "label": label if explained else "unexplained",
                    "kind": "lexical" if explained else "none",
                    "predicate": "{}" if explained else None,
                    "explainer": "synthetic",
                    "score_split": "test",
                    "auroc": 0.9 if explained else None,
                    "auroc_low": 0.8 if explained else None,
                    "auroc_high": 0.95 if explained else None,
                    "precision": 0.5,
                    "recall": 0.5,
                    "f1": 0.5,
                    "n_active": 10,
                    "n_inactive": 20,
                    "calibration_f1": 0.5,
                }
            )
    evidence.write("labels", pa.Table.from_pylist(rows))


def _main() -> None:
    from saeql.store.feature_store import FeatureStore

    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--windows", type=int, default=2900)
    parser.add_argument("--activations", type=int, default=11_500_000)
    parser.add_argument("--memory-limit", default="4GB")
    arguments = parser.parse_args()
    size = Size(arguments.features, arguments.windows, 128, arguments.activations, 20_000, ("topk",), 400)
    if not Evidence(arguments.folder).has("labels"):
        write(arguments.folder, size)
        print("evidence written; run again to build")
        return
    start = last = time.perf_counter()
    previous = ""

    def on_step(name: str, done: int, total: int) -> None:
        nonlocal last, previous
        now = time.perf_counter()
        if previous:
            print(f"  {previous}: {now - last:.1f} s")
        last, previous = now, name

    store = arguments.folder / "features.duckdb"
    FeatureStore.build(store, Evidence(arguments.folder), memory_limit=arguments.memory_limit, on_step=on_step)
    print(f"{time.perf_counter() - start:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"{store.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    _main()
