"""Examples: active rows over all strengths, the ladder of negatives, near copies of train, what does not matter."""

import sys
from pathlib import Path

import numpy as np
import pytest

from saeql.pipelines.receipts.near_copies import near_copies
from saeql.pipelines.receipts.sampler import SampleConfig, Sampler, neighbour_table
from saeql.pipelines.split_rows import FeatureRows, read_feature_rows

sys.path.insert(0, str(Path(__file__).parent))
import synthetic_evidence as synthetic

EVERY = range(synthetic.NUM_FEATURES)
NEIGHBOURS = np.array([[(f + 1) % synthetic.DEAD, (f + 2) % synthetic.DEAD] for f in EVERY], np.int32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> FeatureRows:
    evidence = synthetic.build(tmp_path_factory.mktemp("examples"))
    return read_feature_rows(evidence, synthetic.DICTIONARY, active_fraction=0.25)


@pytest.fixture(scope="module")
def sampler(rows) -> Sampler:
    return Sampler(rows.test, SampleConfig(), neighbours=NEIGHBOURS)


@pytest.fixture(scope="module")
def examples(sampler):
    return sampler.sample(EVERY)


def dense(rows: FeatureRows, feature: int) -> tuple[np.ndarray, np.ndarray]:
    """(activation where active, whether it fires at all), each [R] of test."""
    values, fires = np.zeros(rows.test.windows.tokens.size), np.zeros(rows.test.windows.tokens.size, bool)
    values[rows.test.active.by_feature()[feature]] = rows.test.active.values_by_feature()[feature]
    fires[rows.test.weak.by_feature()[feature]] = True
    return values, fires | (values > 0)


def test_active_rows_are_active_and_spread_over_strengths_and_documents(rows, examples):
    assert set(examples) == set(EVERY) - {synthetic.DEAD}
    for feature, e in examples.items():
        values, _ = dense(rows, feature)
        assert len(np.unique(e.active)) == len(e.active) == min(40, int((values > 0).sum()))
        np.testing.assert_array_equal(e.values, values[e.active].astype(np.float32))
        assert rows.test.eligible[e.active].all()
        documents = np.bincount(rows.test.documents[e.active])
        enough = np.bincount(rows.test.documents[values > 0]).clip(max=3).sum() >= 40
        assert documents.max() <= 3 or not enough
    feature = synthetic.feature("number")
    values, _ = dense(rows, feature)
    tenth = np.searchsorted(np.quantile(values[values > 0], np.arange(1, 10) / 10), examples[feature].values)
    assert np.bincount(tenth, minlength=10).min() >= 2  # of 4 a tenth, less what three a document take away


def test_negatives_are_what_their_rung_says(rows, examples, sampler):
    tokens, strata = rows.test.windows.tokens.ravel(), sampler._stratum_of_rows()
    position = np.arange(rows.test.windows.tokens.size) % synthetic.CONTEXT
    for feature, e in examples.items():
        values, fires = dense(rows, feature)
        assert set(e.negatives) >= {"N0", "N1"}
        for rung, own in e.negatives.items():
            assert len(np.unique(own)) == len(own) <= len(e.active)
            assert rows.test.eligible[own].all()
            assert not values[own].any()
            if rung in ("N2", "N4"):
                assert not fires[own].any()
        assert len(e.negatives["N0"]) == len(e.active)
        matched = e.negatives["N1"]
        assert len(matched) >= 0.6 * len(e.active)  # all rows of a stratum may be active
        have = np.unique(strata[e.active], return_counts=True)
        for stratum, count in zip(*np.unique(strata[matched], return_counts=True), strict=True):
            assert count <= have[1][have[0] == stratum]
        assert abs(position[matched].mean() - position[e.active].mean()) < 6
        assert np.isin(tokens[e.negatives.get("N2", matched[:0])], tokens[e.active]).all()
        others = np.concatenate([rows.test.active.by_feature()[n] for n in NEIGHBOURS[feature]])
        assert np.isin(e.negatives.get("N4", matched[:0]), others).all()


def test_rungs_that_cannot_be_filled_are_missing(rows, examples):
    e = examples[synthetic.feature("token")]  # fires on 97 % of the rows of " river"
    tokens = rows.test.windows.tokens.ravel()
    silent = rows.test.eligible & (tokens == tokens[e.active][0]) & ~dense(rows, synthetic.feature("token"))[1]
    assert len(e.negatives["N2"]) <= len(e.active)
    assert set(e.negatives["N2"]) <= set(np.flatnonzero(silent)) | set(
        np.flatnonzero(np.isin(tokens, tokens[e.active]))
    )
    assert "N3" not in e.negatives
    assert "N4" not in Sampler(rows.test, SampleConfig()).sample([0])[0].negatives


def test_same_token_negatives_have_the_tokens_in_the_share_that_they_have_among_active_rows(rows, examples):
    tokens = rows.test.windows.tokens.ravel()
    e = examples[synthetic.feature("after the")]  # hundreds of tokens, all of them mostly silent elsewhere
    own, other = (
        np.bincount(tokens[x], minlength=len(rows.test.windows.vocabulary)) for x in (e.active, e.negatives["N2"])
    )
    assert len(e.negatives["N2"]) == len(e.active)
    assert np.abs(own - other).sum() <= 6


def test_what_is_drawn_for_a_feature_depends_on_no_other(sampler, examples):
    for some in ([3], [17, 3, 8], list(reversed(EVERY))):
        for feature, e in sampler.sample(some).items():
            np.testing.assert_array_equal(e.active, examples[feature].active)
            assert e.negatives.keys() == examples[feature].negatives.keys()
            for rung, own in e.negatives.items():
                np.testing.assert_array_equal(own, examples[feature].negatives[rung])


def test_another_seed_draws_other_rows(rows, examples):
    other = Sampler(rows.test, SampleConfig(seed=1), neighbours=NEIGHBOURS).sample([1])[1]
    assert not np.array_equal(other.active, examples[1].active)
    assert not np.array_equal(other.negatives["N0"], examples[1].negatives["N0"])


def test_no_example_lies_in_a_window_left_out(rows):
    left_out = np.arange(len(rows.test.windows.tokens)) % 3 > 0
    found = Sampler(rows.test, SampleConfig(), left_out=left_out, neighbours=NEIGHBOURS).sample(EVERY)
    for e in found.values():
        every = np.concatenate([e.active, *e.negatives.values()])
        assert not left_out[every // synthetic.CONTEXT].any()


def test_examples_never_come_from_train(rows):
    with pytest.raises(AssertionError, match="train"):
        Sampler(rows.train, SampleConfig())


def test_rows_near_in_meaning_fill_n3_in_their_order(rows):
    class Given:
        def near(self, active, split):
            assert split is rows.test
            return {f: np.concatenate([own, np.arange(1, 60)]) for f, own in active.items()}

    e = Sampler(rows.test, SampleConfig(), near=Given()).sample([2])[2]
    _, fires = dense(rows, 2)
    expected = [r for r in range(1, 60) if rows.test.eligible[r] and not fires[r]][: len(e.active)]
    assert e.negatives["N3"].tolist() == expected


def test_neighbours_of_the_evidence_become_a_table():
    columns = {"feature": np.array([2, 0, 2]), "rank": np.array([1, 0, 0]), "neighbour": np.array([0, 1, 1])}
    assert neighbour_table(columns, 4).tolist() == [[1, -1], [-1, -1], [1, 0], [-1, -1]]


def _shingles(window: np.ndarray) -> set[tuple[int, ...]]:
    own = window[window >= 0].tolist()
    return {tuple(own[i : i + 8]) for i in range(len(own) - 7)}


def test_near_copies_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 50, (60, 40))
    held_out = rng.integers(0, 50, (80, 40))
    for number in range(0, 40):  # copies with more and more of the window exchanged
        held_out[number] = train[number]
        held_out[number, :number] = rng.integers(0, 50, number)
    held_out[50, 20:], train[50, 25:] = -1, -1
    held_out[50, :20] = train[50, :20]  # a short window that a longer one begins with
    held_out[51, 5:] = -1  # shorter than one shingle
    held_out[52] = np.tile(train[3, :10], 4)  # repeats within itself
    expected = []
    for window in held_out:
        own = _shingles(window)
        others = [_shingles(t) for t in train]
        expected.append(any(own and len(own & o) / len(own | o) >= 0.5 for o in others))
    assert 5 < sum(expected) < 30
    np.testing.assert_array_equal(near_copies(held_out, train), expected)


def test_boilerplate_alone_does_not_hide_a_near_copy():
    rng = np.random.default_rng(1)
    train = rng.integers(0, 1000, (300, 64))
    train[:, :20] = np.arange(20)  # every window opens in the same way
    held_out = rng.integers(0, 1000, (40, 64))
    held_out[:, :20] = np.arange(20)
    held_out[7] = train[200]
    assert np.flatnonzero(near_copies(held_out, train)).tolist() == [7]
