"""Evidence of a made-up run whose features fire for known reasons: what the labeller must find and must not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from saeql.store.evidence import Evidence
from saeql.store.records import ACTIVATIONS, DICTIONARIES, DOCUMENTS, VOCABULARY, WINDOWS

CONTEXT = 64
DICTIONARY = "planted"


def _words(text: str) -> list[str]:
    return text.split()


_STEMS = _words("work sing read jump build paint teach cook fish hunt sail climb count draw print")
_FILLER = _words(
    "a of and to in that it was for on with as his her they at by from we this have not are but had one all were when "
    "there can more if no man out other so what time up go about than into could state only new year some take come "
    "these know see use get like then first any work now may such give over think most even find day also after way "
    "many must look before great back through long where much should well people down own just because good each"
)
_NAMES = _words("Paris Anna Berlin Newton Darwin Oslo Maria Peter Kenya Rome Mozart Plato")
_OTHER = [",", ".", "\n", " (", ")", ' "', " -", ";", "?"]


def _lexicon() -> tuple[list[str], np.ndarray]:
    groups: list[tuple[list[str], float]] = [
        ([f" {w}" for w in dict.fromkeys(_FILLER)], 0.46),
        ([f" {s}{e}" for s in _STEMS for e in ("ing", "s", "ed", "er")], 0.12),
        ([" walk", " walks", " walked", " walking"], 0.04),
        ([f" {n}" for n in _NAMES], 0.06),
        ([str(n) for n in (3, 7, 12, 40, 99, 250, 1880, 1914, 1999, 2004)], 0.08),
        ([" the"], 0.06),
        ([" bank"], 0.03),
        ([" river"], 0.03),
        (_OTHER, 0.12),
    ]
    texts = [t for group, _ in groups for t in group]
    weights = np.concatenate([np.full(len(group), share / len(group)) for group, share in groups])
    return texts, weights / weights.sum()


#: Planted feature -> fires(token, previous token).
PLANTS: list[tuple[str, Callable[[str, str], bool]]] = [
    ("token", lambda t, p: t == " river"),
    ("stem", lambda t, p: t.strip().startswith("walk")),
    ("suffix", lambda t, p: t.endswith("ing")),
    ("number", lambda t, p: t.isdigit()),
    ("after the", lambda t, p: p == " the"),
    ("capitalised", lambda t, p: t.strip()[:1].isupper()),
    ("pair", lambda t, p: t == " bank" and p == " river"),
    ("comma after number", lambda t, p: t == "," and p.isdigit()),
    ("set", lambda t, p: t in (" man", " year", ";", " day")),
]
RANDOM = [len(PLANTS) + i for i in range(20)]  # features that fire at random positions
DEAD = RANDOM[-1] + 1
NUM_FEATURES = DEAD + 1


def feature(name: str) -> int:
    """Number of a planted feature."""
    return [n for n, _ in PLANTS].index(name)


def _documents(rng: np.random.Generator, num: int) -> list[np.ndarray]:
    texts, weights = _lexicon()
    river, bank = texts.index(" river"), texts.index(" bank")
    comma, numbers = texts.index(","), [i for i, t in enumerate(texts) if t.isdigit()]
    made = []
    for _ in range(num):
        ids = rng.choice(len(texts), size=rng.integers(300, 700), p=weights)
        after = np.concatenate([[-1], ids[:-1]])
        luck = rng.random(len(ids))
        ids = np.where((after == river) & (luck < 0.4), bank, ids)
        ids = np.where(np.isin(after, numbers) & (luck < 0.3), comma, ids)
        made.append(ids)
    return made


def _pack(documents: list[np.ndarray], first_document: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, document ids), each [W, CONTEXT]; the tail is dropped."""
    tokens = np.concatenate(documents)
    owner = np.concatenate([np.full(len(d), first_document + i) for i, d in enumerate(documents)])
    size = len(tokens) // CONTEXT * CONTEXT
    return tokens[:size].reshape(-1, CONTEXT), owner[:size].reshape(-1, CONTEXT)


