-- The documented face of the store over the keyed tables: everything a reader needs is a view of schema main.
CREATE OR REPLACE VIEW dictionaries AS
SELECT d.dictionary, d.architecture, d.model_name, d.hook_point, d.d_in, d.d_sae, d.k,
       m.fvu, m.l0, m.dead_share, m.ce_increase, m.ce_recovered, coalesce(c.corpora, []::VARCHAR[]) AS corpora,
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
LEFT JOIN (
    SELECT dictionary_id, list(corpus ORDER BY segment_id) AS corpora
    FROM evidence.segments JOIN evidence.corpora USING (corpus_id) GROUP BY dictionary_id
) c USING (dictionary_id)
ORDER BY d.dictionary_id;
COMMENT ON VIEW dictionaries IS 'One row a dictionary: where it reads, its size, and its metrics on the test split (null where not measured).';
COMMENT ON COLUMN dictionaries.fvu IS 'Fraction of variance unexplained, test split.';
COMMENT ON COLUMN dictionaries.l0 IS 'Mean number of active features a row, test split.';
COMMENT ON COLUMN dictionaries.dead_share IS 'Share of features that never fire.';
COMMENT ON COLUMN dictionaries.ce_increase IS 'Rise of the cross-entropy in nats when the reconstruction replaces the activation.';
COMMENT ON COLUMN dictionaries.ce_recovered IS 'Share of the cross-entropy lost to ablation that the reconstruction keeps.';
COMMENT ON COLUMN dictionaries.corpora IS 'Corpora it was indexed on; statistics of the view features are of the first.';
COMMENT ON COLUMN dictionaries.config IS 'The resolved configuration, JSON.';

CREATE OR REPLACE VIEW features AS
SELECT d.dictionary, s.feature,
       coalesce(l.label, 'unexplained') AS label, coalesce(l.kind, 'none') AS kind,
       l.auroc, l.auroc_low, l.auroc_high, l.f1, l.n_active, l.n_inactive,
       s.density, t.density AS test_density, s.mean_activation, s.max_activation, s.p50, s.p90, s.p99,
       s.token_entropy, s.num_documents,
       coalesce(w.top_tokens, []::VARCHAR[]) AS top_tokens,
       coalesce(g.promotes, []::VARCHAR[]) AS promotes,
       coalesce(g.suppresses, []::VARCHAR[]) AS suppresses
FROM (SELECT * FROM derived.feature_stats WHERE split = 'train') s
JOIN (SELECT dictionary_id, min(segment_id) AS segment_id FROM evidence.segments GROUP BY dictionary_id) p
    USING (segment_id)
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN (SELECT * FROM derived.feature_stats WHERE split = 'test') t
    ON t.segment_id = s.segment_id AND t.feature = s.feature
LEFT JOIN evidence.labels l ON l.dictionary_id = d.dictionary_id AND l.feature = s.feature
LEFT JOIN derived.feature_tokens w ON w.segment_id = s.segment_id AND w.feature = s.feature
LEFT JOIN derived.feature_logits g ON g.dictionary_id = d.dictionary_id AND g.feature = s.feature;
COMMENT ON VIEW features IS 'One row a feature: its label with its score on test, its statistics on train of the dictionary''s first corpus, its tokens.';
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

CREATE OR REPLACE VIEW feature_stats AS
SELECT d.dictionary, c.corpus, s.* EXCLUDE (segment_id, split), s.split::VARCHAR AS split
FROM derived.feature_stats s
JOIN evidence.segments g USING (segment_id)
JOIN evidence.dictionaries d USING (dictionary_id)
JOIN evidence.corpora c USING (corpus_id);
COMMENT ON VIEW feature_stats IS 'Activation statistics of every feature on every corpus and split; zeros where it never fires.';
COMMENT ON COLUMN feature_stats.density IS 'num_activations / kept rows of the split.';

CREATE OR REPLACE VIEW examples AS
SELECT d.dictionary, c.corpus, e.feature, e.split::VARCHAR AS split, e.kind, e.decile, e.rank, e.window_id,
       w.document_ids[e.position + 1] AS document_id, e.position, e.activation,
       w.tokens[greatest(e.position - 16, 0) + 1 : e.position + 9] AS tokens,
       list_transform(
           range(-least(e.position, 16), least(len(w.token_ids) - e.position, 9)),
           lambda o: coalesce(e.activations[list_position(e.offsets, o)], 0)::FLOAT
       ) AS activations,
       (least(e.position, 16) + 1)::SMALLINT AS focus, o.title
