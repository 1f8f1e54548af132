"""Arrow schemas of everything that crosses a boundary: evidence is Parquet, and these are its columns.

Splits are decided per document before anything else: `train` (the dictionary learns from it, labels are made from it),
`calibration` (choices are made on it) and `test` (reported numbers). Every statistic carries the split it was read on.

A *window* is one model input: `context_tokens` token ids, packed from documents of one split; the document of every
position is kept beside it. A *row* is one position of one window, named by (`window_id`, `position`).
"""

import pyarrow as pa

SPLITS = ("train", "calibration", "test")

#: One row a document that contributed at least one token. `num_tokens` counts what was harvested of it.
DOCUMENTS = pa.schema(
    [
        ("document_id", pa.int32()),
        ("split", pa.string()),
        ("title", pa.string()),
        ("source", pa.string()),
        ("num_tokens", pa.int32()),
        ("sha256", pa.string()),  # of the normalised text: what the split was decided by
    ]
)

#: One row a model input. `document_ids` has one entry a token; separators and BOS belong to the document they open.
WINDOWS = pa.schema(
    [
        ("window_id", pa.int32()),
        ("split", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("document_ids", pa.list_(pa.int32())),
    ]
)

#: Every token id that occurs in windows or logit effects, as readable text (leading space kept).
VOCABULARY = pa.schema([("token_id", pa.int32()), ("token", pa.string())])

#: Rows of a split and how many were left out of it: `num_rows` = kept + first positions + massive-norm rows.
SPLIT_ROWS = pa.schema(
    [
        ("split", pa.string()),
        ("num_documents", pa.int64()),
        ("num_windows", pa.int64()),
        ("num_rows", pa.int64()),
        ("num_kept_rows", pa.int64()),
        ("num_first_position_rows", pa.int64()),
        ("num_massive_rows", pa.int64()),
    ]
)

#: One row a dictionary in the store, with the identity of the model it reads. `config` is JSON.
DICTIONARIES = pa.schema(
    [
        ("dictionary", pa.string()),
        ("architecture", pa.string()),
        ("model_name", pa.string()),
        ("model_sha256", pa.string()),
        ("tokenizer_sha256", pa.string()),
        ("hook_point", pa.string()),
        ("d_in", pa.int32()),
        ("d_sae", pa.int32()),
        ("k", pa.int32()),
        ("config", pa.string()),
    ]
)

#: Every positive activation on a kept row, sparse. The file order is (split, window_id, position).
ACTIVATIONS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("split", pa.string()),
        ("feature", pa.int32()),
        ("window_id", pa.int32()),
        ("position", pa.int16()),
        ("token_id", pa.int32()),
        ("activation", pa.float32()),
    ]
)

#: Logit lens: the change of a token's logit per unit of the feature, `W_U norm(d)`; `rank` 0 is the strongest.
LOGIT_EFFECTS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("direction", pa.string()),  # 'promoted' | 'suppressed'
        ("rank", pa.int16()),
        ("token_id", pa.int32()),
        ("effect", pa.float32()),
    ]
)

#: Nearest features of the same dictionary by decoder cosine; `rank` 0 is the nearest other feature.
NEIGHBOURS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("rank", pa.int16()),
        ("neighbour", pa.int32()),
        ("cosine", pa.float32()),
    ]
)

#: One row a feature, `unexplained` included: made on train, chosen on calibration, every score here read on test.
#: For labels a feature is *active* on a row where its activation exceeds `label.active_fraction` (a quarter) of its
#: largest train activation; every other row after a window's first is inactive, rows of weak activation included.
#: A label in words has no predicate to execute: its AUROC is its scorer's, on examples against negatives matched on
#: token frequency, position and window length (rung N1 of docs/receipts.md); columns that need every row are null.
LABELS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("label", pa.string()),  # 'unexplained' where nothing passed
        ("kind", pa.string()),  # 'lexical' | 'structural' | 'semantic' | 'output' | 'none'
        ("predicate", pa.string()),  # JSON, executable by pipelines/predicates.py; null where the label is words only
        ("explainer", pa.string()),
        ("score_split", pa.string()),  # always 'test'
        ("auroc", pa.float32()),  # of the predicate against 'active' on all test rows; of words on N1 examples
        ("auroc_low", pa.float32()),  # 95 % interval, bootstrap over documents
        ("auroc_high", pa.float32()),
        ("precision", pa.float32()),
        ("recall", pa.float32()),
        ("f1", pa.float32()),
        ("n_active", pa.int32()),  # test rows on which the feature is active
        ("n_inactive", pa.int32()),  # test rows it was scored against: all of them, or the N1 negatives
        ("calibration_f1", pa.float32()),  # what an executable label was chosen by
    ]
)

#: The dictionary's metrics, one a row; definitions are in sae/metrics.py.
METRICS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("n", pa.int64()),  # rows or tokens it was measured on
        ("low", pa.float64()),  # 95 % interval over documents, null where there is none
        ("high", pa.float64()),
    ]
)

