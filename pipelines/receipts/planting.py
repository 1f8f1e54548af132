"""Features planted in real text: synthetic activations where a concept holds, and at random rows that hold nothing.

A RANDOM feature fires as often as one of the concepts does, on tokens of the same frequencies, and for no reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from saeql.store.records import SPLITS

from ..split_rows import ActiveRows, FeatureRows, SplitRows
from .planted_concepts import CONCEPTS, Concept, Context
from .row_text import Words

NUM_RANDOM = 20
#: Share of a concept's rows on which its feature is silent, and rows elsewhere on which it fires, to as many.
MISSES, STRAYS = 0.03, 0.03
#: Active rows that a concept needs on train and calibration, and on test, to be planted at all.
FEWEST_ROWS, FEWEST_TEST_ROWS = 10, 5
_DECILES = 10


@dataclass(frozen=True)
class Planted:
    """Features of known meaning: first one a concept, in the order of `concepts`, then the RANDOM ones."""

    rows: FeatureRows
    concepts: tuple[Concept, ...]  # those that the text holds often enough
    absent: tuple[Concept, ...]
    truth: dict[str, list[np.ndarray]]  # split -> rows where each concept holds

    @property
    def random(self) -> range:
        """Numbers of the RANDOM features."""
        return range(len(self.concepts), self.rows.num_features)


def plant(
    text: FeatureRows, *, concepts: Sequence[Concept] = CONCEPTS, num_random: int = NUM_RANDOM, seed: int = 0
) -> Planted:
    """Plant concepts in the windows of `text`, whose own features do not matter. A pure function of text and seed."""
    truth = {split: _rows_of(text.of(split), concepts) for split in SPLITS}
    fewest = {"train": FEWEST_ROWS, "calibration": FEWEST_ROWS, "test": FEWEST_TEST_ROWS}
    kept = [
        i
        for i in range(len(concepts))
        if all(len(truth[s][i]) - round(MISSES * len(truth[s][i])) >= fewest[s] for s in SPLITS)
    ]
    truth = {split: [found[i] for i in kept] for split, found in truth.items()}
    splits = {}
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([seed, number])
        splits[split] = _planted_split(text.of(split), truth[split], num_random if kept else 0, rng)
    tau = np.ones(len(kept) + (num_random if kept else 0), np.float32)
    return Planted(
        FeatureRows("planted", tau, **splits),
        tuple(concepts[i] for i in kept),
        tuple(c for i, c in enumerate(concepts) if i not in kept),
        truth,
    )


def _rows_of(split: SplitRows, concepts: Sequence[Concept]) -> list[np.ndarray]:
    context = Context.of(Words.of(split.windows))
    return [np.flatnonzero(c.rows(context).ravel() & split.eligible) for c in concepts]


def _token_deciles(split: SplitRows) -> np.ndarray:
    """[V] int: decile of every token by how often it occurs; the rows of a decile are about a tenth of all."""
    tokens = split.windows.tokens.ravel()[split.eligible]
    counts = np.bincount(tokens, minlength=len(split.windows.vocabulary))
    order = np.argsort(counts, kind="stable")
    deciles = np.zeros(len(counts), np.int64)
    deciles[order] = (np.cumsum(counts[order]) - counts[order]) * _DECILES // max(len(tokens), 1)
    return deciles


def _planted_split(split: SplitRows, truth: list[np.ndarray], num_random: int, rng: np.random.Generator) -> SplitRows:
    deciles = _token_deciles(split)
    eligible = np.flatnonzero(split.eligible)
    own = []
    for rows in truth:
        strays = rng.choice(eligible, min(round(STRAYS * len(rows)), len(eligible)), replace=False)
        silent = rng.choice(rows, round(MISSES * len(rows)), replace=False)
        own.append(np.union1d(np.setdiff1d(rows, silent), strays))
    decile = deciles[split.windows.tokens.ravel()[eligible]]
    of_decile = [eligible[decile == d] for d in range(_DECILES)]
    for i in range(num_random):
        model = own[i % len(truth)]
        wanted = np.bincount(deciles[split.windows.tokens.ravel()[model]], minlength=_DECILES)
        parts = [rng.choice(of_decile[d], n, replace=False) for d, n in enumerate(wanted.tolist()) if n]
        own.append(np.sort(np.concatenate(parts)))
    features = np.repeat(np.arange(len(own)), [len(r) for r in own]).astype(np.int32)
    rows = np.concatenate([*own, np.zeros(0, np.int64)]).astype(np.int32)
    values = rng.uniform(3, 8, len(rows)).astype(np.float32)
    nothing = ActiveRows(rows[:0], rows[:0], values[:0], len(own))
    return replace(split, active=ActiveRows(features, rows, values, len(own)), weak=nothing)
