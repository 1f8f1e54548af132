"""What a feature is about, in words that its direction was not read from: what its steering effect is measured on.

The words of a feature are those that train text goes on with where the feature is active: the next tokens of the same
document, against all other tokens, by the log odds with an informative Dirichlet prior of Monroe, Colaresi and Quinn
2008, as z. The strongest ones are dealt out in turn: the 1st, 3rd, 5th ... choose features
and make directions, the 2nd, 4th, 6th ... measure. Tokens of one stem (" Law", " laws") go together, so that what
measures is never what chose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saeql.store.words import stem

from ..output_labels import TokenTexts
from ..split_rows import SplitRows
from .edits import SteerError


class ConceptError(SteerError):
    """Words that a model has no token for, or too few of them."""


@dataclass(frozen=True)
class Concept:
    """Words of one concept in two halves, and the ids of all tokens of each."""

    choosing_words: tuple[str, ...]
    measured_words: tuple[str, ...]
    choosing: tuple[int, ...]
    measured: tuple[int, ...]


class Stems:
    """Which tokens of a model stand for the same word."""

    def __init__(self, texts: TokenTexts):
        self.words = list(texts.words)
        self.stems = stem(self.words)
        names = {s: i for i, s in enumerate(dict.fromkeys(self.stems))}
        #: [V] int64 number of each token's stem, -1 for what no text shows
        self.codes = np.array([names[s] for s in self.stems], np.int64)
        self.codes[~texts.readable] = -1
        self.num = len(names)
        self._numbers = names
        order = np.argsort(self.codes, kind="stable")
        self._order, self._sorted = order, self.codes[order]

    def tokens(self, code: int) -> list[int]:
        """Ids of all tokens of a stem."""
        low, high = np.searchsorted(self._sorted, [code, code + 1])
        return self._order[low:high].tolist()

    def code(self, word: str) -> int:
        """Number of a word's stem, -1 where no token is that word."""
        code = self._numbers.get(stem([word.strip().casefold()])[0], -1)
        return code if code >= 0 and self.tokens(code) else -1

    def concept(self, codes: Sequence[int], words: Sequence[str]) -> Concept:
        """Stems, the strongest first, dealt out in turn."""
        ids = [self.tokens(c) for c in codes]
        return Concept(
            tuple(words[::2]),
            tuple(words[1::2]),
            tuple(i for own in ids[::2] for i in own),
            tuple(i for own in ids[1::2] for i in own),
        )


def concept_of_words(stems: Stems, words: Sequence[str]) -> Concept:
    """A concept of given words; a single one only measures.

    Raises ConceptError where the model has no token for a word.
    """
    codes = dict.fromkeys(stems.code(word) for word in words if word.strip())
    missing = next((word for word in words if word.strip() and stems.code(word) < 0), None)
    if missing is not None:
        raise ConceptError(f"no token of this model is the word {missing!r}: name others with --words")
    if not codes:
        raise ConceptError("--words names no word")
    shown = [next(w.strip() for w in words if w.strip() and stems.code(w) == code) for code in codes]
    if len(codes) == 1:
        return Concept((), tuple(shown), (), tuple(stems.tokens(next(iter(codes)))))
    return stems.concept(list(codes), shown)


def concepts_of_features(
    stems: Stems,
    split: SplitRows,
    token_ids: np.ndarray,
    features: Sequence[int],
    *,
    words: int = 20,
    min_words: int = 6,
    min_z: float = 3.0,
    min_count: int = 5,
    min_documents: int = 2,
) -> dict[int, Concept]:
    """The concepts of features on a split whose windows are `token_ids` [W, T]; none for those with too few words.

    A word counts where it follows the feature at least `min_count` times in at least `min_documents` documents, with z
    of at least `min_z`.
    """
    width = token_ids.shape[1]
    eligible = split.eligible
    codes = np.where(eligible, stems.codes[np.maximum(token_ids.ravel(), 0)], -1)
    counted = codes >= 0
    totals = np.bincount(codes[counted], minlength=stems.num).astype(np.float64)
    common = _texts_of(stems, token_ids, counted)
    starts, found = split.active.starts, {}
    for feature in features:
        rows = split.active.rows[starts[feature] : starts[feature + 1]].astype(np.int64)
        after = _following(rows, split.documents, width)
        after = after[counted[after]]
        if len(after) < min_count:
            continue
        own, counts = np.unique(codes[after], return_counts=True)
        pairs = np.unique(codes[after] * split.num_documents + split.documents[after])
        documents = np.bincount(np.searchsorted(own, pairs // split.num_documents), minlength=len(own))
        z = log_odds_z(counts, totals[own], len(after), totals.sum())
        kept = (z >= min_z) & (counts >= min_count) & (documents >= min_documents)
        order = np.flatnonzero(kept)[np.argsort(-z[kept], kind="stable")][:words]
        if len(order) >= min_words:
            chosen = own[order].tolist()
            found[int(feature)] = stems.concept(chosen, [common[c] for c in chosen])
    return found


def _following(rows: np.ndarray, documents: np.ndarray, width: int) -> np.ndarray:
    """The row after each of `rows` that is in the same window and document."""
    rows = rows[rows % width < width - 1]
    return rows[documents[rows + 1] == documents[rows]] + 1


def log_odds_z(counts: np.ndarray, totals: np.ndarray, num: int, num_all: float, prior: float = 500.0) -> np.ndarray:
    """[n] z of words seen `counts` [n] times among `num` tokens and `totals` [n] times among all `num_all`.

    The prior is `prior` tokens distributed as all are.
    """
    alpha = prior * totals / num_all
    rest, num_rest = totals - counts, num_all - num
    inside = np.log((counts + alpha) / (num + prior - counts - alpha))
    outside = np.log((rest + alpha) / (num_rest + prior - rest - alpha))
    return (inside - outside) / np.sqrt(1 / (counts + alpha) + 1 / (rest + alpha))


def _texts_of(stems: Stems, token_ids: np.ndarray, counted: np.ndarray) -> Mapping[int, str]:
    """The commonest word of every stem in a text."""
    ids, counts = np.unique(token_ids.ravel()[counted], return_counts=True)
    shown: dict[int, str] = {}
    for token in ids[np.argsort(-counts, kind="stable")].tolist():
        shown.setdefault(int(stems.codes[token]), stems.words[token])
    return shown
