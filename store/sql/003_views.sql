-- The documented face of the store: everything a reader needs is a view of schema main.
CREATE VIEW dictionaries AS
SELECT d.dictionary, d.architecture, d.model_name, d.hook_point, d.d_in, d.d_sae, d.k,
       m.fvu, m.l0, m.dead_share, m.ce_increase, m.ce_recovered,
       d.model_sha256, d.tokenizer_sha256, d.config
FROM evidence.dictionaries d
LEFT JOIN (
    SELECT dictionary_id,
           max(value) FILTER (metric = 'fvu') AS fvu,
           max(value) FILTER (metric = 'l0') AS l0,
           max(value) FILTER (metric = 'dead_share') AS dead_share,
           max(value) FILTER (metric = 'ce_increase') AS ce_increase,
           max(value) FILTER (metric = 'ce_recovered') AS ce_recovered
    FROM evidence.metrics WHERE split = 'test' GROUP BY dictionary_id
) m USING (dictionary_id)
ORDER BY d.dictionary_id;
COMMENT ON VIEW dictionaries IS 'One row a dictionary: where it reads, its size, and its metrics on the test split (null where not measured).';
COMMENT ON COLUMN dictionaries.fvu IS 'Fraction of variance unexplained, test split.';
COMMENT ON COLUMN dictionaries.l0 IS 'Mean number of active features a row, test split.';
COMMENT ON COLUMN dictionaries.dead_share IS 'Share of features that never fire.';
COMMENT ON COLUMN dictionaries.ce_increase IS 'Rise of the cross-entropy in nats when the reconstruction replaces the activation.';
COMMENT ON COLUMN dictionaries.ce_recovered IS 'Share of the cross-entropy lost to ablation that the reconstruction keeps.';
COMMENT ON COLUMN dictionaries.config IS 'The resolved configuration, JSON.';

CREATE VIEW features AS
SELECT d.dictionary, s.feature,
       coalesce(l.label, 'unexplained') AS label, coalesce(l.kind, 'none') AS kind,
       l.auroc, l.auroc_low, l.auroc_high, l.f1, l.n_active, l.n_inactive,
       s.density, t.density AS test_density, s.mean_activation, s.max_activation, s.p50, s.p90, s.p99,
       s.token_entropy, s.num_documents,
       coalesce(w.top_tokens, []::VARCHAR[]) AS top_tokens,
       coalesce(g.promotes, []::VARCHAR[]) AS promotes,
       coalesce(g.suppresses, []::VARCHAR[]) AS suppresses
FROM (SELECT * FROM derived.feature_stats WHERE split = 'train') s
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN (SELECT * FROM derived.feature_stats WHERE split = 'test') t USING (dictionary_id, feature)
LEFT JOIN evidence.labels l USING (dictionary_id, feature)
LEFT JOIN derived.feature_tokens w USING (dictionary_id, feature)
LEFT JOIN derived.feature_logits g USING (dictionary_id, feature);
COMMENT ON VIEW features IS 'One row a feature: its label with its score on test, its statistics on train, its tokens.';
COMMENT ON COLUMN features.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN features.label IS '''unexplained'' where no label passed or none was made.';
COMMENT ON COLUMN features.kind IS '''lexical'', ''structural'' or ''none''.';
COMMENT ON COLUMN features.auroc IS 'How well the label''s predicate separates active from inactive test rows; null where not scored.';
COMMENT ON COLUMN features.auroc_low IS 'Lower end of the 95 % interval, bootstrap over documents.';
COMMENT ON COLUMN features.auroc_high IS 'Upper end of the 95 % interval, bootstrap over documents.';
COMMENT ON COLUMN features.n_active IS 'Test rows of the label''s score on which the feature exceeds label.active_fraction (a quarter) of its largest train activation.';
COMMENT ON COLUMN features.n_inactive IS 'Test rows it was scored against.';
COMMENT ON COLUMN features.density IS 'Share of kept train rows on which the feature is active.';
COMMENT ON COLUMN features.test_density IS 'Share of kept test rows on which the feature is active.';
COMMENT ON COLUMN features.mean_activation IS 'Mean over active train rows; 0 where it never fires.';
COMMENT ON COLUMN features.p50 IS 'Median of the active train values.';
COMMENT ON COLUMN features.token_entropy IS 'Entropy in bits of the token ids of active train rows, by count.';
COMMENT ON COLUMN features.num_documents IS 'Train documents in which the feature is active.';
COMMENT ON COLUMN features.top_tokens IS 'Most common tokens of active train rows, commonest first.';
COMMENT ON COLUMN features.promotes IS 'Tokens whose logits the feature raises most, strongest first.';
COMMENT ON COLUMN features.suppresses IS 'Tokens whose logits the feature lowers most, strongest first.';

