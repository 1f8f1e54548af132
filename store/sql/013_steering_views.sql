-- Steering effects by strength, and what each feature does where all methods cost the same.
CREATE OR REPLACE VIEW steering_effects AS
SELECT d.dictionary, e.* EXCLUDE (dictionary_id) FROM evidence.steering_effects e JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW steering_effects IS 'What steering with a feature does to the words of its concept, by method and strength (saeql effect); empty before it was measured.';
COMMENT ON COLUMN steering_effects.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN steering_effects.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN steering_effects.method IS '''steered'' (the feature itself); for the same concept: ''diff_mean'', ''logistic'', ''unembedding'', ''random_row'' (the best of as many random rows), ''pca'', ''prompt''; groups about nothing: ''random'', ''random_covariance'', ''other_features''.';
COMMENT ON COLUMN steering_effects.strength IS 'Length of what is added at every token, in median activation norms; null for a prompt, and for groups at the budget.';
COMMENT ON COLUMN steering_effects.at_budget IS 'Whether the row is read where the KL divergence is 0.3 nats, interpolated between measured strengths; the last strength where that is never reached (then kl is below 0.3); a prompt as it is.';
COMMENT ON COLUMN steering_effects.own_shift IS 'Mean change of the log probability of the concepts measured words, nats; of groups the mean of their directions.';
COMMENT ON COLUMN steering_effects.low IS 'Lower end of the 95 % interval of own_shift over test documents; null for groups.';
COMMENT ON COLUMN steering_effects.high IS 'Upper end of the 95 % interval of own_shift over test documents; null for groups.';
COMMENT ON COLUMN steering_effects.other_shift IS 'The same of other features words, mean over those concepts; null for groups.';
COMMENT ON COLUMN steering_effects.kl IS 'KL divergence of the changed predictions from the models own, nats a token.';
COMMENT ON COLUMN steering_effects.ce_increase IS 'Rise of the cross-entropy on the test text, nats; null for groups.';
COMMENT ON COLUMN steering_effects.z IS 'own_shift among those of random directions of the same strength, in their standard deviations; null where there is none.';
COMMENT ON COLUMN steering_effects.z_low IS 'Lower end of the 95 % interval of z over test documents.';
COMMENT ON COLUMN steering_effects.z_high IS 'Upper end of the 95 % interval of z over test documents.';
COMMENT ON COLUMN steering_effects.spread IS 'Of groups: standard deviation of own_shift over their directions.';
COMMENT ON COLUMN steering_effects.wrong_way IS 'Share of test windows whose shift is negative.';
COMMENT ON COLUMN steering_effects.n IS 'Test positions it was measured on.';
COMMENT ON COLUMN steering_effects.perplexity IS 'Of written texts under the model as it is; null where none were written.';
COMMENT ON COLUMN steering_effects.distinct_2 IS 'Distinct pairs of neighbouring tokens over all, mean over written texts.';
COMMENT ON COLUMN steering_effects.repeat_rate IS 'Share of tokens that stand among the 16 before them, mean over written texts.';
COMMENT ON COLUMN steering_effects.hit_rate IS 'Share of written texts that have a measured word.';
COMMENT ON COLUMN steering_effects.words IS 'Words of the concept that were measured; none of them chose the feature or made a direction.';

CREATE OR REPLACE VIEW steering AS
SELECT d.dictionary, e.feature, coalesce(any_value(l.label), 'unexplained') AS label,
       max(e.strength) FILTER (e.method = 'steered') AS strength,
       max(e.kl) FILTER (e.method = 'steered') AS kl,
       max(e.own_shift) FILTER (e.method = 'steered') AS own_shift,
       max(e.low) FILTER (e.method = 'steered') AS low,
       max(e.high) FILTER (e.method = 'steered') AS high,
       max(e.other_shift) FILTER (e.method = 'steered') AS other_shift,
       max(e.z) FILTER (e.method = 'steered') AS z,
       max(e.z_low) FILTER (e.method = 'steered') AS z_low,
       max(e.z_high) FILTER (e.method = 'steered') AS z_high,
       max(e.own_shift) FILTER (e.method = 'random') AS random,
       max(e.own_shift) FILTER (e.method = 'diff_mean') AS diff_mean,
       max(e.own_shift) FILTER (e.method = 'logistic') AS logistic,
       max(e.own_shift) FILTER (e.method = 'unembedding') AS unembedding,
       max(e.own_shift) FILTER (e.method = 'random_row') AS random_row,
       max(e.own_shift) FILTER (e.method = 'pca') AS pca,
       max(e.own_shift) FILTER (e.method = 'prompt') AS prompt,
       max(e.kl) FILTER (e.method = 'prompt') AS prompt_kl,
       arg_max(e.method, e.own_shift) FILTER (e.method NOT IN ('random', 'random_covariance', 'other_features') AND e.kl <= 0.3001) AS winner,
       any_value(e.words) AS words
FROM evidence.steering_effects e
JOIN evidence.dictionaries d USING (dictionary_id)
LEFT JOIN evidence.labels l ON l.dictionary_id = e.dictionary_id AND l.feature = e.feature
WHERE e.at_budget
GROUP BY d.dictionary, e.feature;
COMMENT ON VIEW steering IS 'What steering with a feature does to the words of its concept where it costs 0.3 nats of KL divergence, beside other directions at the same cost; one row a feature that was measured.';
COMMENT ON COLUMN steering.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN steering.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN steering.label IS '''unexplained'' where nothing passed.';
COMMENT ON COLUMN steering.strength IS 'Length of what is added where it costs KL 0.3, in median activation norms; the largest that was measured where that is never reached.';
COMMENT ON COLUMN steering.kl IS '0.3, or less where it is never reached.';
COMMENT ON COLUMN steering.own_shift IS 'Rise of the log probability of the concepts measured words, nats.';
COMMENT ON COLUMN steering.low IS 'Lower end of its 95 % interval over test documents.';
COMMENT ON COLUMN steering.high IS 'Upper end of its 95 % interval over test documents.';
COMMENT ON COLUMN steering.other_shift IS 'The same of other features words.';
COMMENT ON COLUMN steering.z IS 'own_shift among those of 32 (by default) random directions of the same strength.';
COMMENT ON COLUMN steering.z_low IS 'Lower end of the 95 % interval of z over test documents.';
COMMENT ON COLUMN steering.z_high IS 'Upper end of the 95 % interval of z over test documents.';
COMMENT ON COLUMN steering.random IS 'Mean own shift of random directions at KL 0.3.';
COMMENT ON COLUMN steering.diff_mean IS 'Own shift of the difference of means of active and silent calibration rows at KL 0.3.';
COMMENT ON COLUMN steering.logistic IS 'The same of a logistic regression between them.';
COMMENT ON COLUMN steering.unembedding IS 'The same of the mean unembedding row of the concepts other words.';
COMMENT ON COLUMN steering.random_row IS 'The same of the random row that the logit lens finds nearest to those words.';
COMMENT ON COLUMN steering.pca IS 'The same of the first principal component, in its better sign.';
COMMENT ON COLUMN steering.prompt IS 'Own shift of "Write about" those words before the text, at the KL divergence prompt_kl.';
COMMENT ON COLUMN steering.prompt_kl IS 'What that prompt costs.';
COMMENT ON COLUMN steering.winner IS 'The method with the largest own shift at a KL divergence of at most 0.3.';
COMMENT ON COLUMN steering.words IS 'Words of the concept that were measured; none of them chose the feature or made a direction.';
