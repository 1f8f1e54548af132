-- Words of every feature by field, before stemming. A word's weight is its field's weight times its count there.
CREATE OR REPLACE TEMP TABLE feature_words AS
WITH texts AS (
    SELECT dictionary_id, feature, 'label' AS field, 4.0 AS weight, label AS text
    FROM evidence.labels WHERE kind <> 'none' AND label <> 'unexplained'
    UNION ALL
    SELECT dictionary_id, feature, 'activates', 2.0, tokens[focus]
    FROM derived.examples WHERE kind = 'top' AND split = 'train'
    UNION ALL
    SELECT dictionary_id, feature, 'activates', 2.0, unnest(top_tokens) FROM derived.feature_tokens
    UNION ALL
    SELECT dictionary_id, feature, 'promotes', 1.0, unnest(promotes) FROM derived.feature_logits
),
split_texts AS (
    SELECT dictionary_id, feature, field, weight, unnest(words_of(text)) AS word FROM texts
)
SELECT dictionary_id, feature, field, word, sum(weight)::FLOAT AS weight
FROM split_texts GROUP BY dictionary_id, feature, field, word;
