"""Learning a guard: which features, at which thresholds, and what it catches beside what simpler guards catch.

learn        candidates by the AUROC of their largest value; each gets the threshold that keeps the rate by itself, and
             one after the other joins that then catches most of the bad texts that those before have missed
calibration  one factor on all thresholds, so that good texts fire no more often than asked; of all numbers of
             features and windows the setting that then catches most bad texts
test         the rates, for the first time

A text fires where any feature does, at any token.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import vstack

from ..probing.probes import column_auroc
from ..receipts.statistics import paired_interval
from .baselines import dense_probe, word_list
from .guard import Guard, GuardError, Watched, rows_sha256
from .rates import Rate, least_texts, level_for
from .reading import ReadTexts, read
from .texts import PARTS, LabelledTexts, read_texts

if TYPE_CHECKING:
    from ..run import Run

#: What is tried on calibration unless it is said.
WINDOWS = (1, 8, 32)
#: Features, largest AUROC first, among which those that complement each other are looked for.
CANDIDATES = 256
NUMBERS = (1, 2, 4, 8, 16)
#: Bad texts of the learning part that a feature is active on, at least.
LEAST_ACTIVE = 3
#: The factor on thresholds is never below: a feature that is silent on all good texts keeps a threshold.
LEAST_FACTOR = 0.5
_DRAWS = 2000


@dataclass(frozen=True)
class GuardOptions:
    """How a guard is learned."""

    false_positives: float = 0.01
    """Share of good texts on which it may fire."""
    features: tuple[int, ...] = ()
    """Watch exactly these; empty: chosen by AUROC."""
    windows: tuple[int, ...] = WINDOWS
    numbers: tuple[int, ...] = NUMBERS
    max_tokens: int = 256
    text_column: str = "text"

    def check(self) -> None:
        """Raises GuardError naming the option that does not hold."""
        if not 0 < self.false_positives <= 0.5:
            raise GuardError(f"a false-positive rate is above 0 and at most 0.5, not {self.false_positives:g}")
        for name, values in (("window", self.windows), ("max_tokens", (self.max_tokens,)), ("number", self.numbers)):
            if not values or min(values) < 1:
                raise GuardError(f"{name} must be at least 1, not {min(values, default=0)}")


@dataclass(frozen=True)
class _Setting:
    """Features at thresholds, over one window."""

    window: int
    features: np.ndarray  # [k]
    aurocs: np.ndarray  # [k]
    thresholds: np.ndarray  # [k]
    caught: float  # share of bad calibration texts

    def scores(self, texts: ReadTexts) -> np.ndarray:
        """[n] the largest value of any feature in multiples of its threshold: a text fires above 1."""
        return _relative(texts, self.window, self.features, self.thresholds)


def learn_guard(
    run: "Run", bad: Path, good: Path, options: GuardOptions, advance: Callable[[int], object] = lambda _: None
) -> Guard:
    """A guard of a run's dictionary. Raises GuardError; ModelMismatch where model and dictionary do not fit."""
    options.check()
    texts = read_texts(bad, good, text_column=options.text_column)
    lm, dictionary = run.language_model, run.dictionary().to(run.language_model.device)
    run.harvest_info.identity.require(lm.identity)
    outside = next((f for f in options.features if not 0 <= f < dictionary.d_sae), None)
    if outside is not None:
        raise GuardError(f"no feature {outside}: this dictionary has features 0 to {dictionary.d_sae - 1}")

    def read_side(side: Mapping[str, list[str]]) -> dict[str, ReadTexts]:
        how = {"windows": options.windows, "max_tokens": options.max_tokens, "advance": advance}
        return {part: read(lm, dictionary, run.spec.reads, side[part], **how) for part in PARTS}

    bad_read, good_read = read_side(texts.bad), read_side(texts.good)
    setting = choose_setting(bad_read, good_read, options)
    found = scored(setting, bad_read, good_read, options)
    found |= {"texts": _counts(texts), "max_tokens": options.max_tokens}
    with run.store() as store:
        labels = [str(store.feature(int(f))["label"]) for f in setting.features]
    columns = (setting.features.tolist(), labels, setting.thresholds.tolist(), setting.aurocs.tolist())
    watched = tuple(Watched(*values) for values in zip(*columns, strict=True))
    return Guard(
        watched,
        setting.window,
        lm.identity.model_name,
        lm.identity.model_sha256,
        run.spec.name,
        rows_sha256(dictionary, [w.feature for w in watched]),
        found,
    )


