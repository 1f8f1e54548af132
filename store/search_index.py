"""The inverted word index of a dictionary's features: labels, the tokens they fire on, the tokens they promote.

BM25 (k1 = 1.2, b = 0.75) with a word's weight (its field's times its count) as the term frequency. The scores are in
the index: what a search adds up is what it reads.
"""

import duckdb

from .migrations import sql_text
from .words import WORDS_OF, stem_table


def index_words(connection: duckdb.DuckDBPyConnection, dictionary_id: int) -> None:
    """Make a dictionary's part of the index anew."""
    for table in ("search_postings", "search_terms"):
        connection.execute(f"DELETE FROM derived.{table} WHERE dictionary_id = {dictionary_id}")
    connection.execute(f"CREATE OR REPLACE TEMP MACRO words_of(text) AS {WORDS_OF}")
    connection.execute(sql_text("derive_search").replace("{dictionary_id}", str(dictionary_id)))
    words = [row[0] for row in connection.execute("SELECT DISTINCT word FROM feature_words ORDER BY word").fetchall()]
    connection.register("stems", stem_table(words))
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE stemmed AS SELECT * FROM feature_words JOIN stems USING (word);
        INSERT INTO derived.search_terms BY NAME
        SELECT {dictionary_id} AS dictionary_id, term, row_number() OVER (ORDER BY term) - 1 AS term_id, num_features
        FROM (SELECT term, count(DISTINCT feature) AS num_features FROM stemmed GROUP BY term) ORDER BY term;
        INSERT INTO derived.search_postings BY NAME
        WITH lengths AS (SELECT feature, sum(weight) AS length FROM stemmed GROUP BY feature),
        size AS (SELECT count(*) AS num_features, avg(length) AS mean_length FROM lengths),
        hits AS (SELECT feature, term, sum(weight) AS weight FROM stemmed GROUP BY feature, term)
        SELECT {dictionary_id} AS dictionary_id, t.term_id, s.feature, s.field, s.word,
               (s.weight * ln(1 + (z.num_features - t.num_features + 0.5) / (t.num_features + 0.5)) * 2.2
                / (h.weight + 1.2 * (0.25 + 0.75 * l.length / z.mean_length)))::FLOAT AS score
        FROM stemmed s
        JOIN (SELECT * FROM derived.search_terms WHERE dictionary_id = {dictionary_id}) t USING (term)
        JOIN hits h USING (feature, term)
        JOIN lengths l USING (feature)
        CROSS JOIN size z
        ORDER BY t.term_id, s.feature, s.field, s.word;
        DROP TABLE stemmed;
        DROP TABLE feature_words;
        """
    )
    connection.unregister("stems")
