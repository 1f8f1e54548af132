"""Probes: what learns a yes/no label from vectors. All give log odds, so that each can also be read as a code.

    logistic regression     all coordinates, ridge penalty
    difference of means     one direction, mean of the positives minus mean of the negatives
    PCA                     logistic regression on the first principal components
    k columns               the k columns that alone separate train best, then logistic regression on them
    token table             log odds of each token, counted (of a document: of all its tokens, naive Bayes)
    majority                the larger label of train

Fitting sees train only; what a probe leaves open, its settings, is chosen by log loss on calibration.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csc_matrix, csr_matrix, issparse

#: Ridge penalties on weights of standardised coordinates, beside the summed log loss.
PENALTIES = (1000.0, 100.0, 10.0, 1.0)
COMPONENTS = (4, 16, 64)
#: Penalty of logistic regressions on few coordinates.
SMALL_PENALTY = 1.0
#: Log odds beyond this are cut, so that no single case decides a code length.
MOST_LOG_ODDS = 15.0

#: [n, d] float32, or sparse of that shape.
Matrix = Any


class Fitted(Protocol):
    """A probe that has learned."""

    def log_odds(self, x: Matrix) -> np.ndarray:
        """[n] float64: log P(yes) / P(no)."""
        ...


class Probe(Protocol):
    """A way to learn."""

    settings: Sequence[float]

    def fit(self, x: Matrix, y: np.ndarray, setting: float) -> Fitted:
        """Learn from cases x [n, d] with labels y [n] bool."""
        ...


def log_loss(log_odds: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n] nats that the label of each case costs."""
    cut = np.clip(log_odds, -MOST_LOG_ODDS, MOST_LOG_ODDS)
    return np.logaddexp(0, np.where(y, -cut, cut))


def choose(probe: Probe, x: Matrix, y: np.ndarray, x_held: Matrix, y_held: np.ndarray) -> tuple[float, Fitted]:
    """The setting with the least log loss on held-out cases, and what it learned from x."""
    fitted = [(setting, probe.fit(x, y, setting)) for setting in probe.settings]
    if len(fitted) == 1:
        return fitted[0]
    return min(fitted, key=lambda f: float(log_loss(f[1].log_odds(x_held), y_held).mean()))


@dataclass(frozen=True)
class Linear:
    """Log odds `x @ weight + bias` of some columns, or of all."""

    weight: np.ndarray  # [d] float64, in units of x
    bias: float
    columns: np.ndarray | None = None  # [d] which columns of x; None: all

    def log_odds(self, x: Matrix) -> np.ndarray:
        picked = x if self.columns is None else x[:, self.columns]
        return np.asarray(picked @ self.weight, np.float64).ravel() + self.bias


@dataclass(frozen=True)
class Constant:
    """The same log odds for every case."""

    value: float

    def log_odds(self, x: Matrix) -> np.ndarray:
        return np.full(x.shape[0], self.value)


def dense(x: Matrix, columns: np.ndarray | None = None) -> np.ndarray:
    """The columns of a matrix, or all, as an array."""
    if columns is not None:
        x = x[:, columns]
    return x.toarray() if issparse(x) else np.asarray(x)


def only_label(y: np.ndarray) -> Constant | None:
    """What is learned where all cases have one label: Laplace's rule of succession."""
    if 0 < y.sum() < len(y):
        return None
    return Constant(float(np.log((y.sum() + 1) / (len(y) - y.sum() + 1))))


def fit_logistic(x: np.ndarray, y: np.ndarray, penalty: float, columns: np.ndarray | None = None) -> Linear:
    """Minimum of the summed log loss + penalty / 2 * |w|^2, w on standardised coordinates, the bias free.

    x [n, d] holds the `columns` that the result will be asked about.
    """
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-6 * (np.abs(mean) + 1e-6), scale, np.inf)  # a constant column gets no weight
    z = ((x - mean) / scale).astype(np.float32)
    sign = np.where(y, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = parameters[:-1], parameters[-1]
        margin = sign * (z @ w.astype(np.float32) + b)
        slope = (-sign / (1 + np.exp(np.clip(margin, -50, 50)))).astype(np.float32)
        value = np.logaddexp(0, -margin).sum() + penalty / 2 * (w @ w)
        return float(value), np.append((z.T @ slope).astype(np.float64) + penalty * w, slope.sum(dtype=np.float64))

    found = minimize(
        loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-7}
    ).x
    weight = found[:-1] / scale
    return Linear(weight, float(found[-1] - mean @ weight), columns)