def choose_setting(bad: Mapping[str, ReadTexts], good: Mapping[str, ReadTexts], options: GuardOptions) -> _Setting:
    """The setting that catches most bad calibration texts; of equals the one with fewest features, then tokens.

    Raises GuardError where no feature is active on the bad texts, or those named are active on none.
    """
    found = []
    for window in options.windows:
        features, aurocs, units = _ranked(bad["learn"], good["learn"], window, options)
        numbers = (len(features),) if options.features else options.numbers
        for k in sorted({min(k, len(features)) for k in numbers} - {0}):
            score = [_relative(side["calibration"], window, features[:k], units[:k]) for side in (bad, good)]
            factor = max(level_for(score[1], options.false_positives), LEAST_FACTOR)
            caught = float((score[0] > factor).mean())
            found.append(_Setting(window, features[:k], aurocs[:k], units[:k] * factor, caught))
    if not found:
        raise GuardError(
            f"no feature is active on {LEAST_ACTIVE} of the bad texts and more on bad than on good ones: "
            "the dictionary does not tell them apart"
        )
    return min(found, key=lambda s: (-s.caught, len(s.features), s.window))


def scored(
    setting: _Setting, bad: Mapping[str, ReadTexts], good: Mapping[str, ReadTexts], options: GuardOptions
) -> dict[str, Any]:
    """Rates on test texts, of the guard and of the baselines at their own thresholds for the same rate."""
    fired = {"features": tuple(setting.scores(side["test"]) > 1 for side in (bad, good))}
    for name, learned in (("word list", word_list), ("dense probe", dense_probe)):
        bad_scores, good_scores = learned(bad, good)
        level = level_for(good_scores["calibration"], options.false_positives)
        fired[name] = (bad_scores["test"] > level, good_scores["test"] > level)
    found: dict[str, Any] = {"asked": options.false_positives, "rates": {}, "against": {}}
    for name, (caught, alarms) in fired.items():
        found["rates"][name] = {"caught": asdict(Rate.of(caught)), "false_positives": asdict(Rate.of(alarms))}
        if name != "features":
            mine = fired["features"][0].astype(float)
            low, high = paired_interval(mine, caught.astype(float), draws=_DRAWS, seed=0)
            difference = float(mine.mean() - caught.mean())
            found["against"][name] = {"difference": difference, "low": low, "high": high}
    below = found["rates"]["features"]["false_positives"]["below"]
    found["certified"] = below <= options.false_positives
    found["least_texts"] = least_texts(options.false_positives)
    return found


def _ranked(
    bad: ReadTexts, good: ReadTexts, window: int, options: GuardOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features in the order in which they join, their AUROC, and their thresholds; those named as they are."""
    y = np.arange(len(bad.words) + len(good.words)) < len(bad.words)
    aurocs = column_auroc(vstack([bad.largest[window], good.largest[window]]), y)
    active = bad.largest[window].getnnz(axis=0)
    if options.features:
        silent = [f for f in options.features if active[f] == 0]
        if silent:
            raise GuardError(f"feature {silent[0]} is active on no bad text of the learning part: it cannot guard")
        candidates = np.array(options.features)
    else:
        eligible = np.flatnonzero((active >= LEAST_ACTIVE) & (aurocs > 0.5))
        candidates = eligible[np.argsort(-aurocs[eligible], kind="stable")][:CANDIDATES]
    on_bad, on_good = (side.largest[window][:, candidates].toarray() for side in (bad, good))
    levels = np.array([_level(*pair, options.false_positives) for pair in zip(on_bad.T, on_good.T, strict=True)])
    order = np.arange(len(candidates))
    if not options.features:
        order = _joining(on_bad > levels, aurocs[candidates])
    return candidates[order], aurocs[candidates[order]], levels[order]


def _level(bad: np.ndarray, good: np.ndarray, rate: float) -> float:
    """The threshold of one feature that keeps the rate on these good texts; at least half its smallest bad value, so
    that a feature which is silent on all good texts has one above 0.
    """
    return max(level_for(good, rate), float(bad[bad > 0].min(initial=np.inf)) / 2) if bad.any() else 1.0


def _joining(caught: np.ndarray, aurocs: np.ndarray) -> np.ndarray:
    """Columns of caught [n, c] bool one after the other, each the one that adds most; the larger AUROC among equals.

    Ends at the largest number that is tried, or where nothing is added.
    """
    order: list[int] = []
    missed = np.ones(len(caught), bool)
    while len(order) < max(NUMBERS):
        added = caught[missed].sum(0)
        best = int(np.lexsort((-aurocs, -added))[0]) if len(added) else -1
        if best < 0 or added[best] == 0:
            break
        order.append(best)
        missed &= ~caught[:, best]
    return np.array(order, int)


def _relative(texts: ReadTexts, window: int, features: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    values = texts.largest[window][:, features].toarray()
    return (values / thresholds).max(1)


def _counts(texts: LabelledTexts) -> dict[str, dict[str, int]]:
    return {part: {"bad": len(texts.bad[part]), "good": len(texts.good[part])} for part in PARTS}
