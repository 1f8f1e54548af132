"""Label features: proposed on train, chosen on calibration, scored on test.

What a row is, and where a feature is active, is defined in `split_rows.py`. Explainers propose candidates from train
rows (`explainers/`), one is chosen on calibration (`label_choice.py`), and only then do test activations count. A label
that cannot be scored, because no test row (or every one) is active, is taken back: no label without its score. Where
nothing is good enough the feature stays 'unexplained'.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from saeql.store.evidence import Evidence
from saeql.store.records import LABELS

from .explainers.base import Candidate, Explainer
from .explainers.predicates import PredicateExplainer
from .label_choice import Choice, choose
from .label_config import LabelConfig
from .label_parts import LabelParts
from .part_of_speech import Tagger
from .predicate_scores import score_executable
from .predicates import Predicate
from .progress import OnProgress
from .receipts.held_out import HeldOut
from .receipts.predicate_scorer import PredicateScorer
from .receipts.sampler import SampleConfig
from .receipts.scorer import Scorer
from .receipts.statistics import DocumentDraws, auroc
from .split_rows import FeatureRows, read_feature_rows

UNEXPLAINED = "unexplained"
#: Active train rows that candidates are counted on at once: about 100 bytes of memory each.
ACTIVE_AT_ONCE = 2**25
#: Columns of `records.LABELS` by name, for the labels that could be scored.
Scores = dict[int, dict[str, float | None]]


def label_rows(
    rows: FeatureRows,
    config: LabelConfig,
    *,
    explainers: Sequence[Explainer],
    scorer: Scorer,
    held_out: HeldOut,
    features: Sequence[int] | None = None,
    on_progress: OnProgress | None = None,
    parts: LabelParts | None = None,
) -> pa.Table:
    """Label `features` (None: all): a table of `records.LABELS`, one row for every feature of the dictionary.

    Features that were not asked for are unexplained. `on_progress(done, total)` counts candidates proposed, then
    executable ones tried on calibration. `parts` keeps what is done of it.
    """
    parts = parts or LabelParts()
    enough = np.minimum(rows.train.active.counts, rows.calibration.active.counts) >= config.min_active_rows
    wanted = [f for f in (range(rows.num_features) if features is None else sorted(features)) if enough[f]]

    def chosen_of_all() -> dict[int, Choice]:
        candidates: dict[int, list[Candidate]] = {}
        for place, explainer in enumerate(explainers):
            for number, block in enumerate(_blocks(explainer, rows, wanted)):
                found = parts.candidates(
                    f"{place}.{explainer.name}.{number}",
                    partial(explainer.propose, rows, block, on_progress or _silent),
                )
                for feature, own in found.items():
                    candidates.setdefault(feature, []).extend(own)
        candidates = dict(sorted(candidates.items()))
        return choose(rows, candidates, config, held_out=held_out, scorer=scorer, on_progress=on_progress)

    chosen = parts.choices(chosen_of_all)
    executable = {f: c.candidate.predicate for f, c in chosen.items() if c.candidate.predicate is not None}
    scores = score_executable(rows.test, executable, config)
    scores |= _score_words(rows, chosen, config, held_out, scorer)
    return _table(rows, chosen, scores)


def _blocks(explainer: Explainer, rows: FeatureRows, features: list[int]) -> list[list[int]]:
    """`features` in blocks to propose for one after the other, where the explainer says that this is the same."""
    if not getattr(explainer, "in_blocks", False):
        return [features]
    before = np.cumsum(rows.train.active.counts[features]) // ACTIVE_AT_ONCE
    return [own.tolist() for own in np.split(np.array(features, np.int64), np.flatnonzero(np.diff(before)) + 1)]


def _silent(done: int, total: int) -> None:
    pass


def _score_words(
    rows: FeatureRows, chosen: Mapping[int, Choice], config: LabelConfig, held_out: HeldOut, scorer: Scorer
) -> Scores:
    """Test AUROC against matched negatives (N1) of the labels that are words only."""
    words = {f: c.candidate for f, c in chosen.items() if c.candidate.predicate is None}
    if not words:
        return {}
    examples = {f: e for f, e in held_out.sample("test", sorted(words)).items() if len(e.negatives.get("N1", ()))}
    both = [np.concatenate([e.active, e.negatives["N1"]]) for e in examples.values()]
    found = scorer.score([words[f] for f in examples], both, rows.test)
    documents = rows.test.documents
    draws = DocumentDraws(rows.test.num_documents, draws=config.num_bootstrap, seed=config.seed)
    out: Scores = {}
    for e, scores in zip(examples.values(), found, strict=True):
        positive, negative = np.split(scores, [len(e.active)])
        low, high = draws.interval(positive, documents[e.active], negative, documents[e.negatives["N1"]])
        out[e.feature] = {
            "auroc": auroc(positive, negative),
            "auroc_low": None if np.isnan(low) else low,
            "auroc_high": None if np.isnan(high) else high,
            "n_inactive": len(negative),
        }
    return out


def _table(rows: FeatureRows, chosen: Mapping[int, Choice], scores: Scores) -> pa.Table:
    num_active, num_rows = rows.test.active.counts, rows.test.num_rows
    records = []
    for feature in range(rows.num_features):
        choice = chosen.get(feature) if feature in scores else None
        candidate = choice.candidate if choice else Candidate(UNEXPLAINED, "none", PredicateExplainer.name)
        record = dict.fromkeys(LABELS.names) | {
            "dictionary": rows.dictionary,
            "feature": feature,
            "label": candidate.label,
            "kind": candidate.kind,
            "predicate": candidate.predicate.to_json() if candidate.predicate else None,
            "explainer": candidate.explainer,
            "score_split": "test",
            "n_active": int(num_active[feature]),
            "n_inactive": int(num_rows - num_active[feature]),
        }
        if choice:
            record |= scores[feature] | {"calibration_f1": choice.f1}
        records.append(record)
    return pa.Table.from_pylist(records, schema=LABELS)


def labels_of(table: pa.Table) -> dict[int, Candidate]:
    """The labels of a table of `records.LABELS`, by feature; unexplained ones are missing.

    Raises ValueError where a predicate is of a kind that this version cannot execute.
    """
    columns = table.select(["feature", "label", "kind", "predicate", "explainer"]).to_pylist()
    return {
        r["feature"]: Candidate(
            r["label"], r["kind"], r["explainer"], Predicate.from_json(r["predicate"]) if r["predicate"] else None
        )
        for r in columns
        if r["kind"] != "none"
    }


def label_dictionary(
    evidence: Evidence, *, dictionary: str, config: LabelConfig, on_progress: OnProgress | None = None
) -> pa.Table:
    """Label every feature of `dictionary` with executable predicates, which need nothing but the evidence.

    Reads windows, vocabulary, dictionaries and activations; writes nothing. Raises EvidenceError where the evidence is
    missing or inconsistent.
    """
    tagger = Tagger.of(config.part_of_speech)
    rows = read_feature_rows(evidence, dictionary, active_fraction=config.active_fraction, tagger=tagger)
    return label_rows(
        rows,
        config,
        explainers=[PredicateExplainer(config)],
        scorer=PredicateScorer(),
        held_out=HeldOut(rows, SampleConfig(num=config.num_examples, seed=config.seed)),
        on_progress=on_progress,
    )


def write_labels(
    evidence: Evidence, *, dictionaries: Sequence[str], config: LabelConfig, on_progress: OnProgress | None = None
) -> pa.Table:
    """Label all `dictionaries` and write evidence table `labels`, replacing what was there. Returns the table."""
    tables = [label_dictionary(evidence, dictionary=d, config=config, on_progress=on_progress) for d in dictionaries]
    labels = pa.concat_tables(tables)
    evidence.write("labels", labels)
    return labels
