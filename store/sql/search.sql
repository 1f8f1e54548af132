-- The features of one dictionary with the best sum of scores. {terms} are numbers of terms: a list of constants lets
-- DuckDB skip all other postings.
SELECT h.feature, sum(h.score) AS score
FROM derived.search_postings h
WHERE h.dictionary_id = {dictionary_id} AND h.term_id IN ({terms}) AND {where}
GROUP BY h.feature
ORDER BY score DESC, h.feature
LIMIT $limit
