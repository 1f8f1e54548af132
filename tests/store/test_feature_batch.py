"""Many features read at once are what the store says of each."""

import numpy as np
import pytest

from saeql.store.errors import FeatureNotFound
from saeql.store.feature_batch import FeatureBatch
from saeql.store.feature_store import FeatureStore


@pytest.mark.parametrize("features", [range(5, 40), [0, 3, 4, 17, 39]], ids=["neighbours", "some"])
def test_a_batch_says_what_the_store_says(store: FeatureStore, features) -> None:
    name = store.dictionaries()[-1]["dictionary"]
    batch = FeatureBatch(store, features, name)
    for feature in features:
        assert batch.feature(feature) == store.feature(feature, name)
        assert batch.receipts(feature) == store.receipts(feature, dictionary=name)
        assert batch.logit_effects(feature, limit=3) == store.logit_effects(feature, dictionary=name, limit=3)
        assert batch.neighbours(feature, limit=4) == store.neighbours(feature, dictionary=name, limit=4)
        assert batch.cofirings(feature, limit=5) == store.cofirings(feature, dictionary=name, limit=5)
        for kind, limit in (("top", 10), ("decile", 300), (None, 300)):
            found = batch.examples(feature, kind=kind, limit=limit)
            assert found == store.examples(feature, dictionary=name, kind=kind, limit=limit), (feature, kind)
        assert batch.examples(feature, split="test") == store.examples(feature, dictionary=name, split="test")
        for mine, theirs in zip(
            batch.activation_histogram(feature), store.activation_histogram(feature, dictionary=name), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    assert all(any(batch.examples(f, split=split) for f in features) for split in ("train", "test"))


def test_a_feature_that_is_not_there_is_named(store: FeatureStore) -> None:
    name = store.dictionaries()[0]["dictionary"]
    with pytest.raises(FeatureNotFound, match="feature 4000"):
        FeatureBatch(store, [1, 4000], name)
