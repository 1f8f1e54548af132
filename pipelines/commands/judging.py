"""The command that looks at a judge and at labels through it."""

import dataclasses
import json as json_module
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .common import Overrides, RunPath, open_with

if TYPE_CHECKING:
    from ..judging import Estimate, JudgedLabel


def judge(
    run: RunPath,
    *overrides: Overrides,
    features: Annotated[
        list[int] | None, Parameter(help="Features to look at; unset: a sample of those with a label.", negative="")
    ] = None,
    sample: Annotated[int, Parameter(help="Without --features: how many.")] = 20,
    scorers: Annotated[
        list[str] | None,
        Parameter(help="detection, fuzzing, simulation, surprisal, or any other scorer of labels.", negative=""),
    ] = None,
    explainers: Annotated[
        list[str] | None,
        Parameter(help="Also word labels with word_list, max_activation, contrastive, and score them.", negative=""),
    ] = None,
    estimate: Annotated[
        bool, Parameter(help="Only say what the judge can do and what this would cost.", negative="")
    ] = False,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> None:
    """Score labels with a language model (an OpenAI-compatible endpoint or a local one); the run stays as it is.

    Keys of [judge] and [label] can be set as --judge.key value. What was answered is never asked or paid for twice.

    Example: saeql judge runs/demo --judge.base_url http://127.0.0.1:8080/v1 --scorers fuzzing --estimate
    """
    from ..judging import Judging
    from ..language_models.choose import judge_of
    from ..progress import progress

    opened = open_with(run, overrides, ("judge", "label"))
    judging = Judging(
        opened,
        scorers=scorers if scorers is not None else ["detection", "fuzzing"],
        explainers=explainers or (),
        features=features or (),
        sample=sample,
    )
    if estimate:
        return _print_estimate(judging.estimate(), as_json=json)
    with progress("judge", None, "questions") as advance:
        judged = judging.judge(advance.to)
    _print_labels(judged, [scorer.name for scorer in judging.scorers], as_json=json)
    if opened.config.judge.is_set:
        print(f"saeql: {judge_of(opened).spent}", file=sys.stderr)


def _print_estimate(found: "Estimate", *, as_json: bool) -> None:
    if as_json:
        print(json_module.dumps(dataclasses.asdict(found)))
        return
    can = found.capabilities
    print(f"judge      {found.judge}")
    print(f"can        probabilities: {_yes(can.chances)}, JSON schema: {_yes(can.schema)}")
    print(f"questions  {found.questions:,}, of which {found.known:,} are answered already")
    print(f"tokens     about {found.prompt_tokens:,} in ({found.counted}), at most {found.completion_tokens:,} out")
    if found.price is not None:
        print(f"cost       about {found.price:,.2f} (judge.price_per_million_in and _out)")
    if found.cap is not None:
        than = "less than it may take: raise it" if found.passes_cap else "enough"
        print(f"cap        judge.max_total_tokens = {found.cap:,}, {than}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _print_labels(judged: "list[JudgedLabel]", scorers: list[str], *, as_json: bool) -> None:
    from ..output import print_records

    if as_json:
        print(json_module.dumps([_plain(item) for item in judged], ensure_ascii=False))
        return
    columns = ["feature", "label", "by", *scorers, "failed"]
    rows = []
    for item in judged:
        scores = [item.scores.get(name) for name in scorers]
        texts = [f"{s.auroc:.2f} [{s.low:.2f}, {s.high:.2f}]{_correlation(s)}" if s else None for s in scores]
        failed = sum(s.failed for s in scores if s)
        rows.append([item.feature, item.candidate.label, item.candidate.explainer, *texts, failed])
    print_records(columns, rows, "table", title="AUROC on test rows against matched inactive ones (N1), 95 % interval")


def _correlation(score: Any) -> str:
    return "" if score.correlation is None else f" r {score.correlation:.2f}"


def _plain(item: "JudgedLabel") -> dict[str, Any]:
    scores = {name: dataclasses.asdict(score) for name, score in item.scores.items()}
    for score in scores.values():
        for key, value in score.items():
            if isinstance(value, float) and not math.isfinite(value):
                score[key] = None
    return {
        "feature": item.feature,
        "label": item.candidate.label,
        "explainer": item.candidate.explainer,
        "scores": scores,
    }
