"""What is read of texts to learn a guard: each feature's largest value, the mean activation row, the words."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from saeql.sae.hooks import capture
from saeql.sae.model import SparseAutoencoder

from ..models import LanguageModel
from .guard import GuardError, window_means

_WORD = re.compile(r"[^\W\d_]+")
#: Columns that are made dense at once.
_COLUMNS_AT_ONCE = 1024


@dataclass(frozen=True)
class ReadTexts:
    """n texts."""

    largest: dict[int, csr_matrix]
    """By window: [n, d_sae], the largest mean of a feature over so many consecutive tokens."""
    rows: np.ndarray  # [n, d_in] float32: mean activation over a text's tokens
    words: list[set[str]]  # different words, in lower case


@torch.no_grad()
def read(
    lm: LanguageModel,
    dictionary: SparseAutoencoder,
    reads: Sequence[str],
    texts: Sequence[str],
    *,
    windows: Sequence[int],
    max_tokens: int,
    batch_tokens: int = 2048,
    advance: Callable[[int], object] = lambda _: None,
) -> ReadTexts:
    """The first `max_tokens` tokens of each text behind a BOS, which does not count.

    Raises GuardError for a text without tokens.
    """
    ids = [lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens] for text in texts]
    empty = next((n for n, own in enumerate(ids) if not own), None)
    if empty is not None:
        raise GuardError(f"the text {texts[empty][:60]!r} has no tokens")
    largest = {window: _Rows(len(texts)) for window in windows}
    rows = np.zeros((len(texts), dictionary.d_in), np.float32)
    with capture(lm.model, list(reads), lm.device) as reader:
        for batch in _batches([len(own) + 1 for own in ids], batch_tokens):
            width = 1 + max(len(ids[n]) for n in batch)
            padded = torch.full((len(batch), width), lm.separator_id, device=lm.input_device)
            mask = torch.zeros_like(padded)
            for row, n in enumerate(batch):  # on the right: positions stay as they are
                own = [lm.bos_id, *ids[n]]
                padded[row, : len(own)] = torch.tensor(own)
                mask[row, : len(own)] = 1
            found = reader.run(padded, mask)
            acts = torch.cat([found[name].float() for name in reads], dim=-1)
            for row, n in enumerate(batch):
                x = acts[row, 1 : 1 + len(ids[n])]
                rows[n] = x.mean(0).cpu().numpy()
                _add_largest(largest, n, dictionary, x)
            advance(len(batch))
    words = [set(_WORD.findall(text.lower())) for text in texts]
    return ReadTexts({window: made.matrix(dictionary.d_sae) for window, made in largest.items()}, rows, words)


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of texts, those of like length together."""
    order, batches = sorted(range(len(lengths)), key=lambda n: lengths[n]), [[]]
    for n in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[n] > batch_tokens:
            batches.append([])
        batches[-1].append(n)
    return [batch for batch in batches if batch]


def _add_largest(largest: "dict[int, _Rows]", n: int, dictionary: SparseAutoencoder, x: torch.Tensor) -> None:
    """Put text n with rows x [T, d_in] into the matrix of every window."""
    latents = dictionary.encode(x)
    active = latents.indices[latents.values > 0].unique()
    for columns in active.split(_COLUMNS_AT_ONCE):
        place = torch.searchsorted(columns, latents.indices).clamp_max(len(columns) - 1)
        here = columns[place] == latents.indices
        dense = torch.zeros(len(x), len(columns), device=x.device)
        dense.scatter_add_(1, place, latents.values.float() * here)
        for window, made in largest.items():
            before = torch.zeros(window - 1, len(columns), device=x.device)
            means = window_means(torch.cat([before, dense])[None], window)[0]
            made.add(n, columns.cpu().numpy(), means.amax(0).cpu().numpy())


class _Rows:
    """A sparse matrix that is filled row by row, in any order."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self.parts: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, row: int, columns: np.ndarray, values: np.ndarray) -> None:
        self.parts.append((row, columns, values))

    def matrix(self, width: int) -> csr_matrix:
        rows = np.repeat([row for row, _, _ in self.parts], [len(columns) for _, columns, _ in self.parts])
        columns = np.concatenate([columns for _, columns, _ in self.parts] or [np.zeros(0, np.int64)])
        values = np.concatenate([values for _, _, values in self.parts] or [np.zeros(0, np.float32)])
        return csr_matrix((values, (rows, columns)), shape=(self.num_rows, width))
