"""The inverted word index of a dictionary's features: labels, the tokens they fire on, the tokens they promote.

BM25 (k1 = 1.2, b = 0.75) with a word's weight (its field's times its count) as the term frequency. The scores are in
the index: what a search adds up is what it reads. Texts and words are numbers while it is made; most texts are single
tokens that come again and again, and each is split once.
"""

import duckdb
import numpy as np
import pyarrow as pa

from .migrations import sql_text
from .text_rows import ranges, run_starts
from .words import WORDS_OF, stem

FIELDS = ("label", "activates", "promotes")
#: What a word counts in each of FIELDS.
WEIGHTS = np.array([4.0, 2.0, 1.0])
K1, B = 1.2, 0.75


def index_words(connection: duckdb.DuckDBPyConnection, dictionary_id: int) -> None:
    """Make a dictionary's part of the index anew."""
    for table in ("search_postings", "search_terms"):
        connection.execute(f"DELETE FROM derived.{table} WHERE dictionary_id = {dictionary_id}")
    texts = connection.sql(sql_text("derive_search").replace("{dictionary_id}", str(dictionary_id))).to_arrow_table()
    if texts.num_rows == 0:
        return
    feature, field, word, words = _words(connection, texts)
    if len(words) == 0:
        return
    feature, field, word, weight = _summed(feature, field, word)
    terms, term_of_word = np.unique(np.array(stem(words), object).astype(str), return_inverse=True)
    term = term_of_word[word]
    score, num_features = _scores(feature, term, weight)
    order = np.argsort(term, kind="stable")  # by term, feature, field, word: they come in the order of the last three
    _insert(
        connection,
        "derived.search_terms",
        pa.table(
            {
                "dictionary_id": np.full(len(terms), dictionary_id, np.uint16),
                "term": pa.array(terms.tolist(), pa.string()),
                "term_id": np.arange(len(terms), dtype=np.int32),
                "num_features": num_features.astype(np.int32),
            }
        ),
    )
    _insert(
        connection,
        "derived.search_postings",
        pa.table(
            {
                "dictionary_id": np.full(len(order), dictionary_id, np.uint16),
                "term_id": term[order].astype(np.int32),
                "feature": feature[order].astype(np.int32),
                "field": pa.DictionaryArray.from_arrays(pa.array(field[order].astype(np.int8)), pa.array(FIELDS)),
                "word": pa.DictionaryArray.from_arrays(pa.array(word[order].astype(np.int32)), pa.array(words)),
                "score": np.round(score[order], 3).astype(np.float32),
            }
        ),
    )


def _words(
    connection: duckdb.DuckDBPyConnection, texts: pa.Table
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """(feature, field, word) of every word of every text, and the words in order."""
    encoded = texts["text"].combine_chunks().dictionary_encode()
    connection.register("distinct_texts", pa.table({"text": encoded.dictionary}))
    split = connection.sql(
        f"SELECT {WORDS_OF} AS words FROM distinct_texts"
    ).to_arrow_table()["words"].combine_chunks()  # fmt: skip
    connection.unregister("distinct_texts")
    flat = split.flatten().dictionary_encode()
    words = flat.dictionary.to_pylist()
    order = np.argsort(np.array(words, object)) if words else np.zeros(0, np.int64)
    rank = np.empty(len(words), np.int64)
    rank[order] = np.arange(len(words))
    number, lengths = rank[flat.indices.to_numpy()], split.value_lengths().to_numpy()
    starts = np.cumsum(lengths) - lengths
    text = encoded.indices.to_numpy()
    place = ranges(starts[text], lengths[text])
    owner = np.repeat(np.arange(len(text)), lengths[text])
    return texts["feature"].to_numpy()[owner], texts["field"].to_numpy()[owner], number[place], sorted(words)


def _summed(
    feature: np.ndarray, field: np.ndarray, word: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (feature, field, word) with the weight of all their occurrences."""
    keys = (feature.astype(np.uint64) << np.uint64(34)) | (field.astype(np.uint64) << np.uint64(32))
    keys = np.sort(keys | word.astype(np.uint64))
    starts = run_starts(keys)
    count = np.diff(np.append(starts, len(keys)))
    keys = keys[starts]
    field = ((keys >> np.uint64(32)) & np.uint64(3)).astype(np.int64)
    return (
        (keys >> np.uint64(34)).astype(np.int64),
        field,
        (keys & np.uint64(2**32 - 1)).astype(np.int64),
        count * WEIGHTS[field],
    )


def _scores(feature: np.ndarray, term: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what each posting adds to the score of its feature, number of features of every term)."""
    pairs, hit = np.unique(feature * (int(term.max()) + 1) + term, return_inverse=True)
    frequency = np.bincount(hit, weights=weight)  # of the term in the feature
    num_features = np.bincount(pairs % (int(term.max()) + 1), minlength=int(term.max()) + 1)
    length = np.bincount(feature, weights=weight)
    total, mean = np.count_nonzero(length), length.sum() / np.count_nonzero(length)
    rarity = np.log(1 + (total - num_features + 0.5) / (num_features + 0.5))
    return rarity[term] * weight * (K1 + 1) / (frequency[hit] + K1 * (1 - B + B * length[feature] / mean)), num_features


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    connection.register("index_rows", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM index_rows")
    connection.unregister("index_rows")
