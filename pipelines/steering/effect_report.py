"""Steering effects for people: tables with the line that says who won, and JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeql.sae.config import ConfigError
from saeql.sae.metrics import Estimate

from ..atomic import write_whole
from ..output import console, note, print_records, visible
from .dose_response import KL_BUDGET
from .effect_figure import FEW, figure
from .effect_results import PROMPT, SELF, EffectStudy, SubjectEffect
from .effect_summary import MAX_OTHERS, MIN_RATIO, MIN_SHARE, MIN_Z, Summary, named, summarise


def study_dict(study: EffectStudy) -> dict[str, Any]:
    """JSON-ready, draws left out; what is not finite is null."""
    summary = summarise(study)
    about = {
        "model": study.model,
        "dictionary": study.dictionary,
        "hook_points": list(study.hook_points),
        "kl_budget": KL_BUDGET,
        "n": study.n,
        "documents": study.num_documents,
        "config": asdict(study.config),
        "chosen_by_output_score": study.is_chosen,
        "left_out": list(study.left_out),
        "verdict": summary.verdict,
        "summary": asdict(summary),
        "plain_texts": study.plain_texts,
    }
    return _plain({**about, "subjects": [_subject_dict(s) for s in study.subjects]})


def _subject_dict(effect: SubjectEffect) -> dict[str, Any]:
    subject, concept = effect.subject, effect.subject.concept
    methods = {}
    for method, found in effect.methods.items():
        read = {key: value for key, value in vars(found.read).items() if key != "draws"}
        methods[method] = {"at_budget": read, "strengths": found.points, "texts": found.texts}
    return {
        "name": subject.name,
        "feature": subject.feature,
        "output_score": subject.score,
        "choosing_words": list(concept.choosing_words),
        "measured_words": list(concept.measured_words),
        "methods": methods,
        "groups": effect.groups,
        "trend": effect.trend,
        "winner": effect.winner,
        "lead_over_best_other": effect.lead,
        "plain_hit_rate": effect.plain_hit_rate,
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def write_study(study: EffectStudy, folder: Path) -> None:
    """`effects.json`, and `effects.png` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "effects.json", json.dumps(study_dict(study), ensure_ascii=False, indent=1) + "\n")
    try:
        write_whole(folder / "effects.png", figure(study))
    except ConfigError as error:
        note(str(error))


# --- tables ----------------------------------------------------------------------------------------------------------


def print_study(study: EffectStudy, folder: Path) -> None:
    """A table a subject where there are few, one of all methods where there are many; then who won."""
    out, summary = console(), summarise(study)
    if len(study.subjects) <= FEW:
        for effect in study.subjects:
            _print_subject(effect)
    else:
        _print_many(study, summary)
    if study.plain_texts is not None:
        plain = study.plain_texts
        out.print(
            f"the model as it is writes with perplexity {plain.perplexity:.3g}, distinct-2 {plain.distinct_2:.2f}, "
            f"repeat rate {plain.repeat_rate:.2f} ({plain.n} texts)"
        )
    out.print(
        f"{study.n} test positions of {study.num_documents} documents; intervals over documents; read where the KL "
        f"divergence is {KL_BUDGET} nats, interpolated; z against {study.config.random_directions} random directions "
        "of the same strength"
    )
    for feature in study.left_out:
        out.print(f"feature {feature} has too few words of its own in train text and was left out")
    out.print(f"verdict: {summary.verdict}", style="bold")
    out.print(f"in {folder}")


