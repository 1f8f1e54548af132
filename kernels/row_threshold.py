"""The k largest of each row on a CPU, where k is too large a share of a row for pruning: by a threshold, unsorted.

Two limits are closed in on the k-th largest element of every row by counting: a comparison written as numbers and a
sum. Between two limits counts are nearly linear, so three or four passes leave few elements between them; these are
sorted. bfloat16 elements become float32 numbers that hold their column in the bits that were free, so that no two are
equal. Rows where it does not work (many equal elements, NaN) go to `torch.topk`.
"""

import math
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_ROWS = 128
MAX_PASSES = 8
#: Elements between the two limits of a row that are sorted.
BETWEEN = 64
#: Elements by which a limit is aimed beside the k-th largest, so that it comes to lie on the side that is wanted.
MARGIN = 6
#: Below these, `torch.topk` costs no more.
LEAST_K, LEAST_ELEMENTS = 64, 2**17

_Floats = NDArray[np.float32]
_Rows = NDArray[np.intp]


def worthwhile(scores: Tensor, k: int) -> bool:
    """Whether this beats `torch.topk`: a CPU, many elements, a large share of them kept, keys that can be made."""
    n, columns = scores.shape
    return (
        scores.device.type == "cpu"
        and not scores.requires_grad
        and LEAST_K <= k < columns < 64 * k
        and n * columns >= LEAST_ELEMENTS
        and (scores.dtype == torch.float32 or (scores.dtype == torch.bfloat16 and columns <= 2**16))
    )


