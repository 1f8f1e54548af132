"""Steering effects kept: evidence table `steering_effects`, a receipt a feature, and receipts of the dictionary."""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeql.sae.metrics import Estimate
from saeql.store.feature_store import FeatureStore
from saeql.store.records import RECEIPTS, STEERING_EFFECTS

from ..provenance import more_evidence
from ..receipts.receipt import FAILED, PASSED, REPORTED, Receipt, judged, receipts_table
from ..verify import recorded
from .dose_response import KL_BUDGET
from .effect_results import PROMPT, SELF, EffectStudy, MethodEffect, SubjectEffect
from .effect_summary import MAX_OTHERS, MIN_RATIO, MIN_SHARE, MIN_Z, summarise

if TYPE_CHECKING:
    from ..run import Run

TABLE = "steering_effects"
#: Part file of the evidence table `receipts`.
PART = "steering"
CONTROL = "S1 steering effect"
_SHARE = f"{CONTROL} share above random"
#: Fields of the configuration that move shifts and z.
_CONDITIONS = (
    "strengths", "random_directions", "tokens", "window_tokens", "choosing_tokens", "choosing_strength", "candidates",
    "seed",
)  # fmt: skip


@dataclass(frozen=True)
class ChosenEffects:
    """What the features do that were chosen by their output scores; arrays are [n], NaN where it is not known."""

    own_shift: np.ndarray  # nats, at the fixed cost
    diff_mean: np.ndarray  # that of the difference of means
    z: np.ndarray
    conditions: dict[str, Any]
    """What has to be alike where two dictionaries are compared."""


def effect_rows(study: EffectStudy) -> list[dict[str, Any]]:
    """Rows of evidence table `steering_effects`: every feature of a study, method by method."""
    return [row for effect in study.subjects if effect.subject.feature is not None for row in _rows(study, effect)]


def _rows(study: EffectStudy, effect: SubjectEffect) -> list[dict[str, Any]]:
    words = list(effect.subject.concept.measured_words)
    blank: dict[str, Any] = dict.fromkeys(STEERING_EFFECTS.names)
    blank |= {"dictionary": study.dictionary, "feature": effect.subject.feature, "n": study.n, "words": words}
    rows = []
    for method, found in effect.methods.items():
        mine = {**blank, "method": method}
        for p in found.points:
            numbers = {"own_shift": p.own.value, "low": p.own.low, "high": p.own.high, "other_shift": p.others}
            numbers |= {"strength": p.strength, "kl": p.kl, "ce_increase": p.ce, "z": p.z, "wrong_way": p.wrong_way}
            rows.append(mine | numbers | {"at_budget": False})
        rows.append(mine | _at_budget(method, found))
    for method, group in effect.groups.items():
        mine = {**blank, "method": method, "n": study.n}
        for i, strength in enumerate(group.strengths.tolist()):
            numbers = {"own_shift": float(group.mean[i]), "spread": float(group.spread[i]), "kl": float(group.kl[i])}
            rows.append(mine | numbers | {"strength": strength, "at_budget": False})
        if group.at_budget is not None:
            rows.append(mine | {"own_shift": group.at_budget, "kl": KL_BUDGET, "at_budget": True})
    return [{key: _known(value) for key, value in row.items()} for row in rows]


def _at_budget(method: str, found: MethodEffect) -> dict[str, Any]:
    read, texts = found.read, found.texts
    out = {
        "at_budget": True,
        "strength": None if method == PROMPT else read.strength,
        "kl": read.kl,
        "own_shift": read.own.value,
        "low": read.own.low,
        "high": read.own.high,
        "other_shift": read.others.value,
        "ce_increase": read.ce.value,
        "wrong_way": read.wrong_way,
    }
    if read.z is not None:
        out |= {"z": read.z.value, "z_low": read.z.low, "z_high": read.z.high}
    if texts is not None:
        out |= {name: getattr(texts, name) for name in ("perplexity", "distinct_2", "repeat_rate", "hit_rate")}
    return out


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def effect_receipts(study: EffectStudy) -> list[Receipt]:
    """z of every feature at the budget; of features chosen by output score, what is asked of them together."""
    found = [_receipt(study, effect) for effect in study.subjects if effect.subject.feature is not None]
    return found + (_whole(study) if study.is_chosen and len(found) > 1 else [])


