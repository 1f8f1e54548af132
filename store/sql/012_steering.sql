-- What steering with features does to their concepts, beside other directions for the same concepts.
CREATE TABLE evidence.steering_effects (
    dictionary_id USMALLINT, feature INTEGER, method VARCHAR, strength FLOAT, at_budget BOOLEAN,
    own_shift FLOAT, low FLOAT, high FLOAT, other_shift FLOAT, kl FLOAT, ce_increase FLOAT, z FLOAT,
    z_low FLOAT, z_high FLOAT, spread FLOAT, wrong_way FLOAT, n INTEGER, perplexity FLOAT, distinct_2 FLOAT,
    repeat_rate FLOAT, hit_rate FLOAT, words VARCHAR[]
);
COMMENT ON TABLE evidence.steering_effects IS 'Effects of features and of rival directions on the words of a concept, at several strengths (saeql effect). Sorted by feature, method, at_budget, strength.';
COMMENT ON COLUMN evidence.steering_effects.dictionary_id IS 'Number of the dictionary.';
COMMENT ON COLUMN evidence.steering_effects.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN evidence.steering_effects.method IS '''steered'' (the feature itself); for the same concept: ''diff_mean'', ''logistic'', ''unembedding'', ''random_row'' (the best of as many random rows), ''pca'', ''prompt''; groups about nothing: ''random'', ''random_covariance'', ''other_features''.';
COMMENT ON COLUMN evidence.steering_effects.strength IS 'Length of what is added at every token, in median activation norms; null for a prompt, and for groups at the budget.';
COMMENT ON COLUMN evidence.steering_effects.at_budget IS 'Whether the row is read where the KL divergence is 0.3 nats, interpolated between measured strengths; the last strength where that is never reached (then kl is below 0.3); a prompt as it is.';
COMMENT ON COLUMN evidence.steering_effects.own_shift IS 'Mean change of the log probability of the concepts measured words, nats; of groups the mean of their directions.';
COMMENT ON COLUMN evidence.steering_effects.low IS 'Lower end of the 95 % interval of own_shift over test documents; null for groups.';
COMMENT ON COLUMN evidence.steering_effects.high IS 'Upper end of the 95 % interval of own_shift over test documents; null for groups.';
COMMENT ON COLUMN evidence.steering_effects.other_shift IS 'The same of other features words, mean over those concepts; null for groups.';
COMMENT ON COLUMN evidence.steering_effects.kl IS 'KL divergence of the changed predictions from the models own, nats a token.';
COMMENT ON COLUMN evidence.steering_effects.ce_increase IS 'Rise of the cross-entropy on the test text, nats; null for groups.';
COMMENT ON COLUMN evidence.steering_effects.z IS 'own_shift among those of random directions of the same strength, in their standard deviations; null where there is none.';
COMMENT ON COLUMN evidence.steering_effects.z_low IS 'Lower end of the 95 % interval of z over test documents.';
COMMENT ON COLUMN evidence.steering_effects.z_high IS 'Upper end of the 95 % interval of z over test documents.';
COMMENT ON COLUMN evidence.steering_effects.spread IS 'Of groups: standard deviation of own_shift over their directions.';
COMMENT ON COLUMN evidence.steering_effects.wrong_way IS 'Share of test windows whose shift is negative.';
COMMENT ON COLUMN evidence.steering_effects.n IS 'Test positions it was measured on.';
COMMENT ON COLUMN evidence.steering_effects.perplexity IS 'Of written texts under the model as it is; null where none were written.';
COMMENT ON COLUMN evidence.steering_effects.distinct_2 IS 'Distinct pairs of neighbouring tokens over all, mean over written texts.';
COMMENT ON COLUMN evidence.steering_effects.repeat_rate IS 'Share of tokens that stand among the 16 before them, mean over written texts.';
COMMENT ON COLUMN evidence.steering_effects.hit_rate IS 'Share of written texts that have a measured word.';
COMMENT ON COLUMN evidence.steering_effects.words IS 'Words of the concept that were measured; none of them chose the feature or made a direction.';
