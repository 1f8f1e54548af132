"""Which candidate becomes a feature's label: the best on calibration; executable or shorter ones within a margin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

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

#: Active rows, and negatives, for which `min_auroc` is meant.
BAR_EXAMPLES = 40


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
    position and length (N1), and the best AUROC is taken: the executable one, or else the one of fewest words, of those
    within `executable_margin`. Words need `min_auroc`, and more where there are fewer examples or more candidates in
    words: the best of many reaches further by chance alone.
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
        better = _best(scored, _bar(examples[feature], len(words[feature]), config), config)
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


def _bar(examples: Examples, num_words: int, config: LabelConfig) -> float:
    """AUROC that the best of `num_words` candidates needs.

    By chance it is reached as rarely as `min_auroc` is by one candidate with `BAR_EXAMPLES` (Bonferroni), and never
    lower than that.
    """

    def error(p: int, q: int) -> float:  # standard error of AUROC where the two samples do not differ
        return ((p + q + 1) / (12 * p * q)) ** 0.5

    full, own = error(BAR_EXAMPLES, BAR_EXAMPLES), error(len(examples.active), len(examples.negatives["N1"]))
    if config.min_auroc <= 0.5:
        return config.min_auroc
    by_chance = NormalDist().cdf((0.5 - config.min_auroc) / full) / max(num_words, 1)
    return max(config.min_auroc, 0.5 - NormalDist().inv_cdf(max(by_chance, 1e-12)) * own)


def _best(
    scored: Sequence[tuple[Candidate, float]], words_need: float, config: LabelConfig
) -> tuple[Candidate, float] | None:
    """None where nothing is good enough; an executable label has passed its own bar."""
    good = [(c, value) for c, value in scored if c.predicate is not None or value >= words_need]
    if not good:
        return None
    bar = max(value for _, value in good) - config.executable_margin
    near = [(c, value) for c, value in good if value >= bar]
    return min(near, key=lambda s: (s[0].predicate is None, len(s[0].label.split()), -s[1], s[0].label))