#: What labels and dictionaries had to show, one row a feature and control.
RECEIPTS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("feature", pa.int32()),  # null: about the whole dictionary
        ("control", pa.string()),  # code and name of the check
        ("value", pa.float64()),  # null where it could not be measured
        ("threshold", pa.float64()),
        ("n", pa.int64()),  # cases it was measured on
        ("low", pa.float64()),  # 95 % interval, null where there is none
        ("high", pa.float64()),
        ("verdict", pa.string()),  # 'passed' | 'failed' | 'reported'
        ("detail", pa.string()),  # JSON: what else a reader needs to check it
    ]
)

#: Sentence embeddings of labels or of evidence: `vector` is float16, little-endian, of norm 1.
EMBEDDINGS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("source", pa.string()),  # 'label' | 'evidence'
        ("model", pa.string()),
        ("vector", pa.binary()),
    ]
)

#: How many of the dictionaries that it was compared with have a feature; one comparison a dictionary, the last saved.
STABILITY = pa.schema(
    [
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("num_compared", pa.int16()),  # other dictionaries
        ("num_shared", pa.int16()),  # those of them that have it
        ("stability", pa.float32()),  # num_shared / num_compared
        ("mean_cosine", pa.float32()),  # of decoder rows with its partners, 0 where it has none
        ("first_seen", pa.string()),  # the first of `compared` that has it
        ("compared_as", pa.string()),  # name of this dictionary in `compared`
        ("compared", pa.list_(pa.string())),  # all of the comparison, in the order given
    ]
)

#: Partners of features in the dictionaries that they were compared with, which have the names of the comparison.
MATCHES = pa.schema(
    [
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("other_dictionary", pa.string()),
        ("other_feature", pa.int32()),
        ("decoder_cosine", pa.float32()),
        ("encoder_cosine", pa.float32()),
        ("encoder_agrees", pa.bool_()),  # encoder rows, matched apart, give the same pair
        ("shared", pa.bool_()),
    ]
)

#: What steering with a feature does to the words of its concept, beside other directions for the same concept: one row
#: a feature, method and strength, and one a feature and method at the KL divergence where all are compared.
STEERING_EFFECTS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("feature", pa.int32()),
        ("method", pa.string()),  # 'steered' is the feature; see pipelines/steering/effect_results.py for the others
        ("strength", pa.float32()),  # median activation norms; null for a prompt, and for groups at the budget
        ("at_budget", pa.bool_()),  # interpolated to KL 0.3, or the last strength where that is never reached
        ("own_shift", pa.float32()),  # nats; of groups of directions their mean
        ("low", pa.float32()),  # 95 % interval over test documents, null for groups
        ("high", pa.float32()),
        ("other_shift", pa.float32()),  # nats, mean over other concepts
        ("kl", pa.float32()),  # nats a token
        ("ce_increase", pa.float32()),  # nats
        ("z", pa.float32()),  # among random directions of the same strength
        ("z_low", pa.float32()),
        ("z_high", pa.float32()),
        ("spread", pa.float32()),  # of groups: standard deviation of their shifts
        ("wrong_way", pa.float32()),  # share of test windows whose shift is negative
        ("n", pa.int32()),  # test positions
        ("perplexity", pa.float32()),  # of written texts under the model as it is; null where none were written
        ("distinct_2", pa.float32()),
        ("repeat_rate", pa.float32()),
        ("hit_rate", pa.float32()),
        ("words", pa.list_(pa.string())),  # that were measured
    ]
)

#: Where a dictionary's evidence comes from, one row a dictionary. `config` is JSON, `indexed` UTC.
RUNS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("run", pa.string()),
        ("corpus", pa.string()),  # name of the text in the store
        ("model_name", pa.string()),
        ("model_revision", pa.string()),
        ("model_sha256", pa.string()),
        ("tokenizer_sha256", pa.string()),
        ("dataset_fingerprint", pa.string()),  # SHA-256 over the documents' hashes, in order of document_id
        ("code_version", pa.string()),
        ("config", pa.string()),
        ("indexed", pa.timestamp("ms")),  # Parquet has no seconds
    ]
)

#: Every evidence table by its file stem: one file, or a folder of that name with part files of many ranks, or both.
TABLES: dict[str, pa.Schema] = {
    "documents": DOCUMENTS,
    "windows": WINDOWS,
    "vocabulary": VOCABULARY,
    "split_rows": SPLIT_ROWS,
    "dictionaries": DICTIONARIES,
    "activations": ACTIVATIONS,
    "logit_effects": LOGIT_EFFECTS,
    "neighbours": NEIGHBOURS,
    "labels": LABELS,
    "metrics": METRICS,
    "receipts": RECEIPTS,
    "embeddings": EMBEDDINGS,
    "stability": STABILITY,
    "matches": MATCHES,
    "steering_effects": STEERING_EFFECTS,
    "runs": RUNS,
}

#: Evidence that may not exist yet when the store is built.
OPTIONAL_TABLES = ("labels", "metrics", "receipts", "embeddings", "stability", "matches", "steering_effects", "runs")
