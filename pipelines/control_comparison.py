"""A run beside its control runs: receipts C6 to C9 as evidence of the run, and one table."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from saeql.store.records import RECEIPTS

from .control_runs import KINDS, command, control_path, find_control, status
from .receipts.control_gaps import labelled_share
from .receipts.control_scores import FeatureScores, feature_scores, median_gap
from .receipts.frozen_baselines import FrozenBaselines
from .receipts.random_dictionary import RandomDictionary
from .receipts.randomised_model import RandomisedModel
from .receipts.receipt import Receipt, receipts_table
from .receipts.seed_stability import SeedStability
from .run import Run

CONTROLS = (RandomDictionary, FrozenBaselines, RandomisedModel, SeedStability)
COLUMNS = [
    "dictionary", "alive", "labelled", "median AUROC", "95 % interval", "n", "trained - it", "95 % interval of that",
    "contextual & labelled",
]  # fmt: skip


def compare_controls(run: Run) -> list[Receipt]:
    """Receipts of all four controls, by the control runs that there are."""
    return [receipt for control in CONTROLS for receipt in control.of(run).compare(run)]


def save_receipts(run: Run, receipts: Sequence[Receipt]) -> None:
    """Put the receipts of these controls in place of older ones; those of other controls stay.

    To be called within `run.locked()`; the store has to be brought up to date afterwards (`saeql store RUN`).
    """
    new = receipts_table(run.spec.name, receipts)
    if run.evidence.has("receipts"):
        old = run.evidence.read("receipts").cast(RECEIPTS)
        codes = {control.code for control in CONTROLS}
        keep = [name.split(" ")[0] not in codes for name in old["control"].to_pylist()]
        new = pa.concat_tables([old.filter(pa.array(keep, pa.bool_())), new])
    run.save_evidence("receipts", new, "control")


def control_table(run: Run) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: the run, then every control run that is finished, beside it."""
    mine = feature_scores(run)
    rows = [_row("trained", mine, None)]
    for kind in KINDS:
        control = find_control(run, kind)
        if control is not None:
            rows.append(_row(kind, feature_scores(control), mine))
    return COLUMNS, rows


def status_table(run: Run) -> tuple[list[str], list[list[Any]]]:
    """Every kind with its state, and where it is or what makes it."""
    rows = []
    for kind in KINDS.values():
        state = status(run, kind.name)
        where = command(run, kind.name) if state == "none" else str(control_path(run, kind.name))
        rows.append([kind.name, kind.code, kind.summary, state, where])
    return ["kind", "control", "what differs", "state", "where"], rows


def _row(name: str, scores: FeatureScores, trained: FeatureScores | None) -> list[Any]:
    own = scores.of(scores.is_labelled)
    share, alive = labelled_share(scores)
    low, high = own.interval()
    contextual = (scores.is_alive & scores.is_labelled & ~scores.is_lexical).sum() / max(alive, 1)
    row = [name, alive, _share(share), _number(own.median), f"{low:.3f} to {high:.3f}" if len(own) else "-", len(own)]
    if trained is None:
        return [*row, "", "", _share(float(contextual))]
    if trained.scored_on != scores.scored_on:
        return [*row, "-", f"scored on {scores.scored_on}, not on {trained.scored_on}", _share(float(contextual))]
    gap = median_gap(trained.of(trained.is_labelled), own)
    between = f"{gap.low:+.3f} to {gap.high:+.3f}" if gap.value == gap.value else "-"
    return [*row, f"{gap.value:+.3f}" if gap.value == gap.value else "-", between, _share(float(contextual))]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value == value else "-"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "-"
