-- fires_on asks what the build found; fires_on_exact counts every row.
CREATE OR REPLACE MACRO fires_on(word, dict := NULL) AS TABLE
WITH best AS (
    SELECT d.dictionary_id, d.dictionary, c.corpus, f.token_id, f.feature, f.count, n.num_rows, n.num_features,
           sum(t.num_activations) AS total
    FROM evidence.dictionaries d
    JOIN evidence.segments g USING (dictionary_id)
    JOIN evidence.corpora c USING (corpus_id)
    JOIN evidence.vocabulary v ON v.vocabulary_id = c.vocabulary_id AND v.token = word
    JOIN derived.token_counts n ON n.segment_id = g.segment_id AND n.token_id = v.token_id
    JOIN derived.token_features f ON f.segment_id = g.segment_id AND f.token_id = v.token_id
    JOIN derived.feature_stats t ON t.segment_id = g.segment_id AND t.feature = f.feature
    WHERE d.dictionary = coalesce(dict, first_dictionary())
    GROUP BY ALL
)
SELECT b.dictionary, b.corpus, b.feature, coalesce(l.label, 'unexplained') AS label, b.count,
       b.count / b.num_rows AS share_of_token, b.count / b.total AS share_of_feature,
       2 * b.count / (b.total + b.num_rows) AS f1, b.num_features
FROM best b LEFT JOIN evidence.labels l ON l.dictionary_id = b.dictionary_id AND l.feature = b.feature
ORDER BY f1 DESC, b.feature;
COMMENT ON MACRO TABLE fires_on IS 'The 64 features that stand for a token best (F1 of active and token), on each corpus: FROM fires_on('' bank'') LIMIT 10. num_features are active on it in all; fires_on_exact tells every one.';

CREATE OR REPLACE MACRO fires_on_exact(word, dict := NULL) AS TABLE
WITH segments AS (
    SELECT g.segment_id, c.vocabulary_id, c.first_window, c.num_windows
    FROM evidence.segments g JOIN evidence.dictionaries d USING (dictionary_id) JOIN evidence.corpora c USING (corpus_id)
    WHERE d.dictionary = coalesce(dict, first_dictionary())
),
places AS (
    SELECT t.window_id, t.position, s.segment_id
    FROM segments s
    JOIN evidence.vocabulary v ON v.vocabulary_id = s.vocabulary_id AND v.token = word
    JOIN evidence.tokens t ON t.token_id = v.token_id
        AND t.window_id BETWEEN s.first_window AND s.first_window + s.num_windows - 1
),
hits AS (
    SELECT a.feature, count(*) AS count, max(a.activation) AS max_activation
    FROM evidence.activations_by_document a JOIN places USING (segment_id, window_id, position) GROUP BY a.feature
),
totals AS (
    SELECT feature, sum(num_activations) AS total
    FROM derived.feature_stats SEMI JOIN segments USING (segment_id) GROUP BY feature
)
SELECT coalesce(dict, first_dictionary()) AS dictionary, h.feature, coalesce(l.label, 'unexplained') AS label, h.count,
       h.max_activation, h.count / (SELECT count(*) FROM places) AS share_of_token, h.count / t.total AS share_of_feature,
       2 * h.count / (t.total + (SELECT count(*) FROM places)) AS f1
FROM hits h
JOIN totals t USING (feature)
LEFT JOIN labels l ON l.dictionary = coalesce(dict, first_dictionary()) AND l.feature = h.feature
ORDER BY f1 DESC, h.feature;
COMMENT ON MACRO TABLE fires_on_exact IS 'All features that are active on a token, those that stand for it best first, over all corpora of the dictionary: FROM fires_on_exact('' bank''). Reads every activation.';