FROM derived.examples e
JOIN evidence.segments g USING (segment_id)
JOIN evidence.dictionaries d USING (dictionary_id)
JOIN evidence.corpora c USING (corpus_id)
JOIN evidence.windows w ON w.window_id = e.window_id
LEFT JOIN evidence.documents o ON o.document_id = w.document_ids[e.position + 1];
COMMENT ON VIEW examples IS 'Where a feature fires: its strongest windows and, on train, a sample of every tenth of its activations.';
COMMENT ON COLUMN examples.kind IS '''top'' (strongest windows, best position of each) or ''decile'' (train only).';
COMMENT ON COLUMN examples.decile IS 'Tenth of the train activations by size, 10 the strongest; null for kind ''top''.';
COMMENT ON COLUMN examples.rank IS 'From 1 within (feature, split, kind, decile).';
COMMENT ON COLUMN examples.position IS 'Position of the peak in the window, from 0.';
COMMENT ON COLUMN examples.tokens IS 'Visible context: up to 16 tokens before the peak, the peak, up to 8 after.';
COMMENT ON COLUMN examples.activations IS 'This feature''s activation at each of the tokens.';
COMMENT ON COLUMN examples.focus IS 'Index of the peak in tokens, from 1.';
COMMENT ON COLUMN examples.title IS 'Title of the document of the peak.';

CREATE OR REPLACE VIEW documents AS
SELECT o.document_id, c.corpus, o.split, o.title, o.source, o.num_tokens, o.sha256
FROM evidence.documents o JOIN evidence.corpora c USING (corpus_id);
COMMENT ON VIEW documents IS 'One row a document that gave at least one token.';
COMMENT ON COLUMN documents.document_id IS 'Unique in the store: each corpus has a range of its own.';
COMMENT ON COLUMN documents.sha256 IS 'Of the normalised text: what the split was decided by.';

CREATE OR REPLACE VIEW labels AS
SELECT d.dictionary, l.* EXCLUDE (dictionary_id) FROM evidence.labels l JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW labels IS 'Labels as they were made on train, chosen on calibration and scored on test; empty before labelling.';
COMMENT ON COLUMN labels.predicate IS 'JSON, what the label claims in executable form; null for kind ''none''.';

CREATE OR REPLACE VIEW neighbours AS
SELECT d.dictionary, n.feature, n.rank, n.neighbour, n.cosine, coalesce(l.label, 'unexplained') AS neighbour_label
FROM evidence.neighbours n
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN evidence.labels l ON l.dictionary_id = n.dictionary_id AND l.feature = n.neighbour;
COMMENT ON VIEW neighbours IS 'Nearest features of the same dictionary by decoder cosine; rank 0 is the nearest.';

CREATE OR REPLACE VIEW logit_effects AS
SELECT d.dictionary, g.feature, g.direction, g.rank, g.token_id, v.token, g.effect
FROM evidence.logit_effects g
JOIN evidence.dictionaries d USING (dictionary_id)
JOIN evidence.models m USING (model_id)
LEFT JOIN evidence.vocabulary v ON v.token_id = g.token_id AND v.vocabulary_id = m.vocabulary_id;
COMMENT ON VIEW logit_effects IS 'Tokens whose logits a feature moves most; rank 0 is the strongest of its direction.';
COMMENT ON COLUMN logit_effects.direction IS '''promoted'' or ''suppressed''.';
COMMENT ON COLUMN logit_effects.effect IS 'Change of the logit per unit of the feature.';

CREATE OR REPLACE VIEW activations AS
SELECT d.dictionary, c.corpus, a.feature, a.split::VARCHAR AS split, a.window_id, a.position, t.document_id, t.token_id,
       v.token, a.activation
FROM evidence.activations_by_feature a
JOIN evidence.segments g USING (segment_id)
JOIN evidence.dictionaries d USING (dictionary_id)
JOIN evidence.corpora c USING (corpus_id)
JOIN evidence.tokens t ON t.window_id = a.window_id AND t.position = a.position
LEFT JOIN evidence.vocabulary v ON v.token_id = t.token_id AND v.vocabulary_id = c.vocabulary_id;
COMMENT ON VIEW activations IS 'Every positive activation on a kept row. Filter by feature first: rows are clustered by it, strongest first.';

CREATE OR REPLACE VIEW metrics AS
SELECT d.dictionary, m.* EXCLUDE (dictionary_id) FROM evidence.metrics m JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW metrics IS 'Metrics of every dictionary on every split, with the rows or tokens they were measured on.';
COMMENT ON COLUMN metrics.metric IS 'NAME leaves first positions and massive-norm rows out, NAME_all_rows counts them in; NAME@PLACE is of one hook point of several; density[a,b) is the share of features active on a share of rows from a to below b.';
COMMENT ON COLUMN metrics.low IS 'Lower end of the 95 % interval over documents, null where there is none.';

