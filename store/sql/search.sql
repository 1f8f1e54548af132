-- The features of one dictionary with the best sum of scores. {terms} are numbers of terms: a list of constants lets
-- DuckDB skip all other postings.
SELECT feature, sum(score) AS score
FROM derived.search_postings
WHERE dictionary_id = {dictionary_id} AND term_id IN ({terms})
GROUP BY feature
ORDER BY score DESC, feature
{limit}
