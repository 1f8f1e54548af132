-- Examples of the features of one chunk: the rows to show are picked by row id, then given their visible context.
-- A row's rank within (feature, split) is its row id less the group's first row id: 0 is the strongest.
CREATE OR REPLACE TEMP VIEW ranked AS
SELECT c.*, c.row_id - g.first_row AS rank, g.num_activations AS n
FROM chunk c JOIN derived.row_groups g USING (dictionary_id, feature, split);

CREATE OR REPLACE TEMP TABLE picks AS
WITH best_of_window AS (
    SELECT feature, split, min(row_id) AS row_id
    -- the top 20 windows lie within the strongest 20 windows' worth of rows
    FROM ranked
    WHERE split IN ('train', 'test') AND rank < 20 * (SELECT max(len(token_ids)) FROM evidence.windows)
    GROUP BY feature, split, window_id
),
tops AS (
    SELECT split, min(row_id, 20) AS rows FROM best_of_window GROUP BY feature, split
),
-- Two of every tenth, by a fixed hash of (feature, window, position).
samples AS (
    SELECT 10 - (rank * 10) // n AS decile,
           arg_min(row_id, pick_hash(feature, window_id, position), 2) AS rows
    FROM ranked WHERE split = 'train' GROUP BY feature, decile
),
listed AS (
    SELECT 'top' AS kind, NULL::TINYINT AS decile, generate_subscripts(rows, 1) AS rank, unnest(rows) AS row_id, split
    FROM tops
    UNION ALL
    SELECT 'decile', decile::TINYINT, generate_subscripts(rows, 1), unnest(list_sort(rows)), 'train' FROM samples
)
SELECT kind, decile, rank, row_id FROM listed WHERE split = 'train' OR rank <= 10;

CREATE OR REPLACE TEMP TABLE places AS
SELECT c.row_id, c.dictionary_id, c.feature, c.split, c.window_id, c.document_id, c.position, c.activation,
       greatest(c.position - 16, 0) AS first, least(c.position + 8, len(w.tokens) - 1) AS last,
       w.tokens[greatest(c.position - 16, 0) + 1 : c.position + 9] AS tokens
FROM chunk c
JOIN (SELECT DISTINCT row_id FROM picks) USING (row_id)
JOIN evidence.windows w USING (window_id);

CREATE OR REPLACE TEMP TABLE contexts AS
SELECT p.row_id, list({'position': c.position::INTEGER, 'activation': c.activation}) AS hits
FROM places p
JOIN chunk c ON c.feature = p.feature AND c.window_id = p.window_id AND c.position BETWEEN p.first AND p.last
GROUP BY p.row_id;

INSERT INTO derived.examples
SELECT p.dictionary_id, p.feature, p.split, k.kind, k.decile, k.rank, p.window_id, p.document_id, p.position,
       p.activation, p.tokens,
       list_transform(range(p.first, p.last + 1), lambda q: coalesce(h.activations[list_position(h.positions, q)], 0)::FLOAT),
       p.position - p.first + 1
FROM picks k
JOIN places p USING (row_id)
JOIN (
    SELECT row_id, list_transform(hits, lambda h: h.position::BIGINT) AS positions,
           list_transform(hits, lambda h: h.activation) AS activations
    FROM contexts
) h USING (row_id)
ORDER BY p.feature, p.split DESC, k.kind DESC, k.decile DESC, k.rank;

DROP TABLE contexts;
DROP TABLE places;
DROP TABLE picks;
DROP VIEW ranked;
