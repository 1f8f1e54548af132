"""evaluation.html: on one page what a dictionary is worth, and how far its controls let a reader trust its labels."""

import base64
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saeql.sae.config import ConfigError
from saeql.store.evidence import Evidence

from .atomic import write_whole
from .metric_table import paired
from .pages import new_figure, png, render
from .receipts.card import text_of
from .receipts.examples import RUNGS
from .receipts.headline import Headline, headline

if TYPE_CHECKING:
    from .run import Run

EVALUATION_FILE = "evaluation.html"
_LADDER = {rung: f"C4 negative ladder {rung}" for rung in RUNGS}


def run_headline(evidence: Evidence) -> Headline:
    """What may be said of the labels in an evidence folder."""
    return headline(_receipts(evidence))


def write_evaluation(run: "Run") -> Path:
    """Write the page from the evidence tables `metrics`, `labels` and `receipts`, as far as they are there."""
    evidence = run.evidence
    receipts = _receipts(evidence)
    labels = evidence.read("labels").to_pylist() if evidence.has("labels") else []
    kinds = Counter(row["kind"] for row in labels)
    path = run.path / EVALUATION_FILE
    page = render(
        "evaluation.html",
        title=f"{run.spec.name} at {' + '.join(run.spec.reads)}",
        model=run.harvest_info.identity.model_name,
        headline=headline(receipts),
        metrics=paired(evidence.read("metrics").to_pylist()),
        kinds=kinds.most_common(),
        num_features=len(labels),
        controls=[
            {"control": r["control"], "text": text_of(r), "verdict": r["verdict"]}
            for r in receipts
            if r["feature"] is None
        ],
        failures=_failures(receipts),
        plot=_plot(receipts),
    )
    write_whole(path, page)
    return path


def _receipts(evidence: Evidence) -> list[dict[str, Any]]:
    return evidence.read("receipts").to_pylist() if evidence.has("receipts") else []


def _failures(receipts: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Controls that are asked of features, with how many features were asked and how many failed."""
    asked: dict[str, list[bool]] = {}
    for row in receipts:
        if row["feature"] is not None and row["verdict"] != "reported":
            asked.setdefault(row["control"], []).append(row["verdict"] == "failed")
    return [(control, len(found), sum(found)) for control, found in sorted(asked.items())]


def _plot(receipts: list[dict[str, Any]]) -> str:
    """AUROC of labels on every rung of the ladder, as a PNG in base64; "" without labels or matplotlib."""
    values = {
        rung: np.array([r["value"] for r in receipts if r["control"] == name and r["value"] is not None])
        for rung, name in _LADDER.items()
    }
    values = {rung: found for rung, found in values.items() if len(found)}
    if not values:
        return ""
    try:
        figure = new_figure(7, 3, of="evaluation")
    except ConfigError:
        return ""
    axes = figure.subplots()
    for rung, found in values.items():
        axes.hist(found, bins=np.linspace(0, 1, 41).tolist(), histtype="step", label=f"{rung} (n {len(found)})")
    axes.axvline(0.5, color="grey", linewidth=0.8)
    axes.set_xlabel("AUROC of a feature's label on test documents")
    axes.set_ylabel("features")
    return base64.b64encode(png(figure)).decode()
