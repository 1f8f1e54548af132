"""The store's word index as files: one with all words, and postings by term, loaded as a search needs them."""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from saeql.store.feature_store import FeatureStore
from saeql.store.search_index import FIELDS
from saeql.store.words import stem

from .files import SiteFiles, shards, steps, text_order

#: Postings of one file at least, but for the last: about 60 KB of it are sent.
SHARD_POSTINGS = 16_384


def write_word_index(files: SiteFiles, place: str, store: FeatureStore, dictionary: str, features: np.ndarray) -> None:
    """Write the postings of `features` (ascending), which stand in them as their places among `features`."""
    scope = store.memory.scope(dictionary)
    found = store.trusted_sql(
        f"SELECT feature, field, word, score FROM derived.search_postings WHERE dictionary_id = {scope.dictionary_id}"
    )
    found = found.filter(pa.array(np.isin(found["feature"].to_numpy(), features)))
    encoded = found["word"].combine_chunks().dictionary_encode()
    words, word = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    order = sorted(range(len(words)), key=lambda n: text_order(words[n]))
    rank = np.empty(len(words), np.int64)
    rank[order] = np.arange(len(words))
    words = [words[n] for n in order]
    term_of_stem = {text: n for n, text in enumerate(sorted(set(stem(words)), key=text_order))}
    term_of_word = np.array([term_of_stem[s] for s in stem(words)], np.int64)
    word = rank[word]
    term = term_of_word[word] if len(word) else np.zeros(0, np.int64)
    position = np.searchsorted(features, found["feature"].to_numpy())
    named = found["field"].combine_chunks().dictionary_encode()
    fields = np.array([FIELDS.index(f) for f in named.dictionary.to_pylist()], np.uint8)[named.indices.to_numpy()]
    score = np.rint(found["score"].to_numpy().astype(np.float64) * 1000).astype(np.uint32)
    by_term = np.lexsort((word, fields, position, term))
    columns = {"position": position, "field": fields, "word": word, "score": score}
    columns = {name: values[by_term] for name, values in columns.items()}
    ends = np.cumsum(np.bincount(term, minlength=len(term_of_stem)))
    starts = shards(ends, SHARD_POSTINGS)
    for number, (first, last) in enumerate(pairwise(starts)):
        begin, end = (0 if first == 0 else int(ends[first - 1])), int(ends[last - 1])
        part = {name: values[begin:end] for name, values in columns.items()}
        files.data(
            f"{place}/p{number}",
            {},
            ends=(ends[first:last] - begin).astype(np.uint32),
            position=steps(part["position"]),
            field=part["field"],
            word=steps(part["word"]),
            score=part["score"].astype(np.uint32),
        )
    num_features = np.bincount(np.unique(np.stack([term, position], 1), axis=0)[:, 0], minlength=len(term_of_stem))
    files.data(
        f"{place}/words",
        {"words": "\n".join(words), "shards": starts, "fields": FIELDS},
        term=steps(term_of_word),
        features=num_features.astype(np.uint32),
    )
