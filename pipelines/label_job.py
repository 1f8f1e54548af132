"""The label stage of a run: labels by the explainers, then the controls, as evidence `labels` and `receipts`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeql.sae.files import DictionaryError
from saeql.store.evidence import Evidence

from .embedder import EmbedderError
from .explainers.registry import explainers
from .label import label_rows, labels_of
from .label_config import LabelConfig
from .label_parts import LabelParts, hash_of
from .model_config import ModelError
from .output import note
from .part_of_speech import Tagger
from .progress import progress
from .receipts.control import Control, Labelled
from .receipts.examples import NearRows
from .receipts.held_out import HeldOut
from .receipts.label_scorer import LabelScorer
from .receipts.receipt import REPORTED, Receipt, receipts_table
from .receipts.registry import controls, near_rows
from .receipts.split_hygiene import check_documents
from .receipts.thresholds import THRESHOLDS
from .split_rows import FeatureRows, read_feature_rows

if TYPE_CHECKING:
    from .run import Run


#: Controls that read control runs, which may have been made since the stage was stopped: never kept.
_COMPARISONS = ("C6", "C7", "C8", "C9", "C14b")


class LabelError(ValueError):
    """What was asked of the label stage cannot be done."""


@dataclass(frozen=True)
class LabelOptions:
    """What one call changes of the configuration."""

    receipts: str | None = None
    """Tier of the controls; None: `label.receipts`."""
    only: str | None = None
    """'unexplained', or features as '3,17': the others keep labels and receipts. None: all."""
    explainers: tuple[str, ...] = ()
    """Empty: `label.explainers`."""

    def apply(self, config: LabelConfig) -> LabelConfig:
        """`config` with what is given here. Raises LabelError where there is no such tier."""
        changed = {"receipts": self.receipts} if self.receipts else {}
        try:
            return replace(config, **changed, **({"explainers": self.explainers} if self.explainers else {}))
        except ValueError as error:
            raise LabelError(str(error)) from None


def label_run(run: "Run", options: LabelOptions | None = None) -> None:
    """Write evidence tables `labels` and `receipts` of the run's dictionary.

    Raises LabelError where `only` asks for what is not there, ReceiptError where a control fails that all labels rest
    on (nothing is written then), EvidenceError where the evidence is missing, ValueError where an explainer, scorer or
    control cannot be had.
    """
    options = options or LabelOptions()
    config = options.apply(run.config.label)
    run = type(run)(run.path, replace(run.config, label=config))
    evidence, name = run.evidence, run.spec.name
    made = [explainer.of(run) for explainer in explainers(config.explainers)]
    checks = [] if config.receipts == "none" else _checks(run)
    check_documents(evidence)
    tagger = Tagger.of(config.part_of_speech)
    rows = read_feature_rows(evidence, name, active_fraction=config.active_fraction, tagger=tagger)
    before = _before(evidence, rows, options.only)
    parts = LabelParts.of(run, options.only)
    features = None if options.only is None else parts.features(partial(_selected, options.only, before, rows))
    held_out = HeldOut.of_evidence(rows, evidence, config, near=_near(run))
    scorer = LabelScorer.of(run)
    with progress("label", None, "candidates") as advance:
        labels = label_rows(
            rows,
            config,
            explainers=made,
            scorer=scorer,
            held_out=held_out,
            features=features,
            on_progress=advance.to,
            parts=parts,
        )
    if features is not None and before is not None:
        labels = _merged(before, labels, features)
    table = _receipts(run, rows, labels, held_out, scorer, checks, parts) if checks else receipts_table(name, [])
    file = evidence.path("receipts")
    if features is not None and file.exists():
        table = _kept_receipts(pq.read_table(file), table, features)
    evidence.write("labels", labels)
    if checks or features is not None:
        evidence.write("receipts", table)
    else:
        file.unlink(missing_ok=True)  # of labels that were here before
    parts.remove()


def _checks(run: "Run") -> list[Control]:
    """The controls of the tier; those that need an embedder where there is none are left out, and a line says so."""
    checks = []
    for control in controls(run.config.label.receipts):
        try:
            checks.append(control.of(run))
        except EmbedderError as error:
            note(f"without {control.code} {control.name}: {error}")
    return checks


def _near(run: "Run") -> NearRows | None:
    """What fills rung N3, at the tiers that pay for it and where there is an embedder."""
    finder = near_rows() if run.config.label.receipts in ("full", "paper") else None
    try:
        return finder.of(run) if finder else None
    except EmbedderError as error:
        note(f"no negatives near in meaning (N3): {error}")
        return None


def _receipts(
    run: "Run",
    rows: FeatureRows,
    labels: pa.Table,
    held_out: HeldOut,
    scorer: LabelScorer,
    checks: Sequence[Control],
    parts: LabelParts,
) -> pa.Table:
    """What every control says, the thresholds first; one that cannot be asked says why."""
    from .stages import RunError

    tier = run.config.label.receipts
    alive = [f for f, n in enumerate(rows.test.active.counts.tolist()) if n]
    examples = held_out.sample("test", alive)
    labelled = Labelled(run, rows, labels_of(labels), examples, tier, scorer, held_out)
    name = run.spec.name

    def receipts_of(control: Control) -> pa.Table:
        try:
            return receipts_table(name, control.check(labelled))
        except (RunError, ModelError, DictionaryError) as error:  # no activations, model or dictionary to ask
            why = {"missing": str(error)}
            named = f"{control.code} {control.name}"
            return receipts_table(name, [Receipt(control=named, value=None, verdict=REPORTED, detail=why)])

    tables, of_labels = [receipts_table(name, [THRESHOLDS.receipt(tier)])], hash_of(labels)
    with progress("receipts", len(checks), "controls") as advance:
        for control in checks:
            make = partial(receipts_of, control)
            compares = control.code in _COMPARISONS
            tables.append(make() if compares else parts.table(f"receipts.{control.code}.{of_labels}", make))
            advance(1)
    return pa.concat_tables(tables).combine_chunks()


def _before(evidence: Evidence, rows: FeatureRows, only: str | None) -> pa.Table | None:
    """The labels that are there, where some of them are to be kept."""
    if only is None:
        return None
    if not evidence.has("labels"):
        raise LabelError(
            f"{evidence.folder} has no labels yet, so --only has nothing to keep: label all features first"
        )
    table = evidence.read("labels")
    own = [name == rows.dictionary for name in table["dictionary"].to_pylist()]
    table = table.filter(pa.array(own, pa.bool_())).sort_by("feature")
    if table["feature"].to_pylist() != list(range(rows.num_features)):
        raise LabelError(f"the labels in {evidence.folder} are not of {rows.dictionary}: label all features first")
    return table


def _selected(only: str, before: pa.Table | None, rows: FeatureRows) -> list[int]:
    """The features of `only`, sorted."""
    assert before is not None
    if only == "unexplained":
        return [f for f, kind in enumerate(before["kind"].to_pylist()) if kind == "none"]
    try:
        features = sorted({int(part) for part in only.split(",")})
    except ValueError:
        raise LabelError(f"--only takes 'unexplained' or features such as 3,17, not {only!r}") from None
    for feature in (features[0], features[-1]):
        if not 0 <= feature < rows.num_features:
            raise LabelError(f"--only {feature}: {rows.dictionary} has the features 0 to {rows.num_features - 1}")
    return features


def _merged(before: pa.Table, new: pa.Table, features: Sequence[int]) -> pa.Table:
    """`new` for the `features`, `before` for all others."""
    is_new = np.isin(new["feature"].to_numpy(), features)
    kept = before.filter(pa.array(~is_new)).cast(new.schema)
    return pa.concat_tables([kept, new.filter(pa.array(is_new))]).sort_by("feature")


def _kept_receipts(before: pa.Table, new: pa.Table, features: Sequence[int]) -> pa.Table:
    """Receipts of the other features as they were, of the `features` and of the whole dictionary as they are now."""

    def select(table: pa.Table, *, others: bool) -> pa.Table:
        feature = table["feature"].fill_null(-1).to_numpy()
        own = np.isin(feature, features)
        return table.filter(pa.array(~own & (feature >= 0) if others else own | (feature < 0)))

    return pa.concat_tables([select(before, others=True).cast(new.schema), select(new, others=False)])
