"""What a guard shows on a terminal: its features and rates, the texts that it watched."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..output import note, print_records, visible
from .guard import Guard

if TYPE_CHECKING:  # which needs torch
    from .watch import GuardedText

_NAMES = {"features": "these features", "word list": "word list", "dense probe": "dense probe"}


def print_guard(guard: Guard, *, as_json: bool) -> None:
    """Print the features with their thresholds, then what they catch beside the baselines."""
    if as_json:
        print(json.dumps(asdict(guard), ensure_ascii=False))
        return
    rows = [[w.feature, w.threshold, w.auroc, w.label] for w in guard.features]
    print_records(["feature", "fires above", "AUROC", "label"], rows, "table")
    over = "at one token" if guard.window == 1 else f"as a mean over {guard.window} tokens"
    print(f"a text fires where one of them is above its threshold {over}\n")
    columns = ["on test texts", "caught", "n", "95 %", "false positives", "n", "95 %"]
    rates = guard.found["rates"]
    print_records(columns, [[_NAMES[name], *_rate(rates[name])] for name in _NAMES], "table")
    for line in verdicts(guard.found):
        note(line)


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """What the rates allow to say, in sentences."""
    lines = []
    asked, rate = found["asked"], found["rates"]["features"]["false_positives"]
    if found["certified"]:
        lines.append(f"at most {rate['below']:.2%} false positives with 95 % certainty: {asked:.2%} is kept")
    else:
        lines.append(
            f"a false-positive rate of {asked:.2%} is not certified: {rate['hits']} of {rate['n']} good test texts say "
            f"at most {rate['below']:.2%} with 95 % certainty; it takes {found['least_texts']} without one"
        )
    for name, gap in found["against"].items():
        apart = gap["low"] > 0 or gap["high"] < 0
        who = "these features catch more" if gap["difference"] > 0 else f"the {name} catches more"
        outcome = who if apart else "no difference that the texts show"
        interval = f"{gap['low']:+.1%} to {gap['high']:+.1%}"
        lines.append(f"against the {name}: {gap['difference']:+.1%} of bad texts ({interval}), {outcome}")
    return lines


def print_guarded(texts: "Sequence[GuardedText]", action: str, *, as_json: bool, streamed: bool = False) -> None:
    """Print continuations with what fired in each."""
    if as_json:
        print(json.dumps({"action": action, "texts": [asdict(text) for text in texts]}, ensure_ascii=False))
        return
    for text in texts:
        if not streamed:
            print(f"{text.prompt}{text.text}")
        rows = [
            [
                e.position,
                visible(e.token),
                "written" if e.generated else "prompt",
                e.feature,
                e.value,
                e.threshold,
                e.label,
            ]
            for e in text.events
        ]
        print_records(["position", "token", "in", "feature", "value", "fires above", "label"], rows, "table")
        if text.stopped:
            note(f"stopped at position {text.events[-1].position}")


def _rate(found: Mapping[str, Mapping[str, float]]) -> list[Any]:
    cells: list[Any] = []
    for which in ("caught", "false_positives"):
        rate = found[which]
        cells += [f"{rate['value']:.1%}", int(rate["n"]), f"{rate['low']:.1%} to {rate['high']:.1%}"]
    return cells
