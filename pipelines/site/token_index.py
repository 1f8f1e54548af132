"""Which features fire on a token and which promote it, as files by token; tokens that read the same are one.

What fires on a token are the features that the store keeps of it, `store.token_features`, on the dictionary's first
corpus; what promotes it is whole.
"""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from saeql.store.feature_store import FeatureStore

from .files import SiteFiles, shards, text_order

#: Entries of one file at least, but for the last.
SHARD_ENTRIES = 8_192

_FIRING = """
SELECT v.token, f.feature, sum(f.count)::BIGINT AS count, any_value(n.total)::BIGINT AS total
FROM derived.token_features f
JOIN evidence.vocabulary v ON v.vocabulary_id = {vocabulary} AND v.token_id = f.token_id
JOIN (SELECT feature, sum(num_activations) AS total FROM derived.feature_stats WHERE segment_id = {segment}
      GROUP BY feature) n ON n.feature = f.feature
WHERE f.segment_id = {segment} AND v.token <> '' GROUP BY v.token, f.feature
"""
_TOKENS = """
SELECT v.token, sum(c.num_rows)::BIGINT AS num_rows, max(c.num_features)::BIGINT AS num_features
FROM derived.token_counts c JOIN evidence.vocabulary v ON v.vocabulary_id = {vocabulary} AND v.token_id = c.token_id
WHERE c.segment_id = {segment} GROUP BY v.token
"""
_PROMOTED = """
SELECT v.token, g.feature, g.rank::INTEGER AS rank, g.effect FROM evidence.logit_effects g
JOIN evidence.vocabulary v ON v.vocabulary_id = {vocabulary} AND v.token_id = g.token_id
WHERE g.dictionary_id = {dictionary} AND g.direction = 'promoted' AND v.token <> ''
"""


def write_token_index(files: SiteFiles, place: str, store: FeatureStore, dictionary: str, features: np.ndarray) -> None:
    """Write the entries of `features` (ascending), which stand in them as their places among `features`."""
    scope = store.memory.scope(dictionary)
    numbers = {"vocabulary": scope.vocabulary_id, "segment": scope.segment_id, "dictionary": scope.dictionary_id}
    firing, promoted, known = (store.trusted_sql(q.format(**numbers)) for q in (_FIRING, _PROMOTED, _TOKENS))
    firing, promoted = (_of(rows, features) for rows in (firing, promoted))
    texts = sorted({*firing["token"].to_pylist(), *promoted["token"].to_pylist()}, key=text_order)
    place_of = {text: n for n, text in enumerate(texts)}
    of_fires, of_raises = (_places(rows, place_of) for rows in (firing, promoted))
    num_rows, num_features = (np.zeros(len(texts), np.int64) for _ in range(2))
    for text, rows, count in zip(*(known[name].to_pylist() for name in known.column_names), strict=True):
        if text in place_of:
            num_rows[place_of[text]], num_features[place_of[text]] = rows, count
    fires = _sorted_firing(firing, of_fires, num_rows)
    by_effect = np.lexsort((promoted["feature"].to_numpy(), -promoted["effect"].to_numpy(), of_raises))
    raises = {name: promoted[name].to_numpy()[by_effect] for name in ("feature", "rank")}
    ends = [np.cumsum(np.bincount(of, minlength=len(texts))) for of in (of_fires, of_raises)]
    starts = shards(ends[0] + ends[1], SHARD_ENTRIES)
    for number, (first, last) in enumerate(pairwise(starts)):
        bounds = [(int(e[first - 1]) if first else 0, int(e[last - 1])) for e in ends]
        mine, theirs = slice(*bounds[0]), slice(*bounds[1])
        files.data(
            f"{place}/s{number}",
            {},
            fires_ends=(ends[0][first:last] - bounds[0][0]).astype(np.uint32),
            fires=np.searchsorted(features, fires["feature"][mine]).astype(np.uint32),
            count=fires["count"][mine].astype(np.uint32),
            of_token=fires["of_token"][mine],
            of_feature=fires["of_feature"][mine],
            promotes_ends=(ends[1][first:last] - bounds[1][0]).astype(np.uint32),
            promotes=np.searchsorted(features, raises["feature"][theirs]).astype(np.uint32),
            rank=(raises["rank"][theirs] + 1).astype(np.uint16),
        )
    files.data(f"{place}/tokens", {"tokens": texts, "shards": starts}, firing=num_features.astype(np.uint32))


def _of(rows: pa.Table, features: np.ndarray) -> pa.Table:
    return rows.filter(pa.array(np.isin(rows["feature"].to_numpy(), features)))


def _places(rows: pa.Table, place_of: dict[str, int]) -> np.ndarray:
    """[N] the place of every row's token."""
    encoded = rows["token"].combine_chunks().dictionary_encode()
    places = np.array([place_of[text] for text in encoded.dictionary.to_pylist()], np.int64)
    return places[encoded.indices.to_numpy()] if len(places) else places


def _sorted_firing(rows: pa.Table, token: np.ndarray, num_rows: np.ndarray) -> dict[str, np.ndarray]:
    """Columns by token, the F1 of firing and token, feature; shares in percent."""
    feature, count, total = (rows[name].to_numpy() for name in ("feature", "count", "total"))
    f1 = 2 * count / np.maximum(total + num_rows[token], 1)
    order = np.lexsort((feature, -f1, token))
    shares = {"of_token": count / np.maximum(num_rows[token], 1), "of_feature": count / np.maximum(total, 1)}
    return {
        "feature": feature[order],
        "count": count[order],
        **{name: np.rint(100 * value[order]).astype(np.uint8) for name, value in shares.items()},
    }
