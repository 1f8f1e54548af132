-- BM25 (k1 = 1.2, b = 0.75) over the words of one dictionary's features; weight stands for the term frequency.
WITH size AS (
    SELECT count(*) AS num_features, avg(length) AS mean_length FROM derived.search_features WHERE dictionary_id = $dictionary_id
),
hits AS (
    SELECT feature, term, sum(weight) AS weight, list({'field': field, 'word': word} ORDER BY weight DESC, word) AS places
    FROM derived.search_postings
    WHERE dictionary_id = $dictionary_id AND term IN (SELECT unnest($terms))
    GROUP BY feature, term
),
scored AS (
    SELECT h.feature, flatten(list(h.places ORDER BY h.term)) AS places,
           sum(
               ln(1 + (s.num_features - t.num_features + 0.5) / (t.num_features + 0.5))
               * h.weight * 2.2 / (h.weight + 1.2 * (0.25 + 0.75 * l.length / s.mean_length))
           ) AS score
    FROM hits h
    JOIN derived.search_terms t ON t.term = h.term AND t.dictionary_id = $dictionary_id
    JOIN derived.search_features l ON l.feature = h.feature AND l.dictionary_id = $dictionary_id
    CROSS JOIN size s
    GROUP BY h.feature
)
SELECT f.dictionary, f.feature, c.score, f.label, f.kind, f.auroc, f.density, c.places
FROM scored c
JOIN (
    SELECT * FROM features WHERE dictionary = $dictionary AND ({where})
) f USING (feature)
ORDER BY c.score DESC, f.feature
LIMIT $limit
