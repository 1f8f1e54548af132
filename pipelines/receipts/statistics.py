"""The statistics that receipts rest on: AUROC with its interval over documents, multiple testing, reliability.

Intervals are percentile bootstraps (Efron & Tibshirani 1993) of 95 %. Rows of one document are not independent, so
AUROC is redrawn by document; numbers of one feature each are redrawn by feature.
"""

import numpy as np

PERCENTILES = (2.5, 97.5)
#: Values drawn at once in bootstraps over features, so that memory does not grow with draws * features.
DRAWN_AT_ONCE = 4_000_000
#: Documents that are drawn one by one.
MOST_DRAWN = 8192


def rankdata(values: np.ndarray) -> np.ndarray:
    """[n] float64: ranks from 1 up, equal values share the mean of their ranks."""
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group].astype(np.float64)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of `a` [n] with `b` [n]; NaN where either has no spread."""
    x, y = (np.asarray(v, np.float64) for v in (a, b))
    if len(x) < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of `a` [n] with `b` [n]; NaN where either has no spread."""
    return pearson(rankdata(a), rankdata(b)) if len(a) > 1 else float("nan")


def wilson(hits: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % Wilson (1927) interval of hits / n: it has a width even where all or none of the cases are hits."""
    z2 = 1.96**2
    centre, half = hits + z2 / 2, 1.96 * np.sqrt(hits * (n - hits) / n + z2 / 4)
    return (centre - half) / (n + z2), (centre + half) / (n + z2)


def auroc(positive: np.ndarray, negative: np.ndarray, pairs: np.ndarray | None = None) -> float:
    """P(a positive scores above a negative) + P(they tie) / 2 of scores [P] and [Q]; NaN where P or Q is 0.

    A NaN score is an answer that could not be had, and counts as wrong: a positive below all, a negative above all.
    `pairs` [P, Q] bool: only those pairs are compared.
    """
    if pairs is not None:
        count = np.count_nonzero(pairs)
        won = _wins(np.asarray(positive, np.float64), np.asarray(negative, np.float64))
        return float(won[pairs].sum(dtype=np.float64) / count) if count else float("nan")
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    p, q = positive[~np.isnan(positive)], np.sort(negative[~np.isnan(negative)])
    wins = np.searchsorted(q, p, "left") + np.searchsorted(q, p, "right")  # twice: a tie counts once
    return float(wins.sum() / (2 * len(positive) * len(negative)))


def aurocs(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """[n] `auroc` of each row of scores [n, P] and [n, Q]."""
    won = np.zeros(len(positive), np.int64)  # twice: a tie counts once
    for column in negative.T[:, :, None]:
        won += np.count_nonzero(positive > column, axis=1) + np.count_nonzero(positive >= column, axis=1)
    with np.errstate(invalid="ignore"):
        return won / np.float64(2 * positive.shape[1] * negative.shape[1])


def _wins(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """[P, Q] float32: 1 where the positive scores higher, 1/2 where they tie, 0 else and at NaN."""
    p, q = positive[:, None], negative[None, :]
    return (p > q).astype(np.float32) + (p == q) * np.float32(0.5)


class DocumentDraws:
    """How often each of `num_documents` documents is in each of `draws` samples of them with replacement.

    Every interval of one split may share the draws: 1 byte a draw and document. Past `MOST_DRAWN` documents several are
    drawn together, which bounds memory and changes intervals little.
    """

    def __init__(self, num_documents: int, *, draws: int, seed: int):
        self.num_drawn = max(min(num_documents, MOST_DRAWN), 1)
        rng = np.random.default_rng(seed)
        picks = (rng.integers(0, self.num_drawn, self.num_drawn) for _ in range(draws))
        # [B, D]; a document is drawn more than 255 times in no sample of so many
        self.times = np.stack([np.bincount(pick, minlength=self.num_drawn).astype(np.uint8) for pick in picks])

    def interval(
        self,
        positive: np.ndarray,
        positive_documents: np.ndarray,
        negative: np.ndarray,
        negative_documents: np.ndarray,
        pairs: np.ndarray | None = None,
    ) -> tuple[float, float]:
        """95 % interval of `auroc`, documents 0 .. D - 1 drawn with replacement.

        Samples without a positive or without a negative say nothing and are left out. NaN where positives or negatives
        lie in fewer than two documents: one document has no spread. Where all samples agree (a label that is always
        right), it is widened to what a proportion over so few rows leaves open (`wilson`).
        """
        if len(np.unique(positive_documents)) < 2 or len(np.unique(negative_documents)) < 2:
            return float("nan"), float("nan")
        positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
        p = self.times[:, positive_documents % self.num_drawn].astype(np.float32)  # [B, P]
        q = self.times[:, negative_documents % self.num_drawn].astype(np.float32)  # [B, Q]
        wins = _wins(positive, negative)
        won = np.einsum("bq,bq->b", p @ (wins if pairs is None else wins * pairs), q)
        compared = p.sum(axis=1) * q.sum(axis=1)
        if pairs is not None:
            compared = np.einsum("bq,bq->b", p @ pairs.astype(np.float32), q)
        drawn = won[compared > 0] / compared[compared > 0]
        if len(drawn) == 0:
            return float("nan"), float("nan")
        low, high = np.percentile(drawn, PERCENTILES)
        if high - low < 1e-6:
            n = min(len(positive), len(negative))
            wide = wilson(np.array([low * n]), np.array([float(n)]))
            low, high = min(low, wide[0][0]), max(high, wide[1][0])
        return float(low), float(high)


def auroc_interval(
    positive: np.ndarray,
    positive_documents: np.ndarray,
    negative: np.ndarray,
    negative_documents: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> tuple[float, float]:
    """95 % interval of `auroc` over the documents that the rows lie in; see `DocumentDraws.interval`.

    Args: scores [P] and [Q] with their document numbers, any integers.
    """
    names, dense = np.unique(np.concatenate([positive_documents, negative_documents]), return_inverse=True)
    of_draws = DocumentDraws(len(names), draws=draws, seed=seed)
    return of_draws.interval(positive, dense[: len(positive)], negative, dense[len(positive) :])


def benjamini_hochberg(p: np.ndarray, q: float) -> np.ndarray:
    """[m] bool: hypotheses rejected with a false discovery rate of at most `q` (Benjamini & Hochberg 1995).

    NaN is a test that was not made: it is not rejected and does not count among the m.
    """
    p = np.asarray(p, np.float64)
    made = np.flatnonzero(~np.isnan(p))
    order = made[np.argsort(p[made], kind="stable")]
    below = np.flatnonzero(p[order] <= q * np.arange(1, len(order) + 1) / max(len(order), 1))
    rejected = np.zeros(len(p), bool)
    rejected[order[: below[-1] + 1 if len(below) else 0]] = True
    return rejected


def _draws_of(statistic, arrays: list[np.ndarray], *, paired: bool, draws: int, seed: int) -> tuple[float, float]:
    """95 % interval of `statistic(*samples)`, each [b, n]; `paired` draws the same entries of all arrays."""
    if min(len(a) for a in arrays) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // max(len(a) for a in arrays))
    found = []
    for start in range(0, draws, at_once):
        size = min(at_once, draws - start)
        picks = [rng.integers(0, len(arrays[0]), (size, len(arrays[0])))] if paired else None
        picks = picks * len(arrays) if picks else [rng.integers(0, len(a), (size, len(a))) for a in arrays]
        found.append(statistic(*(a[pick] for a, pick in zip(arrays, picks, strict=True))))
    low, high = np.percentile(np.concatenate(found), PERCENTILES)
    return float(low), float(high)


def paired_interval(a: np.ndarray, b: np.ndarray, *, draws: int, seed: int) -> tuple[float, float]:
    """95 % interval of mean(a - b) over the same n features, pairs drawn with replacement; NaN pairs are left out."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    difference = difference[~np.isnan(difference)]
    return _draws_of(lambda d: d.mean(axis=1), [difference], paired=True, draws=draws, seed=seed)


def median_difference_interval(a: np.ndarray, b: np.ndarray, *, draws: int, seed: int) -> tuple[float, float]:
    """95 % interval of median(a) - median(b) of two groups [n] and [m], each drawn with replacement; NaN left out."""
    groups = [np.asarray(v, np.float64) for v in (a, b)]
    groups = [v[~np.isnan(v)] for v in groups]
    return _draws_of(
        lambda x, y: np.median(x, axis=1) - np.median(y, axis=1), groups, paired=False, draws=draws, seed=seed
    )


def split_half(first: np.ndarray, second: np.ndarray) -> float:
    """Reliability of a score from its values on two halves of the examples, [F] each: Spearman-Brown's 2 r / (1 + r).

    r is Pearson's over the features where both are numbers; NaN where there are fewer than three or no spread.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    both = ~np.isnan(first) & ~np.isnan(second)
    r = pearson(first[both], second[both]) if both.sum() >= 3 else float("nan")
    return float("-inf") if r <= -1 else 2 * r / (1 + r)
