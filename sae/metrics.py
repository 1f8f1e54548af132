"""The one definition of every metric, each with closed-form tests.

On rows of activations y [N, d_out] and what the dictionary gives for them, y_hat:

- `fvu`: fraction of variance UNexplained, sum |y - y_hat|^2 / sum |y - mean(y)|^2. 0 for y itself, 1 for the mean, and
  unchanged by shifting or scaling y and y_hat together. A crosscoder also has it for every hook point alone.
- `cosine`: mean cosine between y and y_hat, neither centred.
- `reconstruction_bias`: mean |y_hat|^2 / mean y . y_hat, below 1 where the reconstruction is too short
  (gamma of arXiv 2404.16014).
- `l0`: mean number of latents above zero on a row.
- `dead_share`: share of latents that are above zero on no row.
- `density_histogram`: share of latents whose density (share of rows above zero) lies in each half decade.

On next-token predictions, with activations at the hook points that are written replaced:

- `ce_increase`: mean cross-entropy (nats) with the reconstruction in place, minus without.
- `ce_recovered`: 1 - ce_increase / (ce_ablated - ce), 1 for a perfect reconstruction and 0 for the ablation itself;
  mean ablation is the reference that is reported first, zero ablation flatters.
- `kl`: mean KL divergence (nats) of the spliced model's predictions from the model's own; `kl_recovered` is
  1 - kl / kl under ablation.

Every interval is a 95 % bootstrap over documents: numerator and denominator of a ratio are drawn together, the mean in
fvu's denominator too. Sums are float64.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from saeql.kernels.sparse_matmul import SparseLatents

#: Documents beyond this number are drawn in so many groups, which bounds memory and changes intervals little.
NUM_GROUPS = 512
#: Draws behind the density histogram's intervals; each of them visits every latent.
_NUM_HISTOGRAM_DRAWS = 400
#: A latent that fires in more groups than this is missing from a draw with probability below 1e-17.
_ALWAYS_DRAWN = 40
_LATENTS_AT_ONCE = 8192

#: Draws of a metric [B] from how often each group of documents is drawn, [B, G].
Statistic = Callable[[np.ndarray], np.ndarray]


def fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """Fraction of variance unexplained of one batch, [N, d] each; nan where no row or no variance is there."""
    if len(x) == 0:
        return math.nan
    x, x_hat = x.double(), x_hat.double()
    total = float((x - x.mean(0)).square().sum())
    return float((x - x_hat).square().sum()) / total if total > 0 else math.nan


def dead_share(fire_counts: torch.Tensor) -> float:
    """Share of latents whose count [d_sae] is zero."""
    return float((fire_counts == 0).double().mean())


def recovered(base: np.ndarray, spliced: np.ndarray, ablated: np.ndarray) -> np.ndarray:
    """Share of the loss under ablation that the reconstruction avoids; nan where ablation costs nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = 1 - (spliced - base) / (ablated - base)
    return np.where(ablated == base, np.nan, share)


# --- intervals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval over documents, None where fewer than two documents leave nothing to draw."""

    value: float
    n: int  # rows, tokens or latents it was measured on
    low: float | None
    high: float | None


class DocumentGroups:
    """Numbers documents in order of appearance; past `num_groups` they share the numbers in turn."""

    def __init__(self, num_groups: int = NUM_GROUPS):
        self.num_groups = num_groups
        self._numbers: dict[int, int] = {}

    def __len__(self) -> int:
        return min(len(self._numbers), self.num_groups)

    def of(self, document_ids: np.ndarray) -> np.ndarray:
        """Group of each of the document ids, same shape."""
        found, first, inverse = np.unique(document_ids, return_index=True, return_inverse=True)
        for document in found[np.argsort(first)].tolist():
            self._numbers.setdefault(document, len(self._numbers))
        numbers = np.array([self._numbers[d] % self.num_groups for d in found.tolist()], np.int64)
        return numbers[inverse].reshape(document_ids.shape)


