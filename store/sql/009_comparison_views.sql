-- Features with what a comparison found; the views that stand on it are made anew with it.
CREATE OR REPLACE VIEW features AS
SELECT d.dictionary, s.feature,
       coalesce(l.label, 'unexplained') AS label, coalesce(l.kind, 'none') AS kind,
       l.auroc, l.auroc_low, l.auroc_high, l.f1, l.n_active, l.n_inactive,
       s.density, t.density AS test_density, s.mean_activation, s.max_activation, s.p50, s.p90, s.p99,
       s.token_entropy, s.num_documents,
       coalesce(w.top_tokens, []::VARCHAR[]) AS top_tokens,
       coalesce(g.promotes, []::VARCHAR[]) AS promotes,
       coalesce(g.suppresses, []::VARCHAR[]) AS suppresses,
       y.stability, y.first_seen
FROM (SELECT * FROM derived.feature_stats WHERE split = 'train') s
JOIN (SELECT dictionary_id, min(segment_id) AS segment_id FROM evidence.segments GROUP BY dictionary_id) p
    USING (segment_id)
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN (SELECT * FROM derived.feature_stats WHERE split = 'test') t
    ON t.segment_id = s.segment_id AND t.feature = s.feature
LEFT JOIN evidence.labels l ON l.dictionary_id = d.dictionary_id AND l.feature = s.feature
LEFT JOIN derived.feature_tokens w ON w.segment_id = s.segment_id AND w.feature = s.feature
LEFT JOIN derived.feature_logits g ON g.dictionary_id = d.dictionary_id AND g.feature = s.feature
LEFT JOIN evidence.stability y ON y.dictionary_id = d.dictionary_id AND y.feature = s.feature;
COMMENT ON VIEW features IS 'One row a feature: its label with its score on test, its statistics on train of the dictionary''s first corpus, its tokens.';
COMMENT ON COLUMN features.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN features.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN features.label IS '''unexplained'' where no label passed or none was made.';
COMMENT ON COLUMN features.kind IS '''lexical'', ''structural'' or ''none''.';
COMMENT ON COLUMN features.auroc IS 'How well the label''s predicate separates active from inactive test rows; null where not scored.';
COMMENT ON COLUMN features.auroc_low IS 'Lower end of the 95 % interval, bootstrap over documents.';
COMMENT ON COLUMN features.auroc_high IS 'Upper end of the 95 % interval, bootstrap over documents.';
COMMENT ON COLUMN features.f1 IS 'Harmonic mean of precision and recall.';
COMMENT ON COLUMN features.n_active IS 'Test rows of the label''s score on which the feature exceeds label.active_fraction (a quarter) of its largest train activation.';
COMMENT ON COLUMN features.n_inactive IS 'Test rows it was scored against.';
COMMENT ON COLUMN features.density IS 'Share of kept train rows on which the feature is active.';
COMMENT ON COLUMN features.test_density IS 'Share of kept test rows on which the feature is active.';
COMMENT ON COLUMN features.mean_activation IS 'Mean over active train rows; 0 where it never fires.';
COMMENT ON COLUMN features.max_activation IS 'Largest activation.';
COMMENT ON COLUMN features.p50 IS 'Median of the active train values.';
COMMENT ON COLUMN features.p90 IS '90th percentile over active rows.';
COMMENT ON COLUMN features.p99 IS '99th percentile over active rows.';
COMMENT ON COLUMN features.token_entropy IS 'Entropy in bits of the token ids of active train rows, by count.';
COMMENT ON COLUMN features.num_documents IS 'Train documents in which the feature is active.';
COMMENT ON COLUMN features.top_tokens IS 'Most common tokens of active train rows, commonest first.';
COMMENT ON COLUMN features.promotes IS 'Tokens whose logits the feature raises most, strongest first.';
COMMENT ON COLUMN features.suppresses IS 'Tokens whose logits the feature lowers most, strongest first.';
COMMENT ON COLUMN features.stability IS 'Share of the compared dictionaries that have the feature; null where no comparison was saved.';
COMMENT ON COLUMN features.first_seen IS 'First of the compared dictionaries, in the order given, that has the feature; null where no comparison was saved.';

