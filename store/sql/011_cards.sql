-- What receipts say of each feature, one row a feature: the numbers of its card.
CREATE OR REPLACE VIEW cards AS
SELECT d.dictionary, l.feature, l.label, l.kind, l.explainer,
       r.auroc_n0, r.auroc_n1, r.auroc_n1_low, r.auroc_n1_high, r.auroc_n2, r.auroc_n3, r.auroc_n4, r.n,
       r.token_auroc, r.permutation_p, coalesce(r.is_labelled, false) AS is_labelled,
       coalesce(r.is_contextual, false) AS is_contextual, coalesce(r.is_top_only, false) AS is_top_only,
       r.random_percentile, r.is_seed_shared, r.masked_effect, r.num_failed
FROM evidence.labels l
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN (
    SELECT dictionary_id, feature,
           max(value) FILTER (control = 'C4 negative ladder N0') AS auroc_n0,
           max(value) FILTER (control = 'C4 negative ladder N1') AS auroc_n1,
           max(low) FILTER (control = 'C4 negative ladder N1') AS auroc_n1_low,
           max(high) FILTER (control = 'C4 negative ladder N1') AS auroc_n1_high,
           max(value) FILTER (control = 'C4 negative ladder N2') AS auroc_n2,
           max(value) FILTER (control = 'C4 negative ladder N3') AS auroc_n3,
           max(value) FILTER (control = 'C4 negative ladder N4') AS auroc_n4,
           max(n) FILTER (control = 'C4 negative ladder N1') AS n,
           max(value) FILTER (control = 'C5 token identity') AS token_auroc,
           max(value) FILTER (control = 'C3 label permutation') AS permutation_p,
           bool_or(verdict = 'passed') FILTER (control = 'C3 label permutation') AS is_labelled,
           bool_or(verdict = 'passed') FILTER (control = 'C4 negative ladder contextual') AS is_contextual,
           bool_or(verdict = 'failed') FILTER (control = 'C14 activation range') AS is_top_only,
           max(value) FILTER (control = 'C6 random dictionary percentile') AS random_percentile,
           bool_or(verdict = 'passed') FILTER (control = 'C9 seed stability of the feature') AS is_seed_shared,
           max(value) FILTER (control = 'C13 token identifiability masked token') AS masked_effect,
           count(*) FILTER (verdict = 'failed') AS num_failed
    FROM evidence.receipts WHERE feature IS NOT NULL GROUP BY dictionary_id, feature
) r ON r.dictionary_id = l.dictionary_id AND r.feature = l.feature;
COMMENT ON VIEW cards IS 'What receipts say of each feature with a label row: the numbers of its card. All measured on test documents; null where the control did not run.';
COMMENT ON COLUMN cards.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN cards.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN cards.label IS '''unexplained'' where nothing passed.';
COMMENT ON COLUMN cards.kind IS '''lexical'', ''structural'', ''semantic'', ''output'' or ''none''.';
COMMENT ON COLUMN cards.explainer IS 'What proposed the label.';
COMMENT ON COLUMN cards.auroc_n0 IS 'AUROC against any inactive rows.';
COMMENT ON COLUMN cards.auroc_n1 IS 'AUROC against rows matched on token frequency, position and window length: the headline.';
COMMENT ON COLUMN cards.auroc_n1_low IS 'Lower end of its 95 % interval over documents.';
COMMENT ON COLUMN cards.auroc_n1_high IS 'Upper end of its 95 % interval over documents.';
COMMENT ON COLUMN cards.auroc_n2 IS 'AUROC against silent rows of the same tokens; 0.5 where the label says no more than the token.';
COMMENT ON COLUMN cards.auroc_n3 IS 'AUROC against silent rows in the windows nearest in meaning.';
COMMENT ON COLUMN cards.auroc_n4 IS 'AUROC against rows on which neighbours by decoder cosine are active.';
COMMENT ON COLUMN cards.n IS 'Negatives behind auroc_n1.';
COMMENT ON COLUMN cards.token_auroc IS 'AUROC of a table of tokens made on train: what the token alone explains.';
COMMENT ON COLUMN cards.permutation_p IS 'Share of like features'' labels that fit this feature as well as its own does.';
COMMENT ON COLUMN cards.is_labelled IS 'Whether the label passed the permutation test, false discovery rate controlled over all features.';
COMMENT ON COLUMN cards.is_contextual IS 'Whether the label tells active from silent rows of the same token.';
COMMENT ON COLUMN cards.is_top_only IS 'Whether the label fits the strongest activations only.';
COMMENT ON COLUMN cards.random_percentile IS 'Share of a random dictionary''s labels that score lower; null without that control run.';
COMMENT ON COLUMN cards.is_seed_shared IS 'Whether a second seed has the feature; null without that control run.';
COMMENT ON COLUMN cards.masked_effect IS 'Share of the activation that goes when the token is masked; null where not measured.';
COMMENT ON COLUMN cards.num_failed IS 'Controls of this feature that failed.';
