-- Texts of a dictionary's features by number of their field (search_index.FIELDS).
SELECT feature, 0::UTINYINT AS field, label AS text
FROM evidence.labels WHERE dictionary_id = {dictionary_id} AND kind <> 'none' AND label <> 'unexplained'
UNION ALL
SELECT t.feature, 1, unnest(t.top_tokens)
FROM derived.feature_tokens t JOIN evidence.segments g USING (segment_id) WHERE g.dictionary_id = {dictionary_id}
UNION ALL
SELECT feature, 2, unnest(promotes) FROM derived.feature_logits WHERE dictionary_id = {dictionary_id}
