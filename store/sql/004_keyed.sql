-- Several corpora and several dictionaries in one store. Window and document ids are unique in the store: those of a
-- corpus start at its first_window and first_document. A segment is one dictionary's activations on one corpus.
CREATE TYPE split_name AS ENUM ('train', 'calibration', 'test');

CREATE TABLE evidence.models (
    model_id USMALLINT, model_name VARCHAR, model_revision VARCHAR, model_sha256 VARCHAR, tokenizer_sha256 VARCHAR,
    vocabulary_id USMALLINT
);
CREATE TABLE evidence.corpora (
    corpus_id USMALLINT, corpus VARCHAR, dataset_fingerprint VARCHAR, vocabulary_id USMALLINT,
    first_window INTEGER, num_windows INTEGER, first_document INTEGER, num_documents INTEGER
);
CREATE TABLE evidence.segments (
    segment_id USMALLINT, dictionary_id USMALLINT, corpus_id USMALLINT, num_activations BIGINT
);
CREATE TABLE evidence.runs (
    dictionary_id USMALLINT, corpus_id USMALLINT, run VARCHAR, model_name VARCHAR, model_revision VARCHAR,
    model_sha256 VARCHAR, tokenizer_sha256 VARCHAR, dataset_fingerprint VARCHAR, code_version VARCHAR, config VARCHAR,
    indexed TIMESTAMP
);
CREATE TABLE evidence.sources (
    corpus_id USMALLINT, evidence_table VARCHAR, file VARCHAR, bytes BIGINT, fingerprint VARCHAR
);
CREATE TABLE evidence.receipts (
    dictionary_id USMALLINT, feature INTEGER, control VARCHAR, value DOUBLE, threshold DOUBLE, n BIGINT,
    low DOUBLE, high DOUBLE, verdict VARCHAR
);

-- What a store of the version before holds becomes its first corpus.
INSERT INTO evidence.corpora
SELECT 0, 'text', sha256((SELECT string_agg(sha256, ',' ORDER BY document_id) FROM evidence.documents)), 0,
       0, max(window_id) + 1, 0, (SELECT max(document_id) + 1 FROM evidence.documents)
FROM evidence.windows HAVING count(*) > 0;
INSERT INTO evidence.models
SELECT row_number() OVER (ORDER BY min(dictionary_id)) - 1, model_name, NULL, model_sha256, tokenizer_sha256, 0
FROM evidence.dictionaries GROUP BY model_name, model_sha256, tokenizer_sha256;
INSERT INTO evidence.segments
SELECT row_number() OVER (ORDER BY dictionary_id) - 1, dictionary_id, 0, count(*)
FROM evidence.activations GROUP BY dictionary_id;

ALTER TABLE evidence.dictionaries ADD COLUMN model_id USMALLINT;
UPDATE evidence.dictionaries SET model_id = m.model_id FROM evidence.models m
WHERE m.model_sha256 IS NOT DISTINCT FROM dictionaries.model_sha256
  AND m.tokenizer_sha256 IS NOT DISTINCT FROM dictionaries.tokenizer_sha256
  AND m.model_name IS NOT DISTINCT FROM dictionaries.model_name;

CREATE TABLE evidence.keyed_vocabulary (vocabulary_id USMALLINT, token_id INTEGER, token VARCHAR);
INSERT INTO evidence.keyed_vocabulary SELECT 0, token_id, token FROM evidence.vocabulary ORDER BY token_id;
DROP TABLE evidence.vocabulary;
ALTER TABLE evidence.keyed_vocabulary RENAME TO vocabulary;

ALTER TABLE evidence.split_rows ADD COLUMN corpus_id USMALLINT;
UPDATE evidence.split_rows SET corpus_id = 0;