def _receipt(study: EffectStudy, effect: SubjectEffect) -> Receipt:
    read = effect.own
    z = read.z
    assert z is not None
    rivals = {m: round(e.read.own.value, 4) for m, e in effect.methods.items()}
    detail = {
        "own_shift": rivals,
        "strength": round(read.strength, 4),
        "kl": round(read.kl, 4),
        "winner": effect.winner,
        "words": list(effect.subject.concept.measured_words),
        "random_directions": study.config.random_directions,
        "card": f"shift {read.own.value:.2f} nats at KL {read.kl:.2g}, most by {effect.winner}",
    }
    return Receipt(
        control=CONTROL, value=z.value, threshold=MIN_Z, n=study.n, low=z.low, high=z.high,
        verdict=PASSED if z.value > MIN_Z else FAILED, feature=effect.subject.feature, detail=detail,
    )  # fmt: skip


def _whole(study: EffectStudy) -> list[Receipt]:
    found = summarise(study)
    detail = {
        "verdict": found.verdict,
        "wins": {m: s.wins for m, s in found.methods.items()},
        "features": [effect.subject.feature for effect in study.subjects],
        "conditions": {
            "features": len(study.subjects),
            "positions": study.n,
            **{name: getattr(study.config, name) for name in _CONDITIONS},
        },
    }

    def one(name: str, estimate: Estimate, threshold: float, *, at_least: bool) -> Receipt:
        return Receipt(
            control=name, value=estimate.value, threshold=threshold, n=estimate.n, low=estimate.low,
            high=estimate.high, verdict=judged(estimate.value, threshold, at_least=at_least), detail=detail,
        )  # fmt: skip

    receipts = [one(_SHARE, found.share_z, MIN_SHARE, at_least=True)]
    if found.ratio is not None:
        receipts.append(one(f"{CONTROL} beside difference of means", found.ratio, MIN_RATIO, at_least=True))
    receipts.append(one(f"{CONTROL} on other concepts", found.others, MAX_OTHERS, at_least=False))
    n = len(study.subjects)
    wins = found.methods[SELF].wins / n
    return [*receipts, Receipt(control=f"{CONTROL} wins", value=wins, verdict=REPORTED, n=n, detail=detail)]


def save_effects(run: "Run", study: EffectStudy) -> bool:
    """Keep a study in place of what was kept of the same features, and bring a built store up to date.

    To be called within `run.locked()`. Returns whether the store holds it.
    """
    rows, evidence = effect_rows(study), run.evidence
    others = ~pc.field("feature").isin(sorted({row["feature"] for row in rows}))
    table = pa.Table.from_pylist(rows, schema=STEERING_EFFECTS)
    found = effect_receipts(study)
    receipts = receipts_table(study.dictionary, found)
    with recorded(run.path, "effect"):
        if evidence.has(TABLE):
            table = pa.concat_tables([evidence.read(TABLE).filter(others), table])
        path = evidence.path("receipts", PART)
        if path.exists():
            kept = others & pc.field("feature").is_valid() if any(r.feature is None for r in found) else others
            receipts = pa.concat_tables([pq.read_table(path, schema=RECEIPTS).filter(kept), receipts])
        evidence.write(TABLE, table)
        evidence.write("receipts", receipts, part=PART)
        is_built = "store" in run.finished()
        if is_built:
            FeatureStore.sync(run.path / "features.duckdb", [evidence, *more_evidence(run.path)])
    return is_built


def chosen_effects(run: "Run") -> ChosenEffects | None:
    """Of the features that were chosen last (`saeql effect RUN --top N`); None before, and where their effects are
    not all there any more.
    """
    if not (run.evidence.has("receipts") and run.evidence.has(TABLE)):
        return None
    mine = pc.field("dictionary") == run.spec.name
    share = run.evidence.read("receipts").filter(mine & (pc.field("control") == _SHARE))
    detail = json.loads(share["detail"][0].as_py()) if len(share) else {}
    if "features" not in detail:
        return None
    rows = run.evidence.read(TABLE).filter(mine & pc.field("at_budget")).to_pylist()
    by_method = {(row["method"], row["feature"]): row for row in rows}
    features = detail["features"]
    if any((SELF, feature) not in by_method for feature in features):
        return None

    def column(method: str, name: str) -> np.ndarray:
        found = [by_method.get((method, feature), {}).get(name) for feature in features]
        return np.array([np.nan if value is None else value for value in found])

    return ChosenEffects(
        column(SELF, "own_shift"), column("diff_mean", "own_shift"), column(SELF, "z"), detail["conditions"]
    )


def remove_effects(run: "Run") -> None:
    """Drop what was kept about a dictionary that is about to be another."""
    run.evidence.path(TABLE).unlink(missing_ok=True)
    run.evidence.path("receipts", PART).unlink(missing_ok=True)
