"""On how many test rows each feature fires, and the strongest of them as text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saeql.sae.model import SparseAutoencoder

from ..output import visible
from ..sources import ShardSource


@dataclass(frozen=True)
class Firing:
    """Of one dictionary; arrays are [d_sae]."""

    num_rows: int
    counts: np.ndarray
    strongest: np.ndarray  # [d_sae, n, 2] window id and position of the strongest rows, -1 where there are fewer

    @property
    def density(self) -> np.ndarray:
        """Share of rows that each feature fires on."""
        return self.counts / max(self.num_rows, 1)


@torch.no_grad()
def firing(dictionary: SparseAutoencoder, source: ShardSource, *, examples: int = 3, max_rows: int = 100_000) -> Firing:
    """Of the first `max_rows` rows of a source in stored order."""
    parts, num_rows = [], 0
    for batch in source.batches():
        x = batch.acts.float()
        latents = dictionary.encode(x)
        row, place = torch.nonzero(latents.values > 0, as_tuple=True)
        parts.append(
            np.stack([
                latents.indices[row, place].cpu().numpy().astype(np.float64),
                latents.values[row, place].float().cpu().numpy().astype(np.float64),
                np.asarray(batch.window_ids.cpu())[row.cpu()].astype(np.float64),
                np.asarray(batch.positions.cpu())[row.cpu()].astype(np.float64),
            ], axis=1)
        )  # fmt: skip
        num_rows += len(x)
        if num_rows >= max_rows:
            break
    found = np.concatenate(parts) if parts else np.zeros((0, 4))
    feature = found[:, 0].astype(np.int64)
    order = np.lexsort((-found[:, 1], feature))
    feature, found = feature[order], found[order]
    counts = np.bincount(feature, minlength=dictionary.d_sae)
    rank = np.arange(len(feature)) - np.repeat(np.cumsum(counts) - counts, counts)
    strongest = np.full((dictionary.d_sae, examples, 2), -1, np.int64)
    top = rank < examples
    strongest[feature[top], rank[top]] = found[top, 2:].astype(np.int64)
    return Firing(num_rows, counts, strongest)


class Contexts:
    """Rows as text: the tokens before, and the token itself in double angle brackets."""

    def __init__(self, windows: dict[int, list[int]], decode: "object", before: int = 6):
        self.windows, self.decode, self.before = windows, decode, before

    def of(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Of (window id, position) pairs; those below 0 are left out."""
        found = []
        for window, position in rows:
            if window < 0:
                continue
            ids = self.windows[int(window)]
            lead = ids[max(1, position - self.before) : position]
            decode = self.decode
            assert callable(decode)
            found.append(visible(f"{decode(lead)}<<{decode(ids[position : position + 1])}>>"))
        return found