CREATE TABLE evidence.activations_by_feature (
    segment_id USMALLINT, feature INTEGER, split split_name, window_id INTEGER, position SMALLINT, activation FLOAT
);
INSERT INTO evidence.activations_by_feature
SELECT s.segment_id, a.feature, a.split, a.window_id, a.position, a.activation
FROM evidence.activations a JOIN evidence.segments s USING (dictionary_id)
ORDER BY s.segment_id, a.feature, a.split::split_name, a.activation DESC, a.window_id, a.position;
CREATE TABLE evidence.activations_by_document (
    segment_id USMALLINT, window_id INTEGER, position SMALLINT, feature INTEGER, activation FLOAT
);
INSERT INTO evidence.activations_by_document
SELECT segment_id, window_id, position, feature, activation
FROM evidence.activations_by_feature ORDER BY segment_id, window_id, position, feature;

CREATE TABLE derived.keyed_stats (
    segment_id USMALLINT, feature INTEGER, split split_name, num_activations BIGINT, density DOUBLE,
    mean_activation FLOAT, max_activation FLOAT, p50 FLOAT, p90 FLOAT, p99 FLOAT, token_entropy FLOAT,
    num_distinct_tokens BIGINT, num_documents BIGINT
);
INSERT INTO derived.keyed_stats
SELECT s.segment_id, t.* EXCLUDE (dictionary_id)
FROM derived.feature_stats t JOIN evidence.segments s USING (dictionary_id)
ORDER BY s.segment_id, t.feature, t.split::split_name;
DROP TABLE derived.feature_stats;
ALTER TABLE derived.keyed_stats RENAME TO feature_stats;

CREATE TABLE derived.keyed_tokens (segment_id USMALLINT, feature INTEGER, top_tokens VARCHAR[]);
INSERT INTO derived.keyed_tokens
SELECT s.segment_id, t.feature, t.top_tokens FROM derived.feature_tokens t JOIN evidence.segments s USING (dictionary_id)
ORDER BY s.segment_id, t.feature;
DROP TABLE derived.feature_tokens;
ALTER TABLE derived.keyed_tokens RENAME TO feature_tokens;

CREATE TABLE derived.keyed_examples (
    segment_id USMALLINT, feature INTEGER, split split_name, kind VARCHAR, decile TINYINT, rank SMALLINT,
    window_id INTEGER, position SMALLINT, activation FLOAT, offsets TINYINT[], activations FLOAT[]
);
INSERT INTO derived.keyed_examples
SELECT s.segment_id, e.feature, e.split, e.kind, e.decile, e.rank, e.window_id, e.position, e.activation,
       list_filter(range(len(e.activations)), lambda i: e.activations[i + 1] > 0).list_transform(lambda i: i - e.focus + 1),
       list_filter(e.activations, lambda a: a > 0)
FROM derived.examples e JOIN evidence.segments s USING (dictionary_id)
ORDER BY s.segment_id, e.feature, e.split::split_name, e.kind DESC, e.decile DESC, e.rank;
DROP TABLE derived.examples;
ALTER TABLE derived.keyed_examples RENAME TO examples;

CREATE TABLE derived.cofirings (
    segment_id USMALLINT, feature INTEGER, rank TINYINT, partner INTEGER, count INTEGER, num_sampled UTINYINT, pmi FLOAT
);

DROP TABLE derived.row_groups;
DROP TABLE evidence.activations;

-- The word index, one dictionary after the other: upgrading makes it anew. score is what a word of a feature adds to
-- the BM25 score of the feature.
DROP TABLE derived.search_postings;
DROP TABLE derived.search_features;
DROP TABLE derived.search_terms;
CREATE TABLE derived.search_terms (dictionary_id USMALLINT, term VARCHAR, term_id INTEGER, num_features INTEGER);
CREATE TABLE derived.search_postings (
    dictionary_id USMALLINT, term_id INTEGER, feature INTEGER, field VARCHAR, word VARCHAR, score FLOAT
);

ALTER TABLE evidence.documents ADD COLUMN corpus_id USMALLINT;
UPDATE evidence.documents SET corpus_id = 0;
ALTER TABLE evidence.windows ADD COLUMN corpus_id USMALLINT;
UPDATE evidence.windows SET corpus_id = 0;
CREATE TABLE evidence.embeddings (
    dictionary_id USMALLINT, feature INTEGER, source VARCHAR, model VARCHAR, vector BLOB
);
