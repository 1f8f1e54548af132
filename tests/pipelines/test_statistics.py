"""AUROC, its interval over documents, multiple testing, reliability: against hand-computed values and brute force."""

import numpy as np
import pytest

from saeql.pipelines.receipts.statistics import (
    auroc,
    auroc_interval,
    aurocs,
    benjamini_hochberg,
    median_difference_interval,
    paired_interval,
    pearson,
    rankdata,
    spearman,
    split_half,
    wilson,
)

NAN = float("nan")


def brute_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    wins = [
        0.0 if np.isnan(p) or np.isnan(q) else 1.0 if p > q else 0.5 if p == q else 0.0
        for p in positive
        for q in negative
    ]
    return sum(wins) / len(wins)


def test_auroc_by_hand():
    assert auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == (1 + 0.5 + 1 + 1) / 4
    assert auroc(np.ones(5), np.ones(7)) == 0.5
    assert auroc(np.array([1.0]), np.array([0.0])) == 1.0
    assert np.isnan(auroc(np.zeros(0), np.ones(3)))
    assert np.isnan(auroc(np.ones(3), np.zeros(0)))


def test_auroc_counts_a_missing_answer_as_wrong():
    assert auroc(np.array([NAN, 1.0]), np.array([0.0])) == 0.5
    assert auroc(np.array([1.0]), np.array([NAN, 0.0])) == 0.5
    assert auroc(np.array([NAN]), np.array([NAN])) == 0.0
    assert auroc(np.array([NAN]), np.array([-np.inf])) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_auroc_agrees_with_all_pairs(seed: int):
    rng = np.random.default_rng(seed)
    positive, negative = rng.integers(0, 6, 23) * 1.0, rng.integers(-2, 4, 31) * 1.0
    positive[rng.random(23) < 0.1] = NAN
    negative[rng.random(31) < 0.1] = NAN
    assert auroc(positive, negative) == pytest.approx(brute_auroc(positive, negative), abs=1e-12)


def test_auroc_of_some_pairs_only():
    positive, negative = np.array([1.0, 5.0]), np.array([0.0, 9.0])
    assert auroc(positive, negative) == 0.5
    assert auroc(positive, negative, np.array([[True, False], [True, False]])) == 1.0
    assert np.isnan(auroc(positive, negative, np.zeros((2, 2), bool)))
    same_word = np.array([0, 1])[:, None] == np.array([0, 1])[None, :]
    low, high = auroc_interval(positive, np.arange(2), negative, np.arange(2), draws=50, seed=0)
    assert low < high
    assert auroc(positive, negative, same_word) == 0.5  # right on the first word, wrong on the second


def test_many_aurocs_at_once_are_each_that_of_one():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 5, (30, 7)) * 1.0, rng.integers(0, 5, (30, 9)) * 1.0
    positive[3, 2], negative[4] = NAN, NAN
    expected = [auroc(p, q) for p, q in zip(positive, negative, strict=True)]
    np.testing.assert_allclose(aurocs(positive, negative), expected, atol=1e-12)


def test_auroc_interval_agrees_with_drawing_the_rows_themselves():
    rng = np.random.default_rng(3)
    p_documents, q_documents = rng.integers(0, 9, 20) * 7, rng.integers(0, 9, 30) * 7
    positive, negative = rng.normal(0.8, 1, 20), rng.normal(0, 1, 30)
    positive[4] = NAN
    low, high = auroc_interval(positive, p_documents, negative, q_documents, draws=4000, seed=1)
    names = np.unique(np.concatenate([p_documents, q_documents]))
    drawn = []
    for _ in range(4000):
        documents = rng.choice(names, len(names))
        p = np.concatenate([positive[p_documents == d] for d in documents])
        q = np.concatenate([negative[q_documents == d] for d in documents])
        if len(p) and len(q):
            drawn.append(auroc(p, q))
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.015)
    assert low < auroc(positive, negative) < high


def test_auroc_interval_keeps_a_width_where_all_samples_agree():
    documents = np.arange(10)
    low, high = auroc_interval(np.ones(10), documents, np.zeros(10), documents, draws=200, seed=0)
    assert (low, high) == pytest.approx(tuple(float(end[0]) for end in wilson(np.array([10.0]), np.array([10.0]))))
    assert low == pytest.approx(0.7225, abs=1e-3)


def test_auroc_interval_asks_for_two_documents_on_each_side():
    one, several = np.zeros(4, int), np.arange(4)
    for p, q in ((one, several), (several, one)):
        low, high = auroc_interval(np.ones(4), p, np.zeros(4), q, draws=50, seed=0)
        assert np.isnan(low)
        assert np.isnan(high)


def test_wilson_by_hand():
    low, high = wilson(np.array([5.0]), np.array([10.0]))
    assert (low[0], high[0]) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_benjamini_hochberg_on_the_example_of_the_paper():
    small = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p = np.array([*small, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0])
    order = np.random.default_rng(0).permutation(15)
    assert benjamini_hochberg(p[order], 0.05).tolist() == (order < 4).tolist()


def test_benjamini_hochberg_rejects_all_up_to_the_last_that_is_small_enough():
    # 0.04 > 0.05 * 2 / 3 alone, but 0.05 <= 0.05 * 3 / 3 carries it
    assert benjamini_hochberg(np.array([0.01, 0.04, 0.05]), 0.05).tolist() == [True, True, True]
    assert benjamini_hochberg(np.array([0.03, NAN, 0.9]), 0.05).tolist() == [False, False, False]
    assert benjamini_hochberg(np.array([0.03, NAN]), 0.05).tolist() == [True, False]
    assert benjamini_hochberg(np.zeros(0), 0.05).tolist() == []


def test_ranks_share_ties():
    assert rankdata(np.array([10.0, 20.0, 10.0, 30.0])).tolist() == [1.5, 3.0, 1.5, 4.0]


def test_correlations_by_hand():
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert pearson(a, 2 * a + 1) == pytest.approx(1)
    assert spearman(a, np.array([1.0, 8.0, 27.0, -64.0])) == pytest.approx(-0.2)
    assert np.isnan(pearson(a, np.ones(4)))


def test_paired_interval_is_that_of_a_mean():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 400), rng.normal(0, 1, 400)
    low, high = paired_interval(np.append(a, NAN), np.append(b, 1.0), draws=3000, seed=0)
    mean, error = (a - b).mean(), (a - b).std() / 20
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.02)


def test_median_difference_interval_covers_the_difference_and_only_then():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 0.1, 100), rng.normal(0.5, 0.1, 80)
    low, high = median_difference_interval(a, b, draws=500, seed=0)
    assert 0.4 < low < np.median(a) - np.median(b) < high < 0.6
    low, high = median_difference_interval(a, a, draws=500, seed=0)
    assert low < 0 < high
    assert np.isnan(median_difference_interval(a, np.full(3, NAN), draws=5, seed=0)[0])


def test_split_half_is_spearman_brown():
    rng = np.random.default_rng(0)
    true = rng.normal(size=20_000)
    first, second = true + rng.normal(size=20_000), true + rng.normal(size=20_000)  # r = 1/2
    assert split_half(first, second) == pytest.approx(2 / 3, abs=0.02)
    assert split_half(true, true) == pytest.approx(1)
    assert np.isnan(split_half(np.ones(9), np.ones(9)))
