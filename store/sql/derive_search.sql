-- Words of a dictionary's features by field, before stemming. A word's weight is its field's weight times its count there.
CREATE OR REPLACE TEMP TABLE feature_words AS
WITH texts AS (
    SELECT feature, 'label' AS field, 4.0 AS weight, label AS text
    FROM evidence.labels WHERE dictionary_id = {dictionary_id} AND kind <> 'none' AND label <> 'unexplained'
    UNION ALL
    SELECT t.feature, 'activates', 2.0, unnest(t.top_tokens)
    FROM derived.feature_tokens t JOIN evidence.segments g USING (segment_id) WHERE g.dictionary_id = {dictionary_id}
    UNION ALL
    SELECT feature, 'promotes', 1.0, unnest(promotes) FROM derived.feature_logits WHERE dictionary_id = {dictionary_id}
),
-- most texts are single tokens that come again and again: each is split once
split_texts AS (
    SELECT text, unnest(words_of(text)) AS word FROM (SELECT DISTINCT text FROM texts)
)
SELECT feature, field, word, sum(weight)::FLOAT AS weight
FROM texts JOIN split_texts USING (text) GROUP BY feature, field, word;
