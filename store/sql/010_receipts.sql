-- Receipts say what else a reader needs to check them, and may be about a whole dictionary.
ALTER TABLE evidence.receipts ADD COLUMN detail VARCHAR;
COMMENT ON TABLE evidence.receipts IS 'What labels and dictionaries had to show.';
COMMENT ON COLUMN evidence.receipts.feature IS 'Index in the dictionary, from 0; null where the whole dictionary is meant.';
COMMENT ON COLUMN evidence.receipts.verdict IS '''passed'', ''failed'', or ''reported'' where nothing is asked.';
COMMENT ON COLUMN evidence.receipts.detail IS 'JSON: what else a reader needs to check it.';
CREATE OR REPLACE VIEW receipts AS
SELECT d.dictionary, r.* EXCLUDE (dictionary_id) FROM evidence.receipts r JOIN evidence.dictionaries d USING (dictionary_id);
COMMENT ON VIEW receipts IS 'What labels and dictionaries had to show: one row a feature and control, with what was measured and what was asked.';
COMMENT ON COLUMN receipts.dictionary IS 'Name of the dictionary.';
COMMENT ON COLUMN receipts.feature IS 'Index in the dictionary, from 0; null where the whole dictionary is meant.';
COMMENT ON COLUMN receipts.control IS 'Code and name of the check.';
COMMENT ON COLUMN receipts.value IS 'What was measured on n cases; null where it could not be.';
COMMENT ON COLUMN receipts.threshold IS 'What it was compared with.';
COMMENT ON COLUMN receipts.n IS 'Rows, tokens or cases it was measured on.';
COMMENT ON COLUMN receipts.low IS 'Lower end of the 95 % interval, null where there is none.';
COMMENT ON COLUMN receipts.high IS 'Upper end of the 95 % interval, null where there is none.';
COMMENT ON COLUMN receipts.verdict IS '''passed'', ''failed'', or ''reported'' where nothing is asked.';
COMMENT ON COLUMN receipts.detail IS 'JSON: what else a reader needs to check it.';
COMMENT ON COLUMN features.kind IS '''lexical'', ''structural'', ''semantic'', ''output'' or ''none''.';
COMMENT ON COLUMN labels.predicate IS 'JSON, what the label claims in executable form; null where the label is words only, and for kind ''none''.';
COMMENT ON COLUMN labels.auroc IS 'Of the predicate over all test rows; of a label in words its scorer''s, on examples against matched negatives (N1).';
