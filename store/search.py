"""Ways to find features of one dictionary, each as (feature, score, why): by words, by a token, by a token's logit.

`describe` makes hits of them, and of whatever else scores features: activations on a prompt, cosines of directions.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cards import Cards
from .errors import StoreError
from .token_features import MAX_FEATURES
from .words import WORDS_OF, stem

Ask = Callable[..., list[dict[str, Any]]]
Columns = Callable[..., dict[str, np.ndarray]]  # of a query without nulls, for many rows
Why = dict[str, list[str]]  # what -> the words, tokens or numbers of it


@dataclass(frozen=True)
class SearchHit:
    """A feature that a search found; larger scores are better, comparable within one search only."""

    dictionary: str
    feature: int
    score: float
    label: str
    kind: str
    auroc: float | None
    density: float
    matched: Why  # why it was found; of words: field ('label', 'activates', 'promotes') -> words found in it


@dataclass(frozen=True)
class Scored:
    """A feature with its score, before anything else of it was read."""

    feature: int
    score: float
    matched: Why


@dataclass(frozen=True)
class Scope:
    """The dictionary that is searched; its activations on its first corpus, -1 where there are none.

    `num_segments` are the corpora that it has activations on, `vocabulary_id` is its tokenizer; `num_activations`
    tells how often features fire on the first of them, [F] int64.
    """

    dictionary: str
    dictionary_id: int
    segment_id: int
    num_segments: int
    vocabulary_id: int
    num_activations: Callable[[], np.ndarray]


@dataclass(frozen=True)
class WordScores:
    """Features that words find, best first, before it is read which words: `terms` are their numbers in the index."""

    features: np.ndarray  # [N] int
    scores: np.ndarray  # [N] float
    terms: str


def word_scores(ask: Ask, columns: Columns, scope: Scope, text: str, limit: int | None = None) -> WordScores:
    """BM25 over labels, tokens that activate and tokens that are promoted. Raises StoreError where there is no word."""
    words = _words(ask, text)
    if not words:
        raise StoreError(f"nothing to search for in {text!r}: give at least one word")
    terms = ask(
        f"SELECT term_id FROM derived.search_terms WHERE dictionary_id = {scope.dictionary_id} "
        "AND list_contains($terms, term)",
        {"terms": sorted(set(stem(words)))},
    )
    numbers = [row["term_id"] for row in terms]
    found = columns(_of_terms("feature, score", scope, numbers))
    score = np.bincount(found["feature"], weights=found["score"])
    features = np.flatnonzero(np.bincount(found["feature"]))
    # scores of the index have three decimals: sorted as whole numbers, the smaller feature first where two are even
    thousandths = np.rint(score[features] * 1000).astype(np.int64)
    keys = np.sort(((thousandths.max(initial=0) - thousandths) << 32) | features)
    features = (keys & (2**32 - 1))[:limit]
    return WordScores(features, score[features], _list(numbers))


def _words(ask: Ask, text: str) -> list[str]:
    """What `WORDS_OF` finds in a text. DuckDB takes four milliseconds to make a pattern of all letters there are."""
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    return ask(f"SELECT {WORDS_OF} AS words FROM (SELECT $text AS text)", {"text": text})[0]["words"]


def _of_terms(what: str, scope: Scope, terms: Sequence[int]) -> str:
    """A query of the postings of terms; constants let DuckDB skip all others, and of one term it compares nothing."""
    query = f"SELECT {what} FROM derived.search_postings WHERE dictionary_id = {scope.dictionary_id} AND term_id"
    if 0 < len(terms) <= 8:
        return " UNION ALL ".join(f"{query} = {int(term)}" for term in terms)
    return f"{query} IN ({_list(terms)})"


def word_places(ask: Ask, scope: Scope, terms: str, features: Sequence[int]) -> dict[int, Why]:
    """Where the words of a search stand in some of the features that it found."""
    places = ask(
        "SELECT term_id, score, feature, field, word FROM derived.search_postings "
        f"WHERE dictionary_id = {scope.dictionary_id} AND term_id IN ({terms}) AND feature IN ({_list(features)})"
    )
    matched: dict[int, Why] = {feature: {} for feature in features}
    for place in sorted(places, key=lambda place: (place["term_id"], -place["score"], place["word"])):
        words = matched[place["feature"]].setdefault(place["field"], [])
        if place["word"] not in words:
            words.append(place["word"])
    return matched


def by_words(ask: Ask, columns: Columns, scope: Scope, text: str, limit: int | None) -> list[Scored]:
    """What `word_scores` finds, with the words of each. Raises StoreError where there is no word."""
    found = word_scores(ask, columns, scope, text, limit)
    features = found.features.tolist()
    matched = word_places(ask, scope, found.terms, features)
    return [Scored(f, score, matched[f]) for f, score in zip(features, found.scores.tolist(), strict=True)]


@dataclass(frozen=True)
class TokenScores:
    """Features that fire on a token, best first: common tokens have tens of thousands, so columns and not objects."""

    token: str
    columns: dict[str, np.ndarray]  # of the macro `fires_on_exact`
    total: int  # features that fire on it, those in the columns or more

    def why(self, features: Sequence[int]) -> dict[int, Why]:
        """What speaks for some of the features."""
        places = np.flatnonzero(np.isin(self.columns["feature"], np.asarray(features, np.int64)))
        return {
            int(self.columns["feature"][n]): {
                f"fires on [{self.token}]": [
                    f"{self.columns['count'][n]} times",
                    f"{self.columns['share_of_token'][n]:.0%} of the token's",
                    f"{self.columns['share_of_feature'][n]:.0%} of its own",
                ]
            }
            for n in places.tolist()
        }


def token_scores(ask: Ask, columns: Columns, scope: Scope, token: str, limit: int | None = None) -> TokenScores:
    """Features that fire on a token, by the F1 of firing and token: all of them, or at least the best `limit`.

    Up to `MAX_FEATURES` of them were found by the build; to tell all reads every activation. Raises StoreError for a
    token that no tokenizer has.
    """
    token, ids = _known_token(ask, token, scope.vocabulary_id)
    if limit is not None and limit <= MAX_FEATURES and scope.num_segments == 1 and len(ids) == 1:
        return _best_on_token(ask, columns, scope, token, ids[0])
    query = (
        "SELECT feature, count, share_of_token, share_of_feature, f1 FROM fires_on_exact($token, dict := $name) "
        "ORDER BY f1 DESC, feature"
    )
    found = columns(query, {"token": token, "name": scope.dictionary})
    return TokenScores(token, found, len(found["feature"]))


def _best_on_token(ask: Ask, columns: Columns, scope: Scope, token: str, token_id: int) -> TokenScores:
    """What the macro `fires_on` finds, without labels, and planned in a tenth of the time."""
    where = f"WHERE segment_id = {scope.segment_id} AND token_id = {token_id}"
    best = columns(f"SELECT feature, count FROM derived.token_features {where}")
    seen = ask(f"SELECT num_rows, num_features FROM derived.token_counts {where}")
    feature, count = best["feature"].astype(np.int64), best["count"]
    total = scope.num_activations()[feature]
    num_rows = seen[0]["num_rows"] if seen else 0
    found = {
        "feature": feature,
        "count": count,
        "share_of_token": count / max(num_rows, 1),
        "share_of_feature": count / np.maximum(total, 1),
        "f1": 2 * count / np.maximum(total + num_rows, 1),
    }
    best_first = np.lexsort((feature, -found["f1"]))
    return TokenScores(
        token, {name: of[best_first] for name, of in found.items()}, seen[0]["num_features"] if seen else 0
    )


def by_token(ask: Ask, columns: Columns, scope: Scope, token: str, limit: int | None = None) -> list[Scored]:
    """What `token_scores` finds, with its reasons."""
    found = token_scores(ask, columns, scope, token, limit)
    features, scores = found.columns["feature"].tolist(), found.columns["f1"].tolist()
    reasons = found.why(features)
    return [Scored(f, score, reasons[f]) for f, score in zip(features, scores, strict=True)]


def by_effect(ask: Ask, columns: Columns, scope: Scope, token: str, limit: int | None = None) -> list[Scored]:
    """Features that promote a token, by the rise of its logit. Raises StoreError for a token that there is not."""
    token, ids = _known_token(ask, token, scope.vocabulary_id)
    found = columns(  # what the macro `promotes` finds, without labels, and planned in a fifth of the time
        "SELECT feature, rank, effect FROM evidence.logit_effects "
        f"WHERE dictionary_id = {scope.dictionary_id} AND direction = 'promoted' AND token_id IN ({_list(ids)})"
    )
    best = np.lexsort((found["feature"], -found["effect"]))[:limit]
    rows = zip(*(found[name][best].tolist() for name in ("feature", "effect", "rank")), strict=True)
    return [Scored(f, effect, {f"promotes [{token}]": [f"rank {rank + 1}"]}) for f, effect, rank in rows]


def _known_token(ask: Ask, token: str, vocabulary_id: int) -> tuple[str, list[int]]:
    """(the token as vocabularies spell it: as given, or with a space before it; its ids in one of them)."""
    query = "SELECT token, token_id, vocabulary_id FROM evidence.vocabulary WHERE token = $one OR token = $other"
    rows = ask(query, {"one": token, "other": f" {token}"})
    for spelled in (token, f" {token}"):
        same = [row for row in rows if row["token"] == spelled]
        if same:
            return spelled, [row["token_id"] for row in same if row["vocabulary_id"] == vocabulary_id]
    raise StoreError(f"no tokenizer of this store has {token!r} as one token: SELECT token FROM tokens lists them")


#: Ways to search by a text; those of a model are in pipelines.
METHODS: dict[str, Callable[[Ask, Columns, Scope, str, int | None], list[Scored]]] = {
    "token": by_token,
    "effect": by_effect,
}


def describe(cards: Cards, scope: Scope, found: Sequence[Scored]) -> list[SearchHit]:
    """Scored features with their labels and densities, in the order given."""
    about = [(f, cards.of(f.feature)) for f in found]
    return [
        SearchHit(scope.dictionary, f.feature, float(f.score), matched=f.matched, **card)
        for f, card in about
        if card is not None
    ]


def _list(numbers: Any) -> str:
    """A list of constants for IN, of none too."""
    return ", ".join(str(int(n)) for n in numbers) or "NULL"
