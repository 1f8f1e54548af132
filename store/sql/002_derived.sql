-- What the build computes from the evidence.
CREATE SCHEMA derived;

-- Where the rows of (dictionary, feature, split) lie in evidence.activations: row ids first_row .. first_row + n - 1.
CREATE TABLE derived.row_groups (
    dictionary_id USMALLINT, feature INTEGER, split VARCHAR, first_row BIGINT, num_activations BIGINT
);
CREATE TABLE derived.feature_stats (
    dictionary_id USMALLINT, feature INTEGER, split VARCHAR, num_activations BIGINT, density DOUBLE,
    mean_activation DOUBLE, max_activation FLOAT, p50 FLOAT, p90 FLOAT, p99 FLOAT, token_entropy DOUBLE,
    num_distinct_tokens BIGINT, num_documents BIGINT
);
CREATE TABLE derived.feature_tokens (dictionary_id USMALLINT, feature INTEGER, top_tokens VARCHAR[]);
CREATE TABLE derived.feature_logits (
    dictionary_id USMALLINT, feature INTEGER, promotes VARCHAR[], suppresses VARCHAR[]
);
CREATE TABLE derived.examples (
    dictionary_id USMALLINT, feature INTEGER, split VARCHAR, kind VARCHAR, decile TINYINT, rank SMALLINT,
    window_id INTEGER, document_id INTEGER, position SMALLINT, activation FLOAT,
    tokens VARCHAR[], activations FLOAT[], focus SMALLINT
);

-- Word index. weight is the field's weight times how often the word is there; length is a feature's total weight.
CREATE TABLE derived.search_postings (
    term VARCHAR, dictionary_id USMALLINT, feature INTEGER, field VARCHAR, word VARCHAR, weight FLOAT
);
CREATE TABLE derived.search_features (dictionary_id USMALLINT, feature INTEGER, length FLOAT);
CREATE TABLE derived.search_terms (term VARCHAR, dictionary_id USMALLINT, num_features BIGINT);
