"""Which candidate becomes a feature's label: the best on calibration, executable or shorter ones within a margin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .explainers.base import Candidate
from .label_config import LabelConfig
from .predicate_scores import choose_executable
from .progress import OnProgress
from .receipts.examples import Examples
from .receipts.held_out import HeldOut
from .receipts.scorer import Scorer
from .receipts.statistics import auroc
from .split_rows import FeatureRows


@dataclass(frozen=True)
class Choice:
    """A feature's label and what it was chosen by on calibration."""

    candidate: Candidate
    f1: float | None  # of an executable label, over all rows
    auroc: float | None = None  # against matched negatives, where labels in words were in the choice


def choose(
    rows: FeatureRows,
    candidates: Mapping[int, Sequence[Candidate]],
    config: LabelConfig,
    *,
    held_out: HeldOut,
    scorer: Scorer,
    on_progress: OnProgress | None = None,
) -> dict[int, Choice]:
    """The label of every feature that has one; reads calibration alone.

    Executable candidates are sifted over all rows (`choose_executable`): at most one a feature is left. Where there are
    candidates in words, all are scored on the feature's calibration examples against negatives matched on frequency,
    position and length (N1), and the best AUROC is taken: the executable one, or else the shortest, of those within
    `executable_margin`. Words need `min_auroc`.
    """
    executable = choose_executable(rows.calibration, candidates, config, on_progress)
    chosen = {feature: Choice(c.candidate, c.calibration_f1) for feature, c in executable.items()}
    words = {f: [c for c in own if c.predicate is None] for f, own in candidates.items()}
    words = {f: own for f, own in words.items() if own}
    if not words:
        return chosen
    examples = held_out.sample("calibration", sorted(words))
    examples = {f: e for f, e in examples.items() if min(len(e.active), len(e.negatives.get("N1", ()))) >= 2}
    asked = {f: [*([chosen[f].candidate] if f in chosen else []), *words[f]] for f in examples}
    for feature, scored in _aurocs(rows, asked, examples, scorer).items():
        better = _best(scored, config)
        if better is not None:
            candidate, value = better
            f1 = chosen[feature].f1 if candidate.predicate is not None else None
            chosen[feature] = Choice(candidate, f1, value)
    return chosen


def _aurocs(
    rows: FeatureRows, asked: Mapping[int, Sequence[Candidate]], examples: Mapping[int, Examples], scorer: Scorer
) -> dict[int, list[tuple[Candidate, float]]]:
    pairs = [(feature, candidate) for feature, own in asked.items() for candidate in own]
    both = {f: np.concatenate([e.active, e.negatives["N1"]]) for f, e in examples.items()}
    found = scorer.score([c for _, c in pairs], [both[f] for f, _ in pairs], rows.calibration)
    out: dict[int, list[tuple[Candidate, float]]] = {}
    for (feature, candidate), scores in zip(pairs, found, strict=True):
        size = len(examples[feature].active)
        out.setdefault(feature, []).append((candidate, auroc(scores[:size], scores[size:])))
    return out


def _best(scored: Sequence[tuple[Candidate, float]], config: LabelConfig) -> tuple[Candidate, float] | None:
    """None where nothing is good enough: words need `min_auroc`, and an executable label has passed its own bar."""
    good = [(c, value) for c, value in scored if c.predicate is not None or value >= config.min_auroc]
    if not good:
        return None
    bar = max(value for _, value in good) - config.executable_margin
    near = [(c, value) for c, value in good if value >= bar]
    return min(near, key=lambda s: (s[0].predicate is None, len(s[0].label), -s[1], s[0].label))