class Bootstrap:
    """Draws groups of documents with replacement, the same draws for every metric: `weights` [num_draws, G]."""

    def __init__(self, num_groups: int, num_draws: int = 2000, seed: int = 0):
        self.num_groups = num_groups
        self.weights = np.zeros((num_draws, num_groups))
        if num_groups:
            shares = np.full(num_groups, 1 / num_groups)
            self.weights[:] = np.random.default_rng(seed).multinomial(num_groups, shares, size=num_draws)

    def estimate(self, statistic: Statistic, n: int) -> Estimate:
        """Value of a statistic and the quantiles of its draws."""
        value = float(statistic(np.ones((1, self.num_groups)))[0])
        return Estimate(value, n, *self._interval(statistic(self.weights)))

    def centred_estimate(self, statistic: Statistic, n: int, *, num_draws: int | None = None) -> list[Estimate]:
        """The same for shares [B, M] that drawing with replacement shifts: a draw misses a third of the documents, so
        more latents are silent in it. The draws are moved to have the value for their mean, within [0, 1], and the
        interval holds the value.
        """
        values = statistic(np.ones((1, self.num_groups)))[0]
        draws = statistic(self.weights[:num_draws])
        moved, found = (draws - draws.mean(0) + values).clip(0, 1), []
        for value, column in zip(values.tolist(), moved.T, strict=True):
            low, high = self._interval(column)
            around = (None, None) if low is None or high is None else (min(low, value), max(high, value))
            found.append(Estimate(value, n, *around))
        return found

    def _interval(self, draws: np.ndarray) -> tuple[float | None, float | None]:
        draws = draws[np.isfinite(draws)]
        if self.num_groups < 2 or len(draws) == 0:
            return None, None
        low, high = np.quantile(draws, [0.025, 0.975])
        return float(low), float(high)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
    """Statistic sum(numerator) / sum(denominator) of sums by group [G]; nan where the denominator is 0."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ numerator) / (weights @ denominator)

    return statistic


# --- rows of activations ---------------------------------------------------------------------------------------------

_SUMS = ("rows", "active", "cosine", "length", "inner")


class RowMetrics:
    """Streaming metrics of rows and their reconstruction: independent of how rows are cut into batches.

    Sums are kept by group of documents, apart for kept rows and those that are left out. Variances are taken about a
    fixed shift (the first batch's mean), so that a large common offset does not cancel digits. `parts` are columns of
    y that get an fvu of their own, by name.
    """

    def __init__(self, d_out: int, d_sae: int, *, parts: Mapping[str, slice] | None = None):
        self.d_out, self.d_sae = d_out, d_sae
        self.parts = {"": slice(0, d_out), **(parts or {})}
        self.groups = DocumentGroups()
        self._shift: torch.Tensor | None = None
        # each [2 G, ...]: the kept rows of group g at 2 g, the others at 2 g + 1
        self._sums = torch.zeros(0, len(_SUMS) + 2 * len(self.parts), dtype=torch.float64)
        self._centres = torch.zeros(0, d_out, dtype=torch.float64)
        self._fired = torch.zeros(0, d_sae, dtype=torch.int32)

    def update(
        self,
        y: torch.Tensor,
        y_hat: torch.Tensor,
        latents: SparseLatents,
        document_ids: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> None:
        """Add rows y and their reconstruction [N, d_out], of documents [N]; `kept` [N] marks those that count."""
        if len(y) == 0:
            return
        y, y_hat = y.double(), y_hat.double()
        self._shift = y.mean(0) if self._shift is None else self._shift
        cells = 2 * torch.from_numpy(self.groups.of(document_ids.cpu().numpy())).to(y.device)
        cells = cells if kept is None else cells + (~kept).long()
        self._reserve(2 * len(self.groups), y.device)
        centred, residual = y - self._shift, y - y_hat
        length, inner, active = y_hat.square().sum(1), (y * y_hat).sum(1), latents.values > 0
        norms = (y.square().sum(1) * length).sqrt()
        cosine = torch.where(norms > 0, inner / norms, 0.0)
        columns = [torch.ones_like(inner), active.sum(1).double(), cosine, length, inner]
        for at in self.parts.values():
            columns += [centred[:, at].square().sum(1), residual[:, at].square().sum(1)]
        self._sums.index_add_(0, cells, torch.stack(columns, 1))
        self._centres.index_add_(0, cells, centred)
        fired = (cells[:, None] * self.d_sae + latents.indices.long())[active]
        self._fired.view(-1).index_add_(0, fired, torch.ones_like(fired, dtype=torch.int32))

    def _reserve(self, num_cells: int, device: torch.device) -> None:
        have = len(self._sums)
        if num_cells > have:
            size = min(max(num_cells, 2 * have), 2 * self.groups.num_groups)
            for name in ("_sums", "_centres", "_fired"):
                old = getattr(self, name).to(device)
                setattr(self, name, torch.cat([old, old.new_zeros(size - have, old.shape[1])]))

    def estimates(self, *, num_draws: int = 2000, seed: int = 0) -> dict[str, Estimate]:
        """Every metric of kept rows, and of all rows under its name with `_all_rows`."""
        bootstrap, found = Bootstrap(len(self.groups), num_draws, seed), {}
        for suffix, every in (("", False), ("_all_rows", True)):
            sums, centres = self._by_group(self._sums, every), self._by_group(self._centres, every)
            rows, active, cosine, length, inner = sums.T[: len(_SUMS)]
            n = int(rows.sum())
            for number, (part, at) in enumerate(self.parts.items()):
                squares, residual = sums.T[len(_SUMS) + 2 * number :][:2]
                name = f"fvu{suffix}" + (f"@{part}" if part else "")
                found[name] = bootstrap.estimate(_fvu_of_sums(rows, centres[:, at], squares, residual), n)
            found[f"cosine{suffix}"] = bootstrap.estimate(ratio(cosine, rows), n)
            found[f"reconstruction_bias{suffix}"] = bootstrap.estimate(ratio(length, inner), n)
            found[f"l0{suffix}"] = bootstrap.estimate(ratio(active, rows), n)
            dead = _dead_of_counts(self._by_group(self._fired, every))
            found[f"dead_share{suffix}"] = bootstrap.centred_estimate(dead, self.d_sae)[0]
        return found

    def density_histogram(self, *, num_draws: int = 2000, seed: int = 0) -> list[tuple[float, float, Estimate]]:
        """(low density, high density, share of latents) of every half decade, for kept rows.

        The first bin starts at or below one row; latents that never fire are in none of them: `dead_share`.
        """
        rows = self._by_group(self._sums, False)[:, 0]
        if rows.sum() == 0:
            return []
        edges = np.arange(2 * min(-1, math.floor(-math.log10(rows.sum()))), 1) / 2
        histogram = _histogram_of_counts(self._by_group(self._fired, False), rows, edges)
        bootstrap = Bootstrap(len(self.groups), min(num_draws, _NUM_HISTOGRAM_DRAWS), seed)
        bins = bootstrap.centred_estimate(histogram, self.d_sae)
        return [(10.0**a, 10.0**b, bin) for a, b, bin in zip(edges[:-1], edges[1:], bins, strict=True)]

    def _by_group(self, cells: torch.Tensor, every: bool) -> np.ndarray:
        """Sums [G, ...] of the kept rows, or of `every` row."""
        pairs = cells[: 2 * len(self.groups)].view(len(self.groups), 2, cells.shape[1])
        return (pairs.sum(1) if every else pairs[:, 0]).cpu().numpy()


def _fvu_of_sums(rows: np.ndarray, centres: np.ndarray, squares: np.ndarray, residual: np.ndarray) -> Statistic:
    """fvu from sums by group: rows, coordinates [G, d], squares of coordinates and of residuals."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            total = weights @ squares - np.square(weights @ centres).sum(1) / (weights @ rows)
            return np.where(total > 0, (weights @ residual) / total, np.nan)

    return statistic


def _dead_of_counts(fired: np.ndarray) -> Statistic:
    """Share of latents that fire in no drawn group, from counts [G, d_sae]."""
    num_groups = (fired > 0).sum(0)
    rare = (fired[:, (num_groups > 0) & (num_groups <= _ALWAYS_DRAWN)] > 0).astype(np.float32)

    def statistic(weights: np.ndarray) -> np.ndarray:
        silent = np.full(len(weights), int((num_groups == 0).sum()))
        for start in range(0, rare.shape[1], _LATENTS_AT_ONCE):
            silent += (weights.astype(np.float32) @ rare[:, start : start + _LATENTS_AT_ONCE] == 0).sum(1)
        return silent[:, None] / fired.shape[1]

    return statistic


def _histogram_of_counts(fired: np.ndarray, rows: np.ndarray, edges: np.ndarray) -> Statistic:
    """Share of latents with log10 density between consecutive edges, from counts [G, d_sae] on rows [G]."""
    num_bins = len(edges) - 1

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = (weights @ rows)[:, None]
        counts = np.zeros((len(weights), num_bins + 1))
        for start in range(0, fired.shape[1], _LATENTS_AT_ONCE // 4):
            times = weights @ fired[:, start : start + _LATENTS_AT_ONCE // 4]
            logs = np.log10(np.maximum(times, 1e-9) / total)
            bins = np.where(times > 0, np.searchsorted(edges, logs, side="right") - 1, num_bins)
            bins = np.where((times > 0) & (bins >= num_bins), num_bins - 1, bins.clip(0))  # density 1: the last bin
            flat = bins + (num_bins + 1) * np.arange(len(weights))[:, None]
            counts += np.bincount(flat.ravel(), minlength=counts.size).reshape(counts.shape)
        return counts[:, :num_bins] / fired.shape[1]

    return statistic


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLosses:
    """Summed cross-entropy and KL divergence from the model as it is (nats), and predicted tokens, by group [G]."""

    ce: np.ndarray
    kl: np.ndarray
    count: np.ndarray


def splice_estimates(
    model: TokenLosses, spliced: TokenLosses, ablated: Mapping[str, TokenLosses], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """What replacing activations by their reconstruction costs, against the ablations "mean" and "zero"."""
    count, n = model.count, int(model.count.sum())

    def share(base: np.ndarray, with_it: np.ndarray, without: np.ndarray) -> Estimate:
        return bootstrap.estimate(lambda w: recovered(w @ base, w @ with_it, w @ without), n)

    found = {"ce_spliced": bootstrap.estimate(ratio(spliced.ce, count), n)}
    found |= {f"ce_{name}": bootstrap.estimate(ratio(losses.ce, count), n) for name, losses in ablated.items()}
    found["ce_increase"] = bootstrap.estimate(ratio(spliced.ce - model.ce, count), n)
    found["kl"] = bootstrap.estimate(ratio(spliced.kl, count), n)
    found |= {f"kl_{name}": bootstrap.estimate(ratio(losses.kl, count), n) for name, losses in ablated.items()}
    for name, losses in ablated.items():
        suffix = "" if name == "mean" else f"_{name}"
        found[f"ce_recovered{suffix}"] = share(model.ce, spliced.ce, losses.ce)
        found[f"kl_recovered{suffix}"] = share(np.zeros_like(count, dtype=np.float64), spliced.kl, losses.kl)
    return found
