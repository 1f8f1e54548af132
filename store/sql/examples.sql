-- Examples of one feature: its rows are picked first, so that only their windows are read.
WITH picked AS MATERIALIZED (
    SELECT decile, rank, window_id, position, activation, offsets, activations
    FROM derived.examples
    WHERE segment_id = ({segment}) AND feature = $feature AND split = $split AND kind = $kind
    ORDER BY decile DESC, rank LIMIT $limit
)
SELECT c.corpus, p.decile, p.rank, p.window_id, w.document_ids[p.position + 1] AS document_id, o.title, p.position,
       p.activation, w.tokens[greatest(p.position - 16, 0) + 1 : p.position + 9] AS tokens,
       list_transform(
           range(-least(p.position, 16), least(len(w.token_ids) - p.position, 9)),
           lambda i: coalesce(p.activations[list_position(p.offsets, i)], 0)::FLOAT
       ) AS activations,
       (least(p.position, 16) + 1)::SMALLINT AS focus
FROM picked p
JOIN evidence.windows w ON w.window_id = p.window_id
JOIN evidence.corpora c USING (corpus_id)
LEFT JOIN evidence.documents o ON o.document_id = w.document_ids[p.position + 1]
ORDER BY p.decile DESC, p.rank