CREATE VIEW feature_stats AS
SELECT d.dictionary, s.* EXCLUDE (dictionary_id) FROM derived.feature_stats s JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW feature_stats IS 'Activation statistics of every feature on every split; zeros where it never fires.';
COMMENT ON COLUMN feature_stats.density IS 'num_activations / kept rows of the split.';

CREATE VIEW examples AS
SELECT d.dictionary, e.* EXCLUDE (dictionary_id), o.title
FROM derived.examples e
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN evidence.documents o USING (document_id);
COMMENT ON VIEW examples IS 'Where a feature fires: its strongest windows and, on train, a sample of every tenth of its activations.';
COMMENT ON COLUMN examples.kind IS '''top'' (strongest windows, best position of each) or ''decile'' (train only).';
COMMENT ON COLUMN examples.decile IS 'Tenth of the train activations by size, 10 the strongest; null for kind ''top''.';
COMMENT ON COLUMN examples.rank IS 'From 1 within (feature, split, kind, decile).';
COMMENT ON COLUMN examples.position IS 'Position of the peak in the window, from 0.';
COMMENT ON COLUMN examples.tokens IS 'Visible context: up to 16 tokens before the peak, the peak, up to 8 after.';
COMMENT ON COLUMN examples.activations IS 'This feature''s activation at each of the tokens.';
COMMENT ON COLUMN examples.focus IS 'Index of the peak in tokens, from 1.';
COMMENT ON COLUMN examples.title IS 'Title of the document of the peak.';

CREATE VIEW documents AS SELECT document_id, split, title, source, num_tokens, sha256 FROM evidence.documents;
COMMENT ON VIEW documents IS 'One row a document that gave at least one token.';
COMMENT ON COLUMN documents.sha256 IS 'Of the normalised text: what the split was decided by.';

CREATE VIEW labels AS
SELECT d.dictionary, l.* EXCLUDE (dictionary_id) FROM evidence.labels l JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW labels IS 'Labels as they were made on train, chosen on calibration and scored on test; empty before labelling.';
COMMENT ON COLUMN labels.predicate IS 'JSON, what the label claims in executable form; null for kind ''none''.';

CREATE VIEW neighbours AS
SELECT d.dictionary, n.feature, n.rank, n.neighbour, n.cosine, coalesce(l.label, 'unexplained') AS neighbour_label
FROM evidence.neighbours n
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN evidence.labels l ON l.dictionary_id = n.dictionary_id AND l.feature = n.neighbour;
COMMENT ON VIEW neighbours IS 'Nearest features of the same dictionary by decoder cosine; rank 0 is the nearest.';

CREATE VIEW logit_effects AS
SELECT d.dictionary, g.feature, g.direction, g.rank, g.token_id, v.token, g.effect
FROM evidence.logit_effects g
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN evidence.vocabulary v USING (token_id);
COMMENT ON VIEW logit_effects IS 'Tokens whose logits a feature moves most; rank 0 is the strongest of its direction.';
COMMENT ON COLUMN logit_effects.direction IS '''promoted'' or ''suppressed''.';
COMMENT ON COLUMN logit_effects.effect IS 'Change of the logit per unit of the feature.';

CREATE VIEW activations AS
SELECT d.dictionary, a.feature, a.split, a.window_id, a.position, a.document_id, a.token_id, v.token, a.activation
FROM evidence.activations a
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN evidence.vocabulary v USING (token_id);
COMMENT ON VIEW activations IS 'Every positive activation on a kept row. Filter by feature first: rows are clustered by it, strongest first.';

CREATE VIEW metrics AS
SELECT d.dictionary, m.* EXCLUDE (dictionary_id) FROM evidence.metrics m JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW metrics IS 'Metrics of every dictionary on every split, with the rows or tokens they were measured on.';
COMMENT ON COLUMN metrics.metric IS 'NAME leaves first positions and massive-norm rows out, NAME_all_rows counts them in; NAME@PLACE is of one hook point of several; density[a,b) is the share of features active on a share of rows from a to below b.';
COMMENT ON COLUMN metrics.low IS 'Lower end of the 95 % interval over documents, null where there is none.';

CREATE VIEW tokens AS
SELECT t.window_id, t.position, w.split, t.document_id, t.token_id, v.token
FROM evidence.tokens t
JOIN (SELECT window_id, split FROM evidence.windows) w USING (window_id)
LEFT JOIN evidence.vocabulary v USING (token_id);
COMMENT ON VIEW tokens IS 'One row a position of a window, with its token as text.';

CREATE VIEW windows AS SELECT window_id, split, token_ids, document_ids, tokens FROM evidence.windows;
COMMENT ON VIEW windows IS 'One row a model input: its tokens and the document of each.';

CREATE VIEW split_rows AS SELECT * FROM evidence.split_rows;
COMMENT ON VIEW split_rows IS 'Rows of a split and how many were left out of it.';
