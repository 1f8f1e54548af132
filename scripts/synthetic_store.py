"""Evidence of a dictionary that does not exist, of any size, for `bench_store.py`: features fire by Zipf.

Written in blocks of windows, so that memory stays bounded by `BLOCK_WINDOWS` whatever the size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from saeql.store.evidence import Evidence, PartWriter
from saeql.store.records import SPLITS, TABLES

BLOCK_WINDOWS = 512
CONTEXT_TOKENS = 128
ROWS_PER_PART = 1_000_000
_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu", "dra", "pel", "gor", "shi", "tan", "wex")


@dataclass(frozen=True)
class Size:
    """How much evidence."""

    features: int = 131_072
    activations: int = 50_000_000
    active_per_row: int = 32
    zipf: float = 0.8
    vocabulary: int = 49_152
    document_tokens: int = 700
    embedding_width: int = 384
    seed: int = 0

    @property
    def windows(self) -> int:
        """Windows that give at least `activations`: every position but the first has almost `active_per_row`."""
        a_window = (CONTEXT_TOKENS - 1) * self.active_per_row * 0.985
        return int(np.ceil(self.activations / a_window))


def _part(evidence: Evidence, table: str, name: str) -> PartWriter:
    path = evidence.path(table, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return PartWriter(path, TABLES[table])


def write_evidence(folder: Path, size: Size, name: str = "synthetic", labels: bool = True) -> int:
    """Write every evidence table of `size` into `folder`; returns the number of activations."""
    evidence = Evidence(folder)
    splits = window_split(np.arange(size.windows))
    _write_text(evidence, size, splits)
    _write_dictionary(evidence, size, name)
    if labels:
        write_labels(evidence, size, name)
    return write_activations(evidence, size, name, splits)


def window_split(window_id: np.ndarray) -> np.ndarray:
    """Number of the split of every window: 14 of 20 are train, 3 calibration, 3 test."""
    place = window_id % 20
    return np.where(place < 14, 0, np.where(place < 17, 1, 2)).astype(np.int8)


def word(number: int) -> str:
    """A pronounceable word for every number, longer for larger ones."""
    made, left = "", number + 1
    while left:
        left, place = divmod(left, len(_SYLLABLES))
        made += _SYLLABLES[place]
    return made


def zipf_table(num: int, exponent: float, size: int = 2**22) -> np.ndarray:
    """[size] int32: item i as often as `(i + 1) ** -exponent` asks for, to draw from by a random index."""
    share = np.cumsum((np.arange(num) + 1.0) ** -exponent)
    return np.searchsorted(share / share[-1], (np.arange(size) + 0.5) / size).astype(np.int32)


def _token_blocks(size: Size) -> Iterator[tuple[int, np.ndarray]]:
    """(first window, token ids [W, T]) block by block, the same every time."""
    random = np.random.default_rng([size.seed, 1])
    table = zipf_table(size.vocabulary, 1.0, 2**20)
    for first in range(0, size.windows, BLOCK_WINDOWS):
        count = min(BLOCK_WINDOWS, size.windows - first)
        yield first, table[random.integers(0, len(table), (count, CONTEXT_TOKENS))]


def write_activations(evidence: Evidence, size: Size, name: str, splits: np.ndarray, seed: int = 2) -> int:
    """Parts of every split, each in (window, position) order as `saeql index` writes them."""
    random = np.random.default_rng([size.seed, seed])
    table = zipf_table(size.features, size.zipf)
    shuffle = random.permutation(size.features).astype(np.int32)  # hot features are anywhere
    writers, rows_in_part, parts, written = {}, dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), 0
    for first, tokens in _token_blocks(size):
        count = len(tokens)
        draws = random.integers(0, len(table), (count * (CONTEXT_TOKENS - 1), size.active_per_row), np.int32)
        feature = np.sort(shuffle[table[draws]], axis=1)
        keep = np.ones(feature.shape, bool)
        keep[:, 1:] = feature[:, 1:] != feature[:, :-1]
        activation = random.standard_gamma(1.5, feature.shape, np.float32) + np.float32(0.05)
        window = np.repeat(np.arange(first, first + count, dtype=np.int32), CONTEXT_TOKENS - 1)
        position = np.tile(np.arange(1, CONTEXT_TOKENS, dtype=np.int16), count)
        token = tokens[:, 1:].ravel()
        split_of_row = splits[window]
        for number, split in enumerate(SPLITS):
            mine = split_of_row == number
            if not mine.any():
                continue
            kept = keep[mine]
            per_row = kept.sum(axis=1)
            if split not in writers:
                writers[split] = _part(evidence, "activations", f"{name}-{split}-{parts[split]:05d}")
            writers[split].add(
                pa.table(
                    {
                        "dictionary": _repeated(name, int(per_row.sum())),
                        "split": _repeated(split, int(per_row.sum())),
                        "feature": feature[mine][kept],
                        "window_id": np.repeat(window[mine], per_row),
                        "position": np.repeat(position[mine], per_row),
                        "token_id": np.repeat(token[mine], per_row),
                        "activation": activation[mine][kept],
                    }
                )
            )
            written += int(per_row.sum())
            rows_in_part[split] += len(per_row)
            if rows_in_part[split] >= ROWS_PER_PART:
                writers.pop(split).publish()
                parts[split], rows_in_part[split] = parts[split] + 1, 0
    for writer in writers.values():
        writer.publish()
    return written


def _repeated(text: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array([text]))


def _write_text(evidence: Evidence, size: Size, splits: np.ndarray) -> None:
    """Documents of one split fill its windows one after the other."""
    offset = np.zeros(size.windows, np.int64)  # of each window in the text of its split
    for number in range(len(SPLITS)):
        mine = np.flatnonzero(splits == number)
        offset[mine] = np.arange(len(mine)) * CONTEXT_TOKENS
    part = _part(evidence, "windows", "part-00000")
    documents: dict[tuple[int, int], int] = {}
    for first, tokens in _token_blocks(size):
        rows = range(first, first + len(tokens))
        owners = np.empty(tokens.shape, np.int32)
        for place, window in enumerate(rows):
            number = (offset[window] + np.arange(CONTEXT_TOKENS)) // size.document_tokens
            owners[place] = number * len(SPLITS) + splits[window]
            for key in np.unique(number):
                documents[int(key), int(splits[window])] = documents.get((int(key), int(splits[window])), 0) + int(
                    (number == key).sum()
                )
        part.add(
            pa.table(
                {
                    "window_id": np.arange(first, first + len(tokens), dtype=np.int32),
                    "split": [SPLITS[s] for s in splits[first : first + len(tokens)]],
                    "token_ids": pa.array(list(tokens)),
                    "document_ids": pa.array(list(owners)),
                }
            )
        )
    part.publish()
    keys = sorted(documents)
    evidence.write(
        "documents",
        pa.table(
            {
                "document_id": [n * len(SPLITS) + s for n, s in keys],
                "split": [SPLITS[s] for _, s in keys],
                "title": [f"Page {n * len(SPLITS) + s}" for n, s in keys],
                "source": ["synthetic"] * len(keys),
                "num_tokens": [documents[key] for key in keys],
                "sha256": [f"{n * len(SPLITS) + s:064x}" for n, s in keys],
            }
        ),
    )
    ids = np.arange(size.vocabulary, dtype=np.int32)
    evidence.write("vocabulary", pa.table({"token_id": ids, "token": [f" {word(i)}" for i in ids.tolist()]}))
    windows = np.bincount(splits, minlength=len(SPLITS))
    evidence.write(
        "split_rows",
        pa.table(
            {
                "split": list(SPLITS),
                "num_documents": [sum(s == n for _, s in keys) for n in range(len(SPLITS))],
                "num_windows": windows,
                "num_rows": windows * CONTEXT_TOKENS,
                "num_kept_rows": windows * (CONTEXT_TOKENS - 1),
                "num_first_position_rows": windows,
                "num_massive_rows": [0] * len(SPLITS),
            }
        ),
    )


def _write_dictionary(evidence: Evidence, size: Size, name: str) -> None:
    random = np.random.default_rng([size.seed, 3])
    text = {c: ["synthetic"] for c in ("model_name", "model_sha256", "tokenizer_sha256", "hook_point", "architecture")}
    numbers = {"d_in": [576], "d_sae": [size.features], "k": [size.active_per_row], "config": ["{}"]}
    evidence.write("dictionaries", pa.table({"dictionary": [name], **text, **numbers}))
    count = size.features * 20
    evidence.write(
        "logit_effects",
        pa.table(
            {
                "dictionary": _repeated(name, count),
                "feature": np.repeat(np.arange(size.features, dtype=np.int32), 20),
                "direction": np.tile(np.repeat(["promoted", "suppressed"], 10), size.features).tolist(),
                "rank": np.tile(np.arange(10), 2 * size.features),
                "token_id": random.integers(0, size.vocabulary, count),
                "effect": random.random(count, np.float32),
            }
        ),
    )
    count = size.features * 10
    evidence.write(
        "neighbours",
        pa.table(
            {
                "dictionary": _repeated(name, count),
                "feature": np.repeat(np.arange(size.features, dtype=np.int32), 10),
                "rank": np.tile(np.arange(10), size.features),
                "neighbour": random.integers(0, size.features, count),
                "cosine": np.tile(0.9 - 0.05 * np.arange(10), size.features),
            }
        ),
    )


def write_embeddings(evidence: Evidence, size: Size, name: str, model: str = "synthetic") -> None:
    """A random unit vector for every feature, said to be of `model`."""
    random = np.random.default_rng([size.seed, 5])
    vectors = random.standard_normal((size.features, size.embedding_width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    evidence.write(
        "embeddings",
        pa.table(
            {
                "dictionary": _repeated(name, size.features),
                "feature": np.arange(size.features, dtype=np.int32),
                "source": _repeated("label", size.features),
                "model": _repeated(model, size.features),
                "vector": pa.array([row.tobytes() for row in vectors.astype("<f2")], pa.binary()),
            }
        ),
    )


def write_labels(evidence: Evidence, size: Size, name: str, seed: int = 4) -> None:
    """A label of three to eight words for every feature, one in ten unexplained."""
    random = np.random.default_rng([size.seed, seed])
    words = zipf_table(size.vocabulary, 1.0, 2**20)
    kinds = np.array(["lexical", "structural", "semantic"])[random.integers(0, 3, size.features)]
    labels = []
    for length in random.integers(3, 9, size.features):
        labels.append(" ".join(word(int(w)) for w in words[random.integers(0, len(words), length)]))
    known = np.arange(size.features) % 10 != 0
    score = random.random(size.features, np.float32) / 2 + 0.5
    evidence.write(
        "labels",
        pa.table(
            {
                "dictionary": _repeated(name, size.features),
                "feature": np.arange(size.features, dtype=np.int32),
                "label": np.where(known, np.array(labels), "unexplained").tolist(),
                "kind": np.where(known, kinds, "none").tolist(),
                "predicate": pa.nulls(size.features, pa.string()),
                "explainer": ["synthetic"] * size.features,
                "score_split": ["test"] * size.features,
                **dict.fromkeys(("auroc", "precision", "recall", "f1", "calibration_f1"), score),
                "auroc_low": score - np.float32(0.05),
                "auroc_high": score + np.float32(0.05),
                "n_active": random.integers(10, 1000, size.features),
                "n_inactive": random.integers(10, 1000, size.features),
            }
        ),
    )
