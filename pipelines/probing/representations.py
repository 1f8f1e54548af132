"""What a probe sees of a case: vectors of its row, or their mean over the rows of its document; dense or as latents."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack

from saeql.sae.model import SparseAutoencoder

from .activations import RowSource
from .probes import Matrix
from .tasks import Cases, Task
from .text import ProbedText

#: Names of representations.
ACTS, LATENTS, RANDOM_LATENTS = "activations", "latents", "random latents"
EMBEDDINGS, TOKENS, RANDOMISED = "token embeddings", "tokens", "randomised model"
#: Rows in memory at once.
ROWS_AT_ONCE = 4096

#: Rows of a split -> a matrix with a row for each.
OfRows = Callable[[str, np.ndarray], Matrix]


def pooled(text: ProbedText, task: Task, split: str, cases: Cases, of_rows: OfRows, *, total: bool = False) -> Matrix:
    """[n, d] a vector for each case: of its row, or the mean over the rows of its document; `total`: their sum."""
    if task.level == "token":
        return _in_parts(split, cases.cases, of_rows)
    parts = []
    for start in range(0, len(cases), 32):
        rows, groups = text.splits[split].rows_of(cases.cases[start : start + 32])
        num = len(cases.cases[start : start + 32])
        counts = np.maximum(np.bincount(groups, minlength=num), 1)
        share = np.ones(len(rows)) if total else 1 / counts[groups]
        pool = csr_matrix((share, (groups, np.arange(len(rows)))), (num, len(rows)), dtype=np.float32)
        parts.append(pool @ _in_parts(split, rows, of_rows))
    return _stacked(parts)


def _in_parts(split: str, rows: np.ndarray, of_rows: OfRows) -> Matrix:
    return _stacked([of_rows(split, rows[n : n + ROWS_AT_ONCE]) for n in range(0, max(len(rows), 1), ROWS_AT_ONCE)])


def _stacked(parts: list[Matrix]) -> Matrix:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else vstack(parts, format="csr")


def dense_rows(source: RowSource) -> OfRows:
    """The vectors themselves."""
    return source.acts


def latent_rows(source: RowSource, dictionary: SparseAutoencoder) -> OfRows:
    """The latents of a dictionary on them, sparse."""

    @torch.no_grad()
    def encode(split: str, rows: np.ndarray) -> csr_matrix:
        acts = torch.from_numpy(source.acts(split, rows)).to(dictionary.W_enc.device)
        latents = dictionary.encode(acts)
        values = latents.values.float().cpu().numpy()
        indices = latents.indices.cpu().numpy()
        row, place = np.nonzero(values > 0)
        entries = (values[row, place], (row, indices[row, place]))
        return csr_matrix(entries, (len(rows), dictionary.d_sae), dtype=np.float32)

    return encode


def token_rows(text: ProbedText) -> OfRows:
    """[n, V] sparse: 1 at the row's own token text."""

    def one_hot(split: str, rows: np.ndarray) -> csr_matrix:
        tokens = text.splits[split].windows.tokens.ravel()[rows]
        shape = (len(rows), len(text.vocabulary))
        return csr_matrix((np.ones(len(rows), np.float32), (np.arange(len(rows)), tokens)), shape)

    return one_hot


@dataclass
class Representations:
    """Everything that a case can be shown as, by name, computed once for each set of cases."""

    text: ProbedText
    of_rows: dict[str, OfRows]
    _cache: dict[tuple[str, str, bytes], Matrix] = field(default_factory=dict, repr=False)

    def of(self, name: str, task: Task, split: str, cases: Cases) -> Matrix:
        """[n, d] of representation `name`."""
        key = (name, split, cases.cases.tobytes())
        if key not in self._cache:
            of_rows = self.of_rows[name]
            self._cache[key] = pooled(self.text, task, split, cases, of_rows, total=name == TOKENS)
        return self._cache[key]

    def forget(self) -> None:
        """Free what was computed: the next task has other cases."""
        self._cache.clear()
