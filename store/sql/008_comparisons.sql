-- What a comparison with other dictionaries found about those of this store.
CREATE TABLE evidence.stability (
    dictionary_id USMALLINT, feature INTEGER, num_compared SMALLINT, num_shared SMALLINT, stability FLOAT,
    mean_cosine FLOAT, first_seen VARCHAR, compared_as VARCHAR, compared VARCHAR[]
);
CREATE TABLE evidence.matches (
    dictionary_id USMALLINT, feature INTEGER, other_dictionary VARCHAR, other_feature INTEGER, decoder_cosine FLOAT,
    encoder_cosine FLOAT, encoder_agrees BOOLEAN, shared BOOLEAN
);

COMMENT ON TABLE evidence.stability IS 'How many of the compared dictionaries have a feature, of the last comparison that was saved. Sorted by feature.';
COMMENT ON COLUMN evidence.stability.dictionary_id IS 'Number of the dictionary.';
COMMENT ON COLUMN evidence.stability.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN evidence.stability.num_compared IS 'Other dictionaries it was compared with.';
COMMENT ON COLUMN evidence.stability.num_shared IS 'Those of them that have it.';
COMMENT ON COLUMN evidence.stability.stability IS 'num_shared / num_compared.';
COMMENT ON COLUMN evidence.stability.mean_cosine IS 'Mean decoder cosine with its partners, 0 where it has none.';
COMMENT ON COLUMN evidence.stability.first_seen IS 'First dictionary of compared that has it.';
COMMENT ON COLUMN evidence.stability.compared_as IS 'Name of this dictionary in compared.';
COMMENT ON COLUMN evidence.stability.compared IS 'Names of all dictionaries of the comparison, in the order given.';
COMMENT ON TABLE evidence.matches IS 'Partners of features in other dictionaries, of the last comparison that was saved. Sorted by other dictionary, feature.';
COMMENT ON COLUMN evidence.matches.dictionary_id IS 'Number of the dictionary.';
COMMENT ON COLUMN evidence.matches.feature IS 'Index in the dictionary, from 0.';
COMMENT ON COLUMN evidence.matches.other_dictionary IS 'Name of the other dictionary in the comparison.';
COMMENT ON COLUMN evidence.matches.other_feature IS 'Index in the other dictionary, from 0.';
COMMENT ON COLUMN evidence.matches.decoder_cosine IS 'Cosine of their decoder rows.';
COMMENT ON COLUMN evidence.matches.encoder_cosine IS 'Cosine of their encoder rows.';
COMMENT ON COLUMN evidence.matches.encoder_agrees IS 'Encoder rows, matched apart, give the same pair.';
COMMENT ON COLUMN evidence.matches.shared IS 'The pair is one feature: encoder_agrees, and the decoder cosine reaches the threshold of the comparison.';
