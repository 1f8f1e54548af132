-- Features that fire in some places of the text; windows first, as constants, so that all other rows are skipped.
WITH hits AS (
    SELECT feature, count(*) AS count, max(activation) AS max_activation
    FROM evidence.activations_by_document
    WHERE segment_id = {segment_id} AND window_id IN ({windows}) AND ({places})
    GROUP BY feature
)
SELECT h.feature, h.count, h.max_activation, h.max_activation / nullif(s.max_activation, 0) AS share_of_largest,
       coalesce(l.label, 'unexplained') AS label, coalesce(l.kind, 'none') AS kind
FROM hits h
JOIN derived.feature_stats s ON s.segment_id = {segment_id} AND s.split = 'train' AND s.feature = h.feature
LEFT JOIN evidence.labels l ON l.dictionary_id = {dictionary_id} AND l.feature = h.feature
ORDER BY share_of_largest DESC, h.feature LIMIT $limit
