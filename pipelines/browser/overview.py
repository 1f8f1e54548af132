"""The run at a glance: what the dictionary is worth, what its controls allow to say, how its features are spread."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeql.store.feature_store import FeatureStore

from ..charts import Chart, Series, density_chart, histogram_chart, series_chart
from ..metric_table import MetricLine, paired
from ..receipts.card import CardLine, card_lines
from ..receipts.headline import Headline, headline
from ..shown import number

SWEEP_FILE = Path("sweep") / "sweep.json"
TOKENS_FILE = Path("token_identity") / "token_identity.json"
_FILE_BYTES = 16 << 20


@dataclass(frozen=True)
class Overview:
    """One dictionary of the store, and what the run's folder holds beside it."""

    row: dict[str, Any]  # of the view dictionaries
    metrics: list[MetricLine]
    headline: Headline
    controls: list[CardLine]
    kinds: list[tuple[str, int]]
    num_features: int
    num_dead: int
    density: Chart | None
    quality: Chart | None
    sweep: dict[str, Any] | None
    pareto: Chart | None
    tokens: dict[str, Any] | None
    layers: Chart | None


def overview(store: FeatureStore, name: str, run: Path | None) -> Overview:
    """Ask the store and read the run's sweep and token identity where they are. Raises FeatureNotFound."""
    row = next(r for r in store.dictionaries() if r["dictionary"] == name)
    receipts = store.receipts(None, dictionary=name)
    cards = store.cards(name)
    density, auroc = cards.numbers("density"), cards.numbers("auroc")
    sweep, tokens = (_read(run, file) for file in (SWEEP_FILE, TOKENS_FILE))
    return Overview(
        row=row,
        metrics=paired([m for m in store.metrics(name) if m["split"] == "test"]),
        headline=headline(receipts),
        controls=card_lines(receipts),
        kinds=sorted(cards.kinds().items(), key=lambda kind: -kind[1]),
        num_features=len(density),
        num_dead=int((density <= 0).sum()),
        density=density_chart(density, width=470, height=240),
        quality=_quality(auroc),
        sweep=sweep,
        pareto=None if sweep is None else _pareto(sweep),
        tokens=tokens,
        layers=None if tokens is None else _layers(tokens),
    )


def _quality(auroc: np.ndarray) -> Chart | None:
    known = auroc[np.isfinite(auroc)]
    if len(known) == 0:
        return None
    low = min(0.5, float(np.floor(known.min() * 10) / 10))
    counts, edges = np.histogram(known, 40, (low, 1.0))
    return histogram_chart(counts, edges, "AUROC of the label on test documents", "features")


def _read(run: Path | None, file: Path) -> dict[str, Any] | None:
    """JSON that a command wrote into the run's folder; None where it is not there, or no JSON of that kind."""
    if run is None or not (run / file).is_file() or (run / file).stat().st_size > _FILE_BYTES:
        return None
    try:
        found = json.loads((run / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _pareto(sweep: dict[str, Any]) -> Chart | None:
    """fvu against l0, a curve an architecture, and the front behind."""
    from ..pareto import pareto

    rows = [r for r in sweep.get("dictionaries", []) if r.get("l0", 0) > 0]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["l0"]):
        groups.setdefault(row["architecture"], []).append(row)
    best = {row["dictionary"] for row in pareto(rows)}
    series = [
        Series(
            name,
            [
                (
                    r["l0"],
                    r["fvu"],
                    r.get("fvu_low"),
                    r.get("fvu_high"),
                    f"{r['dictionary']}: l0 {number(r['l0'])}, fvu {number(r['fvu'])}"
                    + (", on the front" if r["dictionary"] in best else ""),
                )
                for r in group
            ],
        )
        for name, group in groups.items()
    ]
    return series_chart(series, "l0, features active on one token (log scale)", "variance unexplained", log2_x=True)


def _layers(tokens: dict[str, Any]) -> Chart | None:
    """Share of test positions whose own, previous and next token is found again, over the residual stream."""
    residual = [p for p in tokens.get("places", []) if p["layer"] is not None and p["hook_point"].startswith("resid")]
    passed = {id(p): p["layer"] + p["hook_point"].startswith("resid_post") for p in residual}
    places = sorted(residual, key=lambda p: passed[id(p)])
    series = [
        Series(
            f"{target} token",
            [
                (
                    passed[id(p)],
                    found["value"],
                    found.get("low"),
                    found.get("high"),
                    f"{p['hook_point']}: {number(found['value'])} of test positions",
                )
                for p in places
                if (found := p["found"].get(target)) is not None
            ],
        )
        for target in ("own", "previous", "next")
    ]
    return series_chart(series, "layers passed", "share of tokens found again")
