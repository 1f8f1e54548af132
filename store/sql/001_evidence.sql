-- The Parquet evidence as tables. A dictionary is named by a small id here; the views of 003 give its name.
CREATE SCHEMA evidence;

CREATE TABLE evidence.dictionaries (
    dictionary_id USMALLINT, dictionary VARCHAR, architecture VARCHAR, model_name VARCHAR, model_sha256 VARCHAR,
    tokenizer_sha256 VARCHAR, hook_point VARCHAR, d_in INTEGER, d_sae INTEGER, k INTEGER, config VARCHAR
);
CREATE TABLE evidence.documents (
    document_id INTEGER, split VARCHAR, title VARCHAR, source VARCHAR, num_tokens INTEGER, sha256 VARCHAR
);
CREATE TABLE evidence.vocabulary (token_id INTEGER, token VARCHAR);
CREATE TABLE evidence.windows (
    window_id INTEGER, split VARCHAR, token_ids INTEGER[], document_ids INTEGER[], tokens VARCHAR[]
);
-- One row a position of a window, position from 0.
CREATE TABLE evidence.tokens (window_id INTEGER, position SMALLINT, token_id INTEGER, document_id INTEGER);
CREATE TABLE evidence.split_rows (
    split VARCHAR, num_documents BIGINT, num_windows BIGINT, num_rows BIGINT, num_kept_rows BIGINT,
    num_first_position_rows BIGINT, num_massive_rows BIGINT
);
-- Physical order: dictionary_id, feature, split, activation descending, window_id, position. Top rows of a feature are
-- one range of row groups, and a rank within (feature, split) is a difference of row ids.
CREATE TABLE evidence.activations (
    dictionary_id USMALLINT, feature INTEGER, split VARCHAR, window_id INTEGER, position SMALLINT, token_id INTEGER,
    document_id INTEGER, activation FLOAT
);
CREATE TABLE evidence.logit_effects (
    dictionary_id USMALLINT, feature INTEGER, direction VARCHAR, rank SMALLINT, token_id INTEGER, effect FLOAT
);
CREATE TABLE evidence.neighbours (
    dictionary_id USMALLINT, feature INTEGER, rank SMALLINT, neighbour INTEGER, cosine FLOAT
);
CREATE TABLE evidence.labels (
    dictionary_id USMALLINT, feature INTEGER, label VARCHAR, kind VARCHAR, predicate VARCHAR, explainer VARCHAR,
    score_split VARCHAR, auroc FLOAT, auroc_low FLOAT, auroc_high FLOAT, precision FLOAT, recall FLOAT, f1 FLOAT,
    n_active INTEGER, n_inactive INTEGER, calibration_f1 FLOAT
);
CREATE TABLE evidence.metrics (
    dictionary_id USMALLINT, split VARCHAR, metric VARCHAR, value DOUBLE, n BIGINT, low DOUBLE, high DOUBLE
);