def _keys(scores: Tensor) -> Tensor:
    """[N, columns] float32 in the order of the scores; of equal bfloat16 elements the first is larger, if positive."""
    if scores.dtype == torch.float32:
        return scores
    keys, columns = torch.empty(scores.shape, dtype=torch.float32), scores.shape[1]
    # evenly spaced, so that counts stay linear
    places = 0xFFFF - torch.arange(columns, dtype=torch.int32) * (2**16 // columns)
    least = torch.finfo(torch.bfloat16).min  # minus infinity with other bits would be NaN
    for part, own in zip(scores.split(CHUNK_ROWS), keys.split(CHUNK_ROWS), strict=True):
        own.copy_(part).clamp_(min=least).view(torch.int32).bitwise_or_(places)
    return keys


def _counts(keys: Tensor, limits: _Floats) -> _Floats:
    """How many elements of each row reach its limit; NaN does."""
    below = torch.empty(min(len(keys), CHUNK_ROWS), keys.shape[1])
    counts, bounds = torch.empty(len(keys)), torch.from_numpy(limits)[:, None]
    for start in range(0, len(keys), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        # into numbers: this vectorises where a mask of bools does not
        own = torch.lt(keys[part], bounds[part], out=below[: len(bounds[part])])
        torch.sum(own, 1, out=counts[part])
    return np.float32(keys.shape[1]) - counts.numpy()


class _Bounds:
    """For every row a limit `low` that at least k elements reach and `high` that fewer reach, closing in."""

    def __init__(self, keys: Tensor, k: int):
        columns = keys.shape[1]
        self.k = k
        # the first guess and step are those of a normal distribution like that of some of the columns
        sample = keys[:, : max(columns // 8, min(columns, 128))]
        mean = sample.mean(1).numpy()
        square = torch.linalg.vector_norm(sample, dim=1).square_().div_(sample.shape[1]).numpy()
        std = np.sqrt(np.maximum(square - mean * mean, 0))
        above = NormalDist().inv_cdf(1 - k / columns)
        self.limits: _Floats = mean + np.float32(above) * std
        self.step: _Floats = std * np.float32(1 / (columns * NormalDist().pdf(above)))  # between two elements
        self.low, self.high = np.full_like(mean, -math.inf), np.full_like(mean, math.inf)
        self.num_low, self.num_high = np.full_like(mean, columns), np.zeros_like(mean)

    @property
    def open(self) -> NDArray[np.bool_]:
        """Rows with too many elements between their limits."""
        return ~(self.num_low - self.num_high <= BETWEEN)

    def advance(self, counts: _Floats, number: int) -> None:
        """Close in by what was counted at `limits`, and choose the next ones."""
        excess = counts - np.float32(self.k)
        many, few = excess >= 0, excess < 0
        np.copyto(self.low, self.limits, where=many)
        np.copyto(self.num_low, counts, where=many)
        np.copyto(self.high, self.limits, where=few)
        np.copyto(self.num_high, counts, where=few)
        margin = np.float32(MARGIN)
        beyond = self.limits + (excess + np.where(many, margin, -margin)) * self.step * np.float32(1.5**number)
        # the limit that is farther off comes close
        above, between = self.num_low - np.float32(self.k), self.num_low - self.num_high
        wanted = above + np.where(above > between - above, -margin, margin)
        # where counts are far from linear, halves close in faster
        share = np.float32(0.5) if number % 3 == 2 else np.clip(wanted / between, np.float32(0.02), np.float32(0.98))
        width = self.high - self.low
        self.limits = np.where(width < math.inf, self.low + width * share, beyond)


def _inside(keys: _Floats, low: _Floats, high: _Floats) -> _Rows:
    """Flat places of the elements from `low` on below `high`, rising."""
    found, columns = [], keys.shape[1]
    for start in range(0, len(keys), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        mask = keys[part] >= low[part, None]
        mask &= keys[part] < high[part, None]
        found.append(np.flatnonzero(mask) + start * columns)
    return np.concatenate(found)


def _limits(keys: Tensor, k: int) -> tuple[_Floats, _Rows]:
    """[N]: limits that exactly k elements reach; and the rows of which none was found."""
    n, columns = keys.shape
    with np.errstate(all="ignore"):  # of rows that hold infinite elements or NaN
        bounds = _Bounds(keys, k)
        for number in range(MAX_PASSES):
            bounds.advance(_counts(keys, bounds.limits), number)
            if np.count_nonzero(bounds.open) <= n // 32:
                break
        found = ~bounds.open
    low, high = (np.where(found, bound, np.float32(0)) for bound in (bounds.low, bounds.high))
    inside = _inside(keys.numpy(), low, high)
    rows = inside // columns
    between = np.full((n, BETWEEN + 1), -math.inf, np.float32)
    between[rows, np.arange(len(rows)) - np.searchsorted(rows, np.arange(n))[rows]] = keys.numpy().reshape(-1)[inside]
    between.sort(axis=1)
    place = np.where(found, bounds.num_high + (BETWEEN + 1 - k), 1).astype(np.intp)[:, None]
    limits, next_one = (np.take_along_axis(between, place - step, axis=1)[:, 0] for step in (0, 1))
    return limits, np.flatnonzero(~found | (limits == next_one))


def threshold_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `scores` [N, columns]: values and int64 indices [N, k], in no particular order."""
    n, columns = scores.shape
    scores = scores.contiguous()
    keys = _keys(scores)
    limits, rest = _limits(keys, k)
    values, indices = torch.empty(n, k, dtype=scores.dtype), torch.empty(n, k, dtype=torch.int64)
    for start in range(0, n, CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        reached = ~(keys[part].numpy() < limits[part, None])
        reached[rest[(start <= rest) & (rest < start + CHUNK_ROWS)] - start] = np.arange(columns) < k  # any, for now
        flat = torch.from_numpy(np.flatnonzero(reached))  # several times faster than torch.nonzero
        torch.index_select(scores[part].view(-1), 0, flat, out=values[part].view(-1))
        torch.sub(flat.view(-1, k), torch.arange(0, reached.size, columns)[:, None], out=indices[part])
    if len(rest):
        values[rest], indices[rest] = torch.topk(scores[rest], k, dim=1, sorted=False)
    return values, indices


def threshold_keep(scores: Tensor, k: int) -> Tensor:
    """[N, columns]: the k largest of each row of `scores` where they stand, 0 elsewhere."""
    keys = _keys(scores)
    limits, rest = _limits(keys, k)
    kept, bounds = torch.empty_like(scores), torch.from_numpy(limits)[:, None]
    for start in range(0, len(scores), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        torch.ge(keys[part], bounds[part], out=kept[part])
        kept[part].mul_(scores[part])
    if len(rest):
        values, indices = torch.topk(scores[rest], k, dim=1, sorted=False)
        kept[rest] = torch.zeros_like(scores[rest]).scatter_(1, indices, values)
    return kept