class LogisticRegression:
    """On all coordinates."""

    settings: Sequence[float] = PENALTIES

    def fit(self, x: Matrix, y: np.ndarray, setting: float) -> Fitted:
        return only_label(y) or fit_logistic(dense(x), y, setting)


class DifferenceOfMeans:
    """The direction from the mean of one label to that of the other; its threshold and slope by logistic regression."""

    settings: Sequence[float] = (SMALL_PENALTY,)

    def fit(self, x: Matrix, y: np.ndarray, setting: float) -> Fitted:
        if (constant := only_label(y)) is not None:
            return constant
        x = dense(x)
        direction = (x[y].mean(0) - x[~y].mean(0)).astype(np.float64)
        along = fit_logistic((x @ direction)[:, None], y, setting)
        return Linear(direction * along.weight[0], along.bias)


class PrincipalComponents:
    """Logistic regression on the first principal components of train; the setting is their number."""

    settings: Sequence[float] = COMPONENTS

    def fit(self, x: Matrix, y: np.ndarray, setting: float) -> Fitted:
        if (constant := only_label(y)) is not None:
            return constant
        x = dense(x)
        centred = (x - x.mean(0)).astype(np.float64)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        basis = vectors[:, ::-1][:, : int(setting)]  # [d, components]
        inside = fit_logistic(x @ basis, y, SMALL_PENALTY)
        return Linear(basis @ inside.weight, inside.bias)


class BestColumns:
    """Logistic regression on the k columns whose own AUROC on the cases learned from is furthest from 1/2."""

    settings: Sequence[float] = (SMALL_PENALTY,)

    def __init__(self, k: int):
        self.k = k

    def fit(self, x: Matrix, y: np.ndarray, setting: float) -> Fitted:
        if (constant := only_label(y)) is not None:
            return constant
        distance = np.abs(column_auroc(x, y) - 0.5)
        columns = np.argsort(-distance, kind="stable")[: self.k]
        return fit_logistic(dense(x, columns), y, setting, columns)


def column_auroc(x: Matrix, y: np.ndarray) -> np.ndarray:
    """[d] AUROC of every column of x [n, d] by itself against y [n]; a sparse matrix holds no negative values.

    Rank sums by one sort over all stored entries; what is not stored is a tie at 0.
    """
    if not issparse(x):
        x = np.asarray(x)
        x = csc_matrix(x - x.min(0) + 1.0)  # the order in a column is all that counts
    x = csc_matrix(x)
    x.eliminate_zeros()
    num, width = x.shape
    stored = np.diff(x.indptr)
    column = np.repeat(np.arange(width), stored)
    order = np.lexsort((x.data, column))
    value, positive = x.data[order], y[x.indices[order]]
    # ranks within the column, ties sharing their mean, behind the entries that are 0
    rank = np.arange(len(value)) - x.indptr[:-1][column] + 1.0
    starts = np.flatnonzero(np.r_[True, (np.diff(value) != 0) | (np.diff(column) != 0)]) if len(value) else []
    sizes = np.diff(np.r_[starts, len(value)]).astype(np.int64)
    if len(sizes):
        rank = np.repeat(rank[starts] + (sizes - 1) / 2, sizes)
    zeros = num - stored
    rank = rank + zeros[column]
    num_positive = int(y.sum())
    in_positive = np.bincount(column[positive], minlength=width)
    rank_sum = np.bincount(column[positive], weights=rank[positive], minlength=width)
    rank_sum += (num_positive - in_positive) * (zeros + 1) / 2
    pairs = max(num_positive * (num - num_positive), 1)
    return (rank_sum - num_positive * (num_positive + 1) / 2) / pairs


class TokenTable:
    """Log odds of tokens, each counted once more than it was seen; x [n, V] holds how often a case has each token."""

    settings: Sequence[float] = (1.0,)

    def fit(self, x: Matrix, y: np.ndarray, setting: float) -> Fitted:
        x = csr_matrix(x)
        yes, no = (np.asarray(x[label].sum(0)).ravel() + setting for label in (y, ~y))
        # tokens that occur in neither say nothing, however long the texts of either label are
        balance = np.where(yes + no > 2 * setting, np.log(no.sum() / yes.sum()), 0.0)
        return Linear(np.log(yes / no) + balance, 0.0) if len(y) else Constant(0.0)


class Majority:
    """The share of positives."""

    settings: Sequence[float] = (1.0,)

    def fit(self, x: Matrix, y: np.ndarray, setting: float) -> Fitted:
        return Constant(float(np.log((y.sum() + setting) / (len(y) - y.sum() + setting))))