def _print_subject(effect: SubjectEffect) -> None:
    out, subject = console(), effect.subject
    score = "" if subject.score is None else f", output score {subject.score:.1f}"
    out.print(f"\n{subject.name}{score}", style="bold", markup=False)
    out.print(f"measured on  {_words(subject.concept.measured_words)}", markup=False)
    out.print(f"chosen by    {_words(subject.concept.choosing_words)}", markup=False)
    doses = [
        [p.strength, p.own.value, _interval(p.own), p.others, p.z, p.kl, p.ce, p.wrong_way]
        for p in effect.methods[SELF].points
    ]
    columns = ["strength", "own shift", "95 %", "other concepts", "z", "KL", "CE rise", "wrong way"]
    print_records(columns, doses, "table", title=f"dose and response of {subject.name}")
    rows = []
    for method, found in sorted(effect.methods.items(), key=lambda item: -item[1].read.own.value):
        read, texts = found.read, found.texts
        wrote = [texts.perplexity, texts.distinct_2, texts.repeat_rate, texts.hit_rate] if texts else [None] * 4
        z = None if read.z is None else read.z.value
        rows.append(
            [named(method), _finite(read.strength), read.own.value, _interval(read.own), _finite(read.others.value), z,
             _cost(method, read.kl, read.reached), read.ce.value, read.wrong_way, *wrote]
        )  # fmt: skip
    for method, group in effect.groups.items():
        shown = "never" if group.at_budget is None else f"{KL_BUDGET}"
        rows.append([f"{group.n} {named(method)}", None, group.at_budget, "", None, None, shown, *[None] * 6])
    columns = ["method", "strength", "own shift", "95 %", "others", "z", "KL", "CE rise", "wrong way"]
    columns += ["perplexity", "distinct-2", "repeats", "hits"]
    print_records(columns, rows, "table", title=f"at KL {KL_BUDGET}")
    line = effect.trend
    if line.spearman is not None:
        down = "" if line.sign_p is None else (
            f"; the most negative strength lowers it on {line.num_down} of {line.num_documents} documents "
            f"(p {line.sign_p:.2g})"
        )  # fmt: skip
        out.print(f"Spearman of strength and shift {line.spearman:.2f}{down}")
    area = effect.own.area
    out.print(f"area under the shift to KL 0.5: {'never reached' if area is None else f'{area:.3f}'}")
    out.print(
        f"lead over the best other method: {effect.lead.value:+.2f} nats {_interval(effect.lead)}; "
        f"the model as it is has a measured word in {_percent(effect.plain_hit_rate)} of its texts"
    )


def _print_many(study: EffectStudy, summary: Summary) -> None:
    columns = [
        "feature",
        "score",
        "strength",
        "own shift",
        "95 %",
        "z",
        "diff. of means",
        "unembedding",
        "prompt",
        "winner",
    ]
    rows = []
    for effect in study.subjects:
        read = effect.own
        shifts = [
            effect.methods[m].read.own.value if m in effect.methods else None
            for m in ("diff_mean", "unembedding", PROMPT)
        ]
        z = None if read.z is None else read.z.value
        own = [read.strength, read.own.value, _interval(read.own), z]
        rows.append([effect.subject.feature, effect.subject.score, *own, *shifts, named(effect.winner)])
    print_records(columns, rows, "table", title=f"own shift in nats at KL {KL_BUDGET}")
    lines = [
        [named(m), s.own.value, _interval(s.own), s.others, None if s.share_z is None else s.share_z.value,
         f"{s.reached}/{s.n}", s.wins, s.kl, s.perplexity, s.distinct_2, s.repeat_rate, s.hit_rate]
        for m, s in summary.methods.items()
    ]  # fmt: skip
    columns = ["method", "median shift", "95 %", "others / own", f"z > {MIN_Z:g}", "at budget", "wins", "KL"]
    columns += ["perplexity", "distinct-2", "repeats", "hits"]
    print_records(columns, lines, "table", title=f"\n{len(study.subjects)} concepts")
    out = console()
    out.print("\na prompt is read at the KL that it has, and wins only within the budget")
    out.print(f"z above {MIN_Z:g}: {_estimate(summary.share_z)} of features (asked {MIN_SHARE:g})")
    if summary.ratio is not None:
        out.print(f"own shift beside difference of means: {_estimate(summary.ratio)} (asked {MIN_RATIO:g})")
    out.print(f"other concepts' shift beside the own: {_estimate(summary.others)} (asked at most {MAX_OTHERS:g})")


def _cost(method: str, kl: float, reached: bool) -> str:
    if method == PROMPT or reached:
        return f"{kl:.3g}"
    return f"{kl:.3g}, never {KL_BUDGET}"


def _words(words: Sequence[str]) -> str:
    return ", ".join(visible(w) for w in words) or "(nothing)"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None or estimate.high is None else f"{estimate.low:.2f} to {estimate.high:.2f}"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({_interval(estimate)}, n {estimate.n})"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"
