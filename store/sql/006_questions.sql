-- The usual questions in one line. A macro asks the store's first dictionary unless `dict` names another.
CREATE OR REPLACE MACRO first_dictionary() AS (
    SELECT dictionary FROM evidence.dictionaries ORDER BY dictionary_id LIMIT 1
);

CREATE OR REPLACE MACRO features_like(id, dict := NULL) AS TABLE
SELECT dictionary, rank, neighbour AS feature, cosine, neighbour_label AS label
FROM neighbours WHERE dictionary = coalesce(dict, first_dictionary()) AND neighbours.feature = id ORDER BY rank;
COMMENT ON MACRO TABLE features_like IS 'Features with the nearest decoder rows, nearest first: FROM features_like(123).';

CREATE OR REPLACE MACRO promotes(word, dict := NULL) AS TABLE
SELECT g.dictionary, g.feature, coalesce(l.label, 'unexplained') AS label, g.token, g.effect, g.rank
FROM logit_effects g LEFT JOIN labels l USING (dictionary, feature)
WHERE g.dictionary = coalesce(dict, first_dictionary()) AND g.direction = 'promoted' AND g.token = word
ORDER BY g.effect DESC;
COMMENT ON MACRO TABLE promotes IS 'Features that raise the logit of a token most, of those that have it among their strongest: FROM promotes('' bank'').';

CREATE OR REPLACE MACRO suppresses(word, dict := NULL) AS TABLE
SELECT g.dictionary, g.feature, coalesce(l.label, 'unexplained') AS label, g.token, g.effect, g.rank
FROM logit_effects g LEFT JOIN labels l USING (dictionary, feature)
WHERE g.dictionary = coalesce(dict, first_dictionary()) AND g.direction = 'suppressed' AND g.token = word
ORDER BY g.effect;
COMMENT ON MACRO TABLE suppresses IS 'Features that lower the logit of a token most, of those that have it among their strongest.';

CREATE OR REPLACE MACRO fires_on(word, dict := NULL) AS TABLE
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
COMMENT ON MACRO TABLE fires_on IS 'Features that are active on a token, those that stand for it best first (F1 of active and token): FROM fires_on('' bank'') LIMIT 10. Reads every activation.';

CREATE OR REPLACE MACRO cofires(id, dict := NULL) AS TABLE
SELECT dictionary, corpus, rank, partner AS feature, partner_label AS label, count, pmi, num_sampled
FROM cofirings WHERE dictionary = coalesce(dict, first_dictionary()) AND cofirings.feature = id ORDER BY corpus, rank;
COMMENT ON MACRO TABLE cofires IS 'Features that are active on the same rows, from the table made by the build: FROM cofires(123).';

CREATE OR REPLACE MACRO cofires_exact(id, dict := NULL) AS TABLE
WITH segments AS (
    SELECT g.segment_id, c.corpus
    FROM evidence.segments g JOIN evidence.dictionaries d USING (dictionary_id) JOIN evidence.corpora c USING (corpus_id)
    WHERE d.dictionary = coalesce(dict, first_dictionary())
),
own AS (
    SELECT segment_id, window_id, position
    FROM evidence.activations_by_feature SEMI JOIN segments USING (segment_id) WHERE feature = id
),
hits AS (
    SELECT a.segment_id, a.feature, count(*) AS count
    FROM evidence.activations_by_document a JOIN own USING (segment_id, window_id, position)
    WHERE a.feature <> id GROUP BY a.segment_id, a.feature
),
totals AS (
    SELECT segment_id, feature, sum(num_activations) AS total
    FROM derived.feature_stats SEMI JOIN segments USING (segment_id) GROUP BY segment_id, feature
),
num_rows AS (
    SELECT segment_id, count(DISTINCT (window_id, position)) AS n
    FROM evidence.activations_by_document SEMI JOIN segments USING (segment_id) GROUP BY segment_id
)
SELECT s.corpus, h.feature, coalesce(l.label, 'unexplained') AS label, h.count,
       log2(h.count * r.n / (t.total * o.n)) AS pmi
FROM hits h
JOIN totals t USING (segment_id, feature)
JOIN (SELECT segment_id, count(*) AS n FROM own GROUP BY segment_id) o USING (segment_id)
JOIN num_rows r USING (segment_id)
JOIN segments s USING (segment_id)
LEFT JOIN labels l ON l.dictionary = coalesce(dict, first_dictionary()) AND l.feature = h.feature
ORDER BY h.count * pmi DESC, h.feature;
COMMENT ON MACRO TABLE cofires_exact IS 'The same counted on every row, partners by chance included. Reads every activation.';

CREATE OR REPLACE MACRO compare(one, other) AS TABLE
SELECT split, metric, a.value AS value, b.value AS other_value, b.value - a.value AS difference,
       a.low, a.high, b.low AS other_low, b.high AS other_high
FROM (SELECT * FROM metrics WHERE dictionary = one) a
FULL JOIN (SELECT * FROM metrics WHERE dictionary = other) b USING (split, metric)
ORDER BY split, metric;
COMMENT ON MACRO TABLE compare IS 'Metrics of two dictionaries side by side: FROM compare(''a'', ''b'').';

CREATE OR REPLACE VIEW dead AS SELECT * FROM features WHERE max_activation = 0 AND coalesce(test_density, 0) = 0;
COMMENT ON VIEW dead IS 'Features that fire on no kept row of train or test.';
CREATE OR REPLACE VIEW dense AS SELECT * FROM features WHERE density > 0.1;
COMMENT ON VIEW dense IS 'Features that are active on more than a tenth of the kept train rows.';
CREATE OR REPLACE VIEW lexical AS SELECT * FROM features WHERE kind = 'lexical';
COMMENT ON VIEW lexical IS 'Features whose label is about the token itself.';
CREATE OR REPLACE VIEW unexplained AS SELECT * FROM features WHERE kind = 'none' AND max_activation > 0;
COMMENT ON VIEW unexplained IS 'Features that fire and have no label.';
