-- BM25 (k1 = 1.2, b = 0.75) over the words of one dictionary's features; weight stands for the term frequency.
-- {terms} are numbers of terms: a list of constants lets DuckDB skip all other postings.
WITH size AS (
    SELECT count(*) AS num_features, avg(length) AS mean_length
    FROM derived.search_features WHERE dictionary_id = {dictionary_id}
),
hits AS (
    SELECT feature, term_id, sum(weight) AS weight
    FROM derived.search_postings
    WHERE dictionary_id = {dictionary_id} AND term_id IN ({terms})
    GROUP BY feature, term_id
)
SELECT h.feature,
       sum(
           ln(1 + (s.num_features - t.num_features + 0.5) / (t.num_features + 0.5))
           * h.weight * 2.2 / (h.weight + 1.2 * (0.25 + 0.75 * l.length / s.mean_length))
       ) AS score
FROM hits h
JOIN derived.search_terms t ON t.term_id = h.term_id AND t.dictionary_id = {dictionary_id}
JOIN derived.search_features l ON l.feature = h.feature AND l.dictionary_id = {dictionary_id}
CROSS JOIN size s
WHERE {where}
GROUP BY h.feature
ORDER BY score DESC, h.feature
LIMIT $limit