CREATE OR REPLACE VIEW document_activations AS
SELECT d.dictionary, c.corpus, t.document_id, a.window_id, a.position, t.token_id, v.token, a.feature, a.activation
FROM evidence.activations_by_document a
JOIN evidence.segments g USING (segment_id)
JOIN evidence.dictionaries d USING (dictionary_id)
JOIN evidence.corpora c USING (corpus_id)
JOIN evidence.tokens t ON t.window_id = a.window_id AND t.position = a.position
LEFT JOIN evidence.vocabulary v ON v.token_id = t.token_id AND v.vocabulary_id = c.vocabulary_id;
COMMENT ON VIEW document_activations IS 'The rows of activations in the order of the text. Filter by window_id: rows are clustered by it.';

CREATE OR REPLACE VIEW cofirings AS
SELECT d.dictionary, c.corpus, f.feature, f.rank, f.partner, f.count, f.num_sampled, f.pmi,
       coalesce(l.label, 'unexplained') AS partner_label
FROM derived.cofirings f
JOIN evidence.segments g USING (segment_id)
JOIN evidence.dictionaries d USING (dictionary_id)
JOIN evidence.corpora c USING (corpus_id)
LEFT JOIN evidence.labels l ON l.dictionary_id = d.dictionary_id AND l.feature = f.partner;
COMMENT ON VIEW cofirings IS 'Features that are active on the same rows as a feature, up to 64, by count x pmi; those active together by chance or less are left out.';
COMMENT ON COLUMN cofirings.rank IS 'From 1.';
COMMENT ON COLUMN cofirings.count IS 'Rows on which both are active, all splits; scaled up from the sampled rows where num_sampled is not all.';
COMMENT ON COLUMN cofirings.num_sampled IS 'Rows of the feature that were looked at, spread evenly over the text, at most 64.';
COMMENT ON COLUMN cofirings.pmi IS 'Pointwise mutual information in bits: log2 of how much more often than by chance.';

CREATE OR REPLACE VIEW receipts AS
SELECT d.dictionary, r.* EXCLUDE (dictionary_id) FROM evidence.receipts r JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW receipts IS 'What a label had to show: one row a feature and control, with what was measured and what was asked.';
COMMENT ON COLUMN receipts.control IS 'Name of the check.';
COMMENT ON COLUMN receipts.value IS 'What was measured on n cases.';
COMMENT ON COLUMN receipts.threshold IS 'What it was compared with.';
COMMENT ON COLUMN receipts.low IS 'Lower end of the 95 % interval, null where there is none.';
COMMENT ON COLUMN receipts.verdict IS '''passed'' or ''failed''.';

CREATE OR REPLACE VIEW models AS
SELECT model_name, model_revision, model_sha256, tokenizer_sha256 FROM evidence.models ORDER BY model_id;
COMMENT ON VIEW models IS 'One row a language model that dictionaries of the store read.';

CREATE OR REPLACE VIEW corpora AS
SELECT corpus, dataset_fingerprint, num_windows, num_documents, first_window, first_document
FROM evidence.corpora ORDER BY corpus_id;
COMMENT ON VIEW corpora IS 'One row a text that dictionaries were indexed on.';
COMMENT ON COLUMN corpora.dataset_fingerprint IS 'SHA-256 over the hashes of its documents, in order.';
COMMENT ON COLUMN corpora.first_window IS 'Smallest window_id of the corpus.';

CREATE OR REPLACE VIEW runs AS
SELECT d.dictionary, c.corpus, r.* EXCLUDE (dictionary_id, corpus_id)
FROM evidence.runs r
JOIN evidence.dictionaries d USING (dictionary_id)
JOIN evidence.corpora c USING (corpus_id);
COMMENT ON VIEW runs IS 'Where the evidence comes from: one row a dictionary and corpus.';
COMMENT ON COLUMN runs.config IS 'Configuration of the run, JSON.';
COMMENT ON COLUMN runs.code_version IS 'Version of saeql that indexed.';
COMMENT ON COLUMN runs.indexed IS 'When, UTC.';

CREATE OR REPLACE VIEW tokens AS
SELECT t.window_id, t.position, w.split, t.document_id, t.token_id, v.token
FROM evidence.tokens t
JOIN (SELECT window_id, split, corpus_id FROM evidence.windows) w USING (window_id)
JOIN evidence.corpora c USING (corpus_id)
LEFT JOIN evidence.vocabulary v ON v.token_id = t.token_id AND v.vocabulary_id = c.vocabulary_id;
COMMENT ON VIEW tokens IS 'One row a position of a window, with its token as text.';

CREATE OR REPLACE VIEW windows AS
SELECT w.window_id, c.corpus, w.split, w.token_ids, w.document_ids, w.tokens
FROM evidence.windows w JOIN evidence.corpora c USING (corpus_id);
COMMENT ON VIEW windows IS 'One row a model input: its tokens and the document of each.';

CREATE OR REPLACE VIEW split_rows AS
SELECT c.corpus, s.* EXCLUDE (corpus_id) FROM evidence.split_rows s JOIN evidence.corpora c USING (corpus_id);
COMMENT ON VIEW split_rows IS 'Rows of a split and how many were left out of it.';
