-- Which features fire on a token, found while the store is built: to tell it of a common token reads every activation.
CREATE TABLE derived.token_features (segment_id USMALLINT, token_id INTEGER, feature INTEGER, count INTEGER);
CREATE TABLE derived.token_counts (
    segment_id USMALLINT, token_id INTEGER, num_rows INTEGER, num_features INTEGER
);
COMMENT ON TABLE derived.token_features IS 'Of every token the 64 features that stand for it best (F1 of active and token), the smaller number first where two are even. Sorted by token, feature.';
COMMENT ON COLUMN derived.token_features.segment_id IS 'Number of the segment: a dictionary on a corpus.';
COMMENT ON COLUMN derived.token_features.token_id IS 'Token id of the tokenizer.';
COMMENT ON COLUMN derived.token_features.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN derived.token_features.count IS 'Rows of the token on which the feature is active, all splits.';
COMMENT ON TABLE derived.token_counts IS 'Every token of a corpus: on how many rows it stands, and how many features are active on one of them.';
COMMENT ON COLUMN derived.token_counts.segment_id IS 'Number of the segment: a dictionary on a corpus.';
COMMENT ON COLUMN derived.token_counts.token_id IS 'Token id of the tokenizer.';
COMMENT ON COLUMN derived.token_counts.num_rows IS 'Rows of the corpus on which the token stands.';
COMMENT ON COLUMN derived.token_counts.num_features IS 'Features that are active on at least one of them.';
