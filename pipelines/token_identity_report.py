"""Token identity of a run over the layers of its model: measured, printed, kept as JSON and as a curve."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saeql.sae.config import ConfigError

from .atomic import write_whole
from .output import console, note, print_records
from .pages import new_figure, png
from .progress import progress
from .receipts.receipt import PASSED
from .receipts.token_identity_control import CARD, identity_receipt, masked_receipts, measure_masked
from .split_rows import read_feature_rows
from .token_identity import TARGETS, TokenIdentity, TokensConfig, hook_points_of, residual_layers, token_identity

if TYPE_CHECKING:
    from .masked_token import MaskedEffect
    from .run import Run


@dataclass(frozen=True)
class TokenReport:
    """What `saeql tokens` found."""

    identity: TokenIdentity
    reads: tuple[str, ...]  # hook points of the dictionary
    effects: "dict[int, MaskedEffect]"  # of the features whose own token was masked
    config: TokensConfig

    @property
    def allowed(self) -> dict[int, bool]:
        """Features with a masked-token test: whether a single token may be highlighted."""
        at = identity_receipt(self.identity, self.reads, self.config).value
        return {
            r.feature: r.verdict == PASSED
            for r in masked_receipts(self.effects, at, self.config)
            if r.feature is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: identity by hook point, and Delta by feature."""
        allowed = self.allowed
        masked = [
            {
                "feature": feature,
                "delta": float(effect.own.mean()),
                "delta_other_token": _mean(effect.other),
                "n": len(effect.own),
                "card": None if allowed[feature] else CARD,
            }
            for feature, effect in self.effects.items()
        ]
        return {**self.identity.to_dict(), "reads": list(self.reads), "masked_token": masked}


def layer_numbers(text: str) -> list[int]:
    """Layers of "0,5,10-15". Raises ConfigError where it does not read so."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(f"--layers {text!r}: write numbers and ranges such as 0,5,10-15")
        found += range(int(first), int(last if dash else first) + 1)
    return list(dict.fromkeys(found))


def measure(run: "Run", config: TokensConfig, layers: Sequence[int] | None = None) -> TokenReport:
    """id at the residual stream of the layers and at the dictionary's hook points; Delta where activations are indexed.

    Raises HookPointError for a model whose layers are not known, ModelError for a layer that there is not.
    """
    reads = run.spec.reads
    lm = run.language_model
    with progress("tokens", None, "tok") as advance:
        places = [*hook_points_of(lm, layers), *reads]
        identity = token_identity(lm, run.evidence, places, config, advance.to)
    if config.features == 0:
        return TokenReport(identity, reads, {}, config)
    if not run.evidence.has("activations"):
        note(f"no masked-token test: `saeql index {run.path}` finds where features are active")
        return TokenReport(identity, reads, {}, config)
    rows = read_feature_rows(run.evidence, run.spec.name, active_fraction=run.config.label.active_fraction)
    active = np.flatnonzero(rows.test.active.counts > 0).tolist()
    with progress("mask", None, "seq") as advance:
        effects = measure_masked(run, active, rows.test, config, advance.to)
    return TokenReport(identity, reads, effects, config)


def write_tokens(report: TokenReport, folder: Path) -> None:
    """`token_identity.json`, and `token_identity.png` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "token_identity.json", json.dumps(report.to_dict(), ensure_ascii=False, indent=1) + "\n")
    try:
        write_whole(folder / "token_identity.png", _curve(report))
    except ConfigError as error:
        note(str(error))


def print_tokens(report: TokenReport, folder: Path) -> None:
    """A row a hook point with intervals, and what the masked-token test says of the features."""
    rows = [
        [
            place.hook_point + (" *" if place.hook_point in report.reads else ""),
            *(place.found[t].value for t in TARGETS),
            _interval(place.own.low, place.own.high),
        ]
        for place in report.identity.places
    ]
    found = report.identity
    print_records(
        ["hook point", *(f"{t} token" for t in TARGETS), "95 % of own"],
        rows,
        "table",
        title=f"tokens found again in {found.model_name}: share of {found.num_test_rows} test positions "
        f"(* read by the dictionary)",
    )
    out = console()
    out.print(
        f"\nridge to the token embedding, fitted on {found.num_train_rows} train positions; nearest of "
        f"{found.num_types} token types; the commonest token alone gives {found.commonest:.3f}"
    )
    if report.effects:
        own = np.array([e.own.mean() for e in report.effects.values()])
        other = np.array([m for e in report.effects.values() if (m := _mean(e.other)) is not None])
        allowed = report.allowed
        out.print(
            f"masking the own token costs {np.median(own):.2f} of the activation (median of {len(own)} features), "
            f"masking another one {np.median(other) if len(other) else float('nan'):.2f}; "
            f"{np.mean(own >= report.config.min_delta):.0%} of features lose at least {report.config.min_delta:g}"
        )
        out.print(f"a single token may be highlighted for {sum(allowed.values())} of {len(allowed)} features")
    out.print(f"in {folder}")


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _curve(report: TokenReport) -> bytes:
    """PNG: share of test positions whose token is found, over the layers passed, with intervals."""
    figure = new_figure(7, 3.6, of="command")
    axis = figure.subplots()
    curve = sorted(residual_layers(report.identity), key=lambda item: item[0])
    depth = [d for d, _ in curve]
    for target in TARGETS:
        found = [place.found[target] for _, place in curve]
        values = [e.value for e in found]
        lines = axis.plot(depth, values, marker="o", markersize=3, label=f"{target} token")
        low = [e.value if e.low is None else e.low for e in found]
        high = [e.value if e.high is None else e.high for e in found]
        axis.fill_between(depth, low, high, alpha=0.2, color=lines[0].get_color(), linewidth=0)
    axis.axhline(report.config.min_identity, color="0.6", linestyle=":", label="a token may be named")
    axis.axhline(report.identity.commonest, color="0.8", linestyle="--", label="the commonest token")
    axis.set(xlabel="layers passed", ylabel="share of test positions", ylim=(0, 1.02))
    return png(figure)
