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
from .receipts.thresholds import THRESHOLDS
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
    within `executable_margin`. Where the feature is silent on enough rows of its own tokens (N2) it is the mean of both
    AUROCs: naming the token is not enough there. Words need `min_auroc` against N1, and more
    where there are fewer examples or more candidates in words: the best of many reaches further by chance alone.
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
    for feature, scored in _scored(rows, asked, examples, scorer).items():
        better = _best(scored, _bar(examples[feature], len(words[feature]), config), config)
        if better is not None:
            f1 = chosen[feature].f1 if better.candidate.predicate is not None else None
            chosen[feature] = Choice(better.candidate, f1, better.matched)
    return chosen


@dataclass(frozen=True)
class _Scored:
    candidate: Candidate
    matched: float  # AUROC against N1
    auroc: float  # what it is chosen by


def _scored(
    rows: FeatureRows, asked: Mapping[int, Sequence[Candidate]], examples: Mapping[int, Examples], scorer: Scorer
) -> dict[int, list[_Scored]]:
    pairs = [(feature, candidate) for feature, own in asked.items() for candidate in own]
    tokens = rows.calibration.windows.tokens.ravel()
    same = {f: e.negatives.get("N2", e.active[:0]) for f, e in examples.items()}
    same = {f: n if len(n) >= THRESHOLDS.contextual_negatives else n[:0] for f, n in same.items()}
    all_rows = {f: np.concatenate([e.active, e.negatives["N1"], same[f]]) for f, e in examples.items()}
    found = scorer.score([c for _, c in pairs], [all_rows[f] for f, _ in pairs], rows.calibration)
    out: dict[int, list[_Scored]] = {}
    for (feature, candidate), scores in zip(pairs, found, strict=True):
        own = examples[feature]
        active, matched, silent = np.split(scores, np.cumsum([len(own.active), len(own.negatives["N1"])]))
        value = against_matched = auroc(active, matched)
        if len(silent):
            value = (value + auroc(active, silent, tokens[own.active][:, None] == tokens[same[feature]])) / 2
        out.setdefault(feature, []).append(_Scored(candidate, against_matched, value))
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


def _best(scored: Sequence[_Scored], words_need: float, config: LabelConfig) -> _Scored | None:
    """None where nothing is good enough; an executable label has passed its own bar."""
    good = [s for s in scored if s.candidate.predicate is not None or s.matched >= words_need]
    if not good:
        return None
    bar = max(s.auroc for s in good) - config.executable_margin
    near = [s for s in good if s.auroc >= bar]

    def order(s: _Scored) -> tuple[bool, int, float, str]:
        label = s.candidate.label
        return s.candidate.predicate is None, len(label.split()), -s.auroc, label

    return min(near, key=order)
