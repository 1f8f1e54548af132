-- Statistics of the features of one chunk. `chunk` and `chunk_features` are temporary views made by the build.
CREATE OR REPLACE TEMP TABLE token_counts AS
SELECT feature, split, token_id, count(*) AS n FROM chunk GROUP BY feature, split, token_id;

INSERT INTO derived.feature_stats
SELECT f.dictionary_id, f.feature, r.split,
       coalesce(v.n, 0), coalesce(v.n / nullif(r.num_kept_rows, 0), 0), coalesce(v.mean, 0), coalesce(v.largest, 0),
       coalesce(v.q[1], 0), coalesce(v.q[2], 0), coalesce(v.q[3], 0),
       coalesce(t.entropy, 0), coalesce(t.num_distinct, 0), coalesce(o.num_documents, 0)
FROM chunk_features f
CROSS JOIN evidence.split_rows r
LEFT JOIN (
    SELECT feature, split, count(*) AS n, avg(activation::DOUBLE) AS mean, max(activation) AS largest,
           quantile_cont(activation, [0.5, 0.9, 0.99]) AS q
    FROM chunk GROUP BY feature, split
) v ON v.feature = f.feature AND v.split = r.split
LEFT JOIN (
    SELECT feature, split, count(*) AS num_distinct, greatest(log2(sum(n)) - sum(n * log2(n)) / sum(n), 0) AS entropy
    FROM token_counts GROUP BY feature, split
) t ON t.feature = f.feature AND t.split = r.split
LEFT JOIN (
    SELECT feature, split, count(*) AS num_documents
    FROM (SELECT DISTINCT feature, split, document_id FROM chunk) GROUP BY feature, split
) o ON o.feature = f.feature AND o.split = r.split
ORDER BY f.feature, r.split;

-- The ten most common tokens by one packed key (count, then the smaller token id), so that ties do not depend on threads.
INSERT INTO derived.feature_tokens
SELECT f.dictionary_id, f.feature, list(v.token ORDER BY c.place)
FROM chunk_features f
JOIN (
    SELECT feature, generate_subscripts(keys, 1) AS place, 4294967295 - (unnest(keys) & 4294967295) AS token_id
    FROM (
        SELECT feature, max((n << 32) + (4294967295 - token_id), 10) AS keys
        FROM token_counts WHERE split = 'train' GROUP BY feature
    )
) c USING (feature)
JOIN evidence.vocabulary v USING (token_id)
GROUP BY f.dictionary_id, f.feature
ORDER BY f.feature;

DROP TABLE token_counts;
