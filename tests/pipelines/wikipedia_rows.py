"""Real text without a language model: articles of the embedded Wikipedia in windows of words and marks."""

import re
from itertools import chain, islice
from pathlib import Path

import numpy as np

from saeql.pipelines.corpus import CorpusConfig, documents
from saeql.pipelines.receipts.planted_concepts import CONCEPTS, Context
from saeql.pipelines.receipts.row_text import Words
from saeql.pipelines.split_rows import ActiveRows, FeatureRows, SplitRows
from saeql.pipelines.token_classes import RowTable, Vocabulary
from saeql.store.records import SPLITS

CONTEXT = 64
#: Articles that a sample is taken from.
ARTICLES = 60
_TOKEN = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]|\s+|_")


def wikipedia_rows(max_tokens: int = 0) -> FeatureRows:
    """All articles (`max_tokens` 0), or about so many tokens: windows that hold the planted concepts, and the letters.

    Articles name too few days of the week: `planted_letters.txt` has three bundles of letters, one a split. No feature
    is active anywhere. Which windows are taken depends on the text alone, split by split.
    """
    windows: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    owners: dict[str, list[int]] = {split: [] for split in SPLITS}
    articles = ((d.split, d.document_id, d.text) for d in documents(CorpusConfig()))
    letters = (Path(__file__).parent / "planted_letters.txt").read_text(encoding="utf-8").split("\n", 1)[1]
    bundles = zip(SPLITS, letters.split("---\n"), strict=True)
    written = [(s, 1_000_000 + 10 * i + j, t) for i, (s, b) in enumerate(bundles) for j, t in enumerate(b.splitlines())]
    for split, owner, text in chain(islice(articles, ARTICLES if max_tokens else None), written):
        tokens = _TOKEN.findall(text)
        for start in range(0, len(tokens) - CONTEXT + 1, CONTEXT):
            windows[split].append(tokens[start : start + CONTEXT])
            owners[split].append(owner)
    texts = sorted({t for split in SPLITS for w in windows[split] for t in w})
    vocabulary = Vocabulary(range(len(texts)), texts)
    shares = {"train": 0.5, "calibration": 0.25, "test": 0.25}
    splits = {}
    for split in SPLITS:
        table = RowTable(vocabulary, np.array([[vocabulary.index[t] for t in w] for w in windows[split]], np.int32))
        documents_of = np.array(owners[split], np.int64)
        if max_tokens:
            kept = _richest(table, int(max_tokens * shares[split]) // CONTEXT)
            table, documents_of = RowTable(vocabulary, table.tokens[kept]), documents_of[kept]
        splits[split] = silent_split(split, table, documents_of)
    return FeatureRows("none", np.zeros(0, np.float32), **splits)


def silent_split(split: str, windows: RowTable, document_ids: np.ndarray) -> SplitRows:
    """A split on which nothing fires; `document_ids` [W]."""
    eligible = windows.valid.copy()
    eligible[:, 0] = False
    eligible = eligible.ravel()
    names, dense = np.unique(document_ids, return_inverse=True)
    rows = np.where(eligible, np.repeat(dense, windows.tokens.shape[1]), -1).astype(np.int32)
    none = ActiveRows(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), 0)
    return SplitRows(split, windows, np.arange(len(dense)), eligible, rows, len(names), none, none)


def _richest(table: RowTable, num: int) -> np.ndarray:
    """`num` windows: for the rarest concept first as many as its share allows, then any."""
    context = Context.of(Words.of(table))
    held = np.stack([c.rows(context)[:, 1:].sum(axis=1) for c in CONCEPTS])  # [concepts, W]
    order = np.random.default_rng(0).permutation(held.shape[1])
    taken: dict[int, None] = {}
    for concept in np.argsort(held.sum(axis=1), kind="stable"):
        own = [w for w in order[np.argsort(-held[concept, order], kind="stable")].tolist() if held[concept, w]]
        own = [w for w in own if w not in taken]
        taken.update(dict.fromkeys(own[: num // (len(CONCEPTS) + 1)]))
    taken.update(dict.fromkeys(order[: num + len(taken)].tolist()))
    return np.sort(np.array([*taken][:num]))
