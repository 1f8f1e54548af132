"""A run beside its control runs: receipts C6 to C9 and C14b as evidence of the run, and one table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeql.store.records import RECEIPTS

from .control_runs import KINDS, command, control_path, status
from .receipts.control_gaps import ControlPair, Trained
from .receipts.control_scores import FeatureScores, feature_scores, gap, median_interval
from .receipts.frozen_baselines import FrozenBaselines
from .receipts.random_dictionary import RandomDictionary
from .receipts.randomised_model import RandomisedModel
from .receipts.receipt import Receipt, receipts_table
from .receipts.second_corpus import SecondCorpus
from .receipts.seed_stability import SeedStability
from .run import Run

CONTROLS = (RandomDictionary, FrozenBaselines, RandomisedModel, SeedStability, SecondCorpus)
COLUMNS = [
    "dictionary", "alive", "labelled", "contextual & labelled", "n", "median AUROC", "95 % over features",
    "trained - it", "95 % over features and documents",
]  # fmt: skip


def compare_controls(trained: Trained) -> list[Receipt]:
    """Receipts of these controls, by the control runs that there are."""
    return [receipt for control in CONTROLS for receipt in control.of(trained.run).compare(trained)]


def save_receipts(run: Run, receipts: Sequence[Receipt]) -> None:
    """Put the receipts of these controls in place of older ones; those of other controls stay.

    To be called within `run.locked()`; the store has to be brought up to date afterwards (`saeql store RUN`).
    """
    new = receipts_table(run.spec.name, receipts)
    file = run.evidence.path("receipts")  # not its parts, which probes and steering write
    if file.exists():
        old = pq.read_table(file, schema=RECEIPTS)
        codes = {control.code for control in CONTROLS}
        keep = [name.split(" ")[0] not in codes for name in old["control"].to_pylist()]
        new = pa.concat_tables([old.filter(pa.array(keep, pa.bool_())), new])
    run.save_evidence("receipts", new, "control")


def control_table(trained: Trained) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: the run, then every control run that is finished, beside it."""
    rows = [_row("trained", feature_scores(trained.run))]
    for kind in (kind.name for kind in KINDS.values() if kind.has_own_dictionary):
        pair = trained.pair(kind)
        if pair.control is not None:
            rows.append(_row(kind, feature_scores(pair.control), pair))
    return COLUMNS, rows


def status_table(run: Run) -> tuple[list[str], list[list[Any]]]:
    """Every kind with its state, and where it is or what makes it."""
    rows = []
    for kind in KINDS.values():
        state = status(run, kind.name)
        where = command(run, kind.name) if state == "none" else str(control_path(run, kind.name))
        rows.append([kind.name, kind.code, kind.summary, state, where])
    return ["kind", "control", "what differs", "state", "where"], rows


def _row(name: str, scores: FeatureScores, pair: ControlPair | None = None) -> list[Any]:
    own, (share, alive), (contextual, _) = scores.of_labels(), scores.share(), scores.share(contextual=True)
    low, high = median_interval(own)
    row = [name, alive, _share(share), _share(contextual), len(own)]
    row += [f"{np.median(own):.3f}", f"{low:.3f} to {high:.3f}"] if len(own) else ["-", "-"]
    if pair is None:
        return [*row, "", ""]
    if pair.scores is None:
        return [*row, "-", pair.missing]
    found = gap(pair.scores[0].of_labels(), own, of_documents=pair.moves.median)
    return [*row, *([f"{found.value:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}"] if len(own) else ["-", "-"])]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value == value else "-"
