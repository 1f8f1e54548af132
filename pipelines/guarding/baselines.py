"""What a guard of features is held against: a list of words, and a dense probe, learned on the same texts.

word list    a text's score is the largest log odds among its words (of those in at least `LEAST_USES` bad texts), so
             that a threshold is a list: every word whose odds are above it
dense probe  logistic regression on a text's mean activation row; its penalty is chosen on calibration
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from ..probing.probes import LogisticRegression, choose
from .reading import ReadTexts

#: Bad texts that a word of the list is in, at least.
LEAST_USES = 3

Scores = dict[str, np.ndarray]  # by part


def word_list(bad: Mapping[str, ReadTexts], good: Mapping[str, ReadTexts]) -> tuple[Scores, Scores]:
    """Scores [n] of bad and of good texts, by part."""
    uses = [Counter(word for words in side["learn"].words for word in words) for side in (bad, good)]
    num = [len(side["learn"].words) for side in (bad, good)]
    odds = {
        word: float(np.log((times + 0.5) / (num[0] + 1)) - np.log((uses[1][word] + 0.5) / (num[1] + 1)))
        for word, times in uses[0].items()
        if times >= LEAST_USES
    }
    lowest = min(odds.values(), default=0.0) - 1

    def scores(side: Mapping[str, ReadTexts]) -> Scores:
        return {
            part: np.array([max((odds.get(w, lowest) for w in words), default=lowest) for words in read.words])
            for part, read in side.items()
        }

    return scores(bad), scores(good)


def dense_probe(bad: Mapping[str, ReadTexts], good: Mapping[str, ReadTexts]) -> tuple[Scores, Scores]:
    """Scores [n] of bad and of good texts, by part."""
    rows = {part: np.concatenate([bad[part].rows, good[part].rows]) for part in ("learn", "calibration")}
    labels = {part: np.arange(len(rows[part])) < len(bad[part].rows) for part in rows}
    probe = LogisticRegression()
    _, fitted = choose(probe, rows["learn"], labels["learn"], rows["calibration"], labels["calibration"])
    bad_scores, good_scores = (
        {part: fitted.log_odds(read.rows) for part, read in side.items()} for side in (bad, good)
    )
    return bad_scores, good_scores