CREATE OR REPLACE VIEW dead AS SELECT * FROM features WHERE max_activation = 0 AND coalesce(test_density, 0) = 0;
COMMENT ON VIEW dead IS 'Features that fire on no kept row of train or test.';
COMMENT ON COLUMN dead.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN dead.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN dead.label IS 'What the feature is about; ''unexplained'' where nothing passed.';
COMMENT ON COLUMN dead.kind IS 'Kind of label, or of example.';
COMMENT ON COLUMN dead.auroc IS 'How well the label separates active from inactive rows.';
COMMENT ON COLUMN dead.auroc_low IS 'Lower end of its 95 % interval over documents.';
COMMENT ON COLUMN dead.auroc_high IS 'Upper end of its 95 % interval over documents.';
COMMENT ON COLUMN dead.f1 IS 'Harmonic mean of precision and recall.';
COMMENT ON COLUMN dead.n_active IS 'Active test rows.';
COMMENT ON COLUMN dead.n_inactive IS 'Test rows scored against.';
COMMENT ON COLUMN dead.density IS 'num_activations / kept rows.';
COMMENT ON COLUMN dead.test_density IS 'Density on test.';
COMMENT ON COLUMN dead.mean_activation IS 'Mean over active rows.';
COMMENT ON COLUMN dead.max_activation IS 'Largest activation.';
COMMENT ON COLUMN dead.p50 IS 'Median over active rows.';
COMMENT ON COLUMN dead.p90 IS '90th percentile over active rows.';
COMMENT ON COLUMN dead.p99 IS '99th percentile over active rows.';
COMMENT ON COLUMN dead.token_entropy IS 'Entropy in bits of the tokens of active rows.';
COMMENT ON COLUMN dead.num_documents IS 'Documents.';
COMMENT ON COLUMN dead.top_tokens IS 'Commonest tokens of active train rows.';
COMMENT ON COLUMN dead.promotes IS 'Tokens whose logits it raises most.';
COMMENT ON COLUMN dead.suppresses IS 'Tokens whose logits it lowers most.';
COMMENT ON COLUMN dead.stability IS 'Share of the compared dictionaries that have the feature; null where no comparison was saved.';
COMMENT ON COLUMN dead.first_seen IS 'First of the compared dictionaries, in the order given, that has the feature; null where no comparison was saved.';

CREATE OR REPLACE VIEW dense AS SELECT * FROM features WHERE density > 0.1;
COMMENT ON VIEW dense IS 'Features that are active on more than a tenth of the kept train rows.';
COMMENT ON COLUMN dense.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN dense.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN dense.label IS 'What the feature is about; ''unexplained'' where nothing passed.';
COMMENT ON COLUMN dense.kind IS 'Kind of label, or of example.';
COMMENT ON COLUMN dense.auroc IS 'How well the label separates active from inactive rows.';
COMMENT ON COLUMN dense.auroc_low IS 'Lower end of its 95 % interval over documents.';
COMMENT ON COLUMN dense.auroc_high IS 'Upper end of its 95 % interval over documents.';
COMMENT ON COLUMN dense.f1 IS 'Harmonic mean of precision and recall.';
COMMENT ON COLUMN dense.n_active IS 'Active test rows.';
COMMENT ON COLUMN dense.n_inactive IS 'Test rows scored against.';
COMMENT ON COLUMN dense.density IS 'num_activations / kept rows.';
COMMENT ON COLUMN dense.test_density IS 'Density on test.';
COMMENT ON COLUMN dense.mean_activation IS 'Mean over active rows.';
COMMENT ON COLUMN dense.max_activation IS 'Largest activation.';
COMMENT ON COLUMN dense.p50 IS 'Median over active rows.';
COMMENT ON COLUMN dense.p90 IS '90th percentile over active rows.';
COMMENT ON COLUMN dense.p99 IS '99th percentile over active rows.';
COMMENT ON COLUMN dense.token_entropy IS 'Entropy in bits of the tokens of active rows.';
COMMENT ON COLUMN dense.num_documents IS 'Documents.';
COMMENT ON COLUMN dense.top_tokens IS 'Commonest tokens of active train rows.';
COMMENT ON COLUMN dense.promotes IS 'Tokens whose logits it raises most.';
COMMENT ON COLUMN dense.suppresses IS 'Tokens whose logits it lowers most.';
COMMENT ON COLUMN dense.stability IS 'Share of the compared dictionaries that have the feature; null where no comparison was saved.';
COMMENT ON COLUMN dense.first_seen IS 'First of the compared dictionaries, in the order given, that has the feature; null where no comparison was saved.';

CREATE OR REPLACE VIEW lexical AS SELECT * FROM features WHERE kind = 'lexical';
COMMENT ON VIEW lexical IS 'Features whose label is about the token itself.';
COMMENT ON COLUMN lexical.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN lexical.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN lexical.label IS 'What the feature is about; ''unexplained'' where nothing passed.';
COMMENT ON COLUMN lexical.kind IS 'Kind of label, or of example.';
COMMENT ON COLUMN lexical.auroc IS 'How well the label separates active from inactive rows.';
COMMENT ON COLUMN lexical.auroc_low IS 'Lower end of its 95 % interval over documents.';
COMMENT ON COLUMN lexical.auroc_high IS 'Upper end of its 95 % interval over documents.';
COMMENT ON COLUMN lexical.f1 IS 'Harmonic mean of precision and recall.';
COMMENT ON COLUMN lexical.n_active IS 'Active test rows.';
COMMENT ON COLUMN lexical.n_inactive IS 'Test rows scored against.';
COMMENT ON COLUMN lexical.density IS 'num_activations / kept rows.';
COMMENT ON COLUMN lexical.test_density IS 'Density on test.';
COMMENT ON COLUMN lexical.mean_activation IS 'Mean over active rows.';
COMMENT ON COLUMN lexical.max_activation IS 'Largest activation.';
COMMENT ON COLUMN lexical.p50 IS 'Median over active rows.';
COMMENT ON COLUMN lexical.p90 IS '90th percentile over active rows.';
COMMENT ON COLUMN lexical.p99 IS '99th percentile over active rows.';
COMMENT ON COLUMN lexical.token_entropy IS 'Entropy in bits of the tokens of active rows.';
COMMENT ON COLUMN lexical.num_documents IS 'Documents.';
COMMENT ON COLUMN lexical.top_tokens IS 'Commonest tokens of active train rows.';
COMMENT ON COLUMN lexical.promotes IS 'Tokens whose logits it raises most.';
COMMENT ON COLUMN lexical.suppresses IS 'Tokens whose logits it lowers most.';
COMMENT ON COLUMN lexical.stability IS 'Share of the compared dictionaries that have the feature; null where no comparison was saved.';
COMMENT ON COLUMN lexical.first_seen IS 'First of the compared dictionaries, in the order given, that has the feature; null where no comparison was saved.';