def _fires(rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """[W, T, F] float32 activations: planted ones with 3 % misses and 0.05 % stray rows, weak noise everywhere."""
    texts, _ = _lexicon()
    out = np.zeros((*ids.shape, NUM_FEATURES), np.float32)
    tokens = [[texts[i] for i in row] for row in ids]
    for f, (_, fires) in enumerate(PLANTS):
        truth = [[fires(t, row[p - 1] if p else "") for p, t in enumerate(row)] for row in tokens]
        luck = rng.random(ids.shape)
        out[:, :, f] = np.where(np.array(truth), luck > 0.03, luck < 0.0005) * rng.uniform(3, 8, ids.shape)
    for f in RANDOM:
        out[:, :, f] = (rng.random(ids.shape) < 0.02) * rng.uniform(3, 8, ids.shape)
    weak = (rng.random(out.shape) < 0.02) * rng.uniform(0.01, 0.4, out.shape).astype(np.float32)
    weak[:, :, DEAD] = 0
    out = np.where(out > 0, out, weak)
    out[:, 0] = 0
    return out


def _activations(split: str, acts: np.ndarray, ids: np.ndarray, first_window: int) -> pa.Table:
    window, position, feature = np.nonzero(acts)
    columns = {
        "dictionary": pa.array([DICTIONARY] * len(window)),
        "split": pa.array([split] * len(window)),
        "feature": feature.astype(np.int32),
        "window_id": (window + first_window).astype(np.int32),
        "position": position.astype(np.int16),
        "token_id": ids[window, position].astype(np.int32),
        "activation": acts[window, position, feature],
    }
    return pa.table(columns, schema=ACTIVATIONS)


def shuffled(rng: np.random.Generator, acts: np.ndarray) -> np.ndarray:
    """Every row's activations moved to another row (positions > 0): what a feature says about its row is destroyed."""
    rows = acts[:, 1:].reshape(-1, acts.shape[2])
    out = acts.copy()
    out[:, 1:] = rows[rng.permutation(len(rows))].reshape(acts[:, 1:].shape)
    return out


def build(
    folder: Path,
    *,
    seed: int = 0,
    change: Callable[[str, np.ndarray, np.ndarray, np.random.Generator], np.ndarray] | None = None,
) -> Evidence:
    """Write documents, windows, vocabulary, dictionaries and activations of 100 documents (60 / 20 / 20).

    `change(split, ids [W, T], activations [W, T, F], rng)` returns the activations to write in their place.
    """
    rng = np.random.default_rng(seed)
    evidence, texts = Evidence(folder), _lexicon()[0]
    windows, documents, first_window, first_document = [], [], 0, 0
    for split, num in (("train", 60), ("calibration", 20), ("test", 20)):
        ids, owner = _pack(_documents(rng, num), first_document)
        acts = _fires(rng, ids)
        if change is not None:
            acts = change(split, ids, acts, np.random.default_rng(seed + 1))
        evidence.write("activations", _activations(split, acts, ids, first_window), part=split)
        for w, (row, own) in enumerate(zip(ids.tolist(), owner.tolist(), strict=True)):
            windows.append({"window_id": first_window + w, "split": split, "token_ids": row, "document_ids": own})
        for d in range(first_document, first_document + num):
            documents.append({"document_id": d, "split": split, "title": f"Page {d}", "num_tokens": 1})
        first_window, first_document = first_window + len(ids), first_document + num
    evidence.write("windows", pa.Table.from_pylist(windows, schema=WINDOWS))
    evidence.write("documents", pa.Table.from_pylist(documents, schema=DOCUMENTS))
    vocabulary = [{"token_id": i, "token": t} for i, t in enumerate(texts)]
    evidence.write("vocabulary", pa.Table.from_pylist(vocabulary, schema=VOCABULARY))
    dictionary = [{"dictionary": DICTIONARY, "d_sae": NUM_FEATURES, "architecture": "topk"}]
    evidence.write("dictionaries", pa.Table.from_pylist(dictionary, schema=DICTIONARIES))
    return evidence