CREATE OR REPLACE VIEW unexplained AS SELECT * FROM features WHERE kind = 'none' AND max_activation > 0;
COMMENT ON VIEW unexplained IS 'Features that fire and have no label.';
COMMENT ON COLUMN unexplained.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN unexplained.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN unexplained.label IS 'What the feature is about; ''unexplained'' where nothing passed.';
COMMENT ON COLUMN unexplained.kind IS 'Kind of label, or of example.';
COMMENT ON COLUMN unexplained.auroc IS 'How well the label separates active from inactive rows.';
COMMENT ON COLUMN unexplained.auroc_low IS 'Lower end of its 95 % interval over documents.';
COMMENT ON COLUMN unexplained.auroc_high IS 'Upper end of its 95 % interval over documents.';
COMMENT ON COLUMN unexplained.f1 IS 'Harmonic mean of precision and recall.';
COMMENT ON COLUMN unexplained.n_active IS 'Active test rows.';
COMMENT ON COLUMN unexplained.n_inactive IS 'Test rows scored against.';
COMMENT ON COLUMN unexplained.density IS 'num_activations / kept rows.';
COMMENT ON COLUMN unexplained.test_density IS 'Density on test.';
COMMENT ON COLUMN unexplained.mean_activation IS 'Mean over active rows.';
COMMENT ON COLUMN unexplained.max_activation IS 'Largest activation.';
COMMENT ON COLUMN unexplained.p50 IS 'Median over active rows.';
COMMENT ON COLUMN unexplained.p90 IS '90th percentile over active rows.';
COMMENT ON COLUMN unexplained.p99 IS '99th percentile over active rows.';
COMMENT ON COLUMN unexplained.token_entropy IS 'Entropy in bits of the tokens of active rows.';
COMMENT ON COLUMN unexplained.num_documents IS 'Documents.';
COMMENT ON COLUMN unexplained.top_tokens IS 'Commonest tokens of active train rows.';
COMMENT ON COLUMN unexplained.promotes IS 'Tokens whose logits it raises most.';
COMMENT ON COLUMN unexplained.suppresses IS 'Tokens whose logits it lowers most.';
COMMENT ON COLUMN unexplained.stability IS 'Share of the compared dictionaries that have the feature; null where no comparison was saved.';
COMMENT ON COLUMN unexplained.first_seen IS 'First of the compared dictionaries, in the order given, that has the feature; null where no comparison was saved.';

CREATE OR REPLACE VIEW stability AS
SELECT d.dictionary, y.* EXCLUDE (dictionary_id) FROM evidence.stability y JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW stability IS 'How many other dictionaries have a feature: the last comparison that was saved (saeql compare --save); empty before.';
COMMENT ON COLUMN stability.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN stability.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN stability.num_compared IS 'Other dictionaries it was compared with.';
COMMENT ON COLUMN stability.num_shared IS 'Those of them that have it.';
COMMENT ON COLUMN stability.stability IS 'num_shared / num_compared.';
COMMENT ON COLUMN stability.mean_cosine IS 'Mean decoder cosine with its partners, 0 where it has none.';
COMMENT ON COLUMN stability.first_seen IS 'First dictionary of compared that has it.';
COMMENT ON COLUMN stability.compared_as IS 'Name of this dictionary in compared.';
COMMENT ON COLUMN stability.compared IS 'Names of all dictionaries of the comparison, in the order given.';

CREATE OR REPLACE VIEW matches AS
SELECT d.dictionary, m.* EXCLUDE (dictionary_id) FROM evidence.matches m JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW matches IS 'Partners of a feature in the dictionaries that it was compared with, one-to-one by decoder cosine.';
COMMENT ON COLUMN matches.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN matches.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN matches.other_dictionary IS 'Name of the other dictionary in the comparison.';
COMMENT ON COLUMN matches.other_feature IS 'Index in the other dictionary, from 0.';
COMMENT ON COLUMN matches.decoder_cosine IS 'Cosine of their decoder rows.';
COMMENT ON COLUMN matches.encoder_cosine IS 'Cosine of their encoder rows.';
COMMENT ON COLUMN matches.encoder_agrees IS 'Encoder rows, matched apart, give the same pair.';
COMMENT ON COLUMN matches.shared IS 'The pair is one feature: encoder_agrees, and the decoder cosine reaches the threshold of the comparison.';
