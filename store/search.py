"""Ways to find features of one dictionary, each as (feature, score, why): by words, by a token, by a token's logit.

`describe` makes hits of them, and of whatever else scores features: activations on a prompt, cosines of directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cards import Cards
from .errors import StoreError
from .migrations import sql_text
from .words import WORDS_OF, stem

Ask = Callable[..., list[dict[str, Any]]]
Columns = Callable[[str], dict[str, np.ndarray]]  # of a query without nulls, for many rows
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
    """The dictionary that is searched; its activations on its first corpus, -1 where there are none."""

    dictionary: str
    dictionary_id: int
    segment_id: int


@dataclass(frozen=True)
class WordScores:
    """Features that words find, best first, before it is read which words: `terms` are their numbers in the index."""

    features: np.ndarray  # [N] int
    scores: np.ndarray  # [N] float
    terms: str


def word_scores(ask: Ask, columns: Columns, scope: Scope, text: str, limit: int | None = None) -> WordScores:
    """BM25 over labels, tokens that activate and tokens that are promoted. Raises StoreError where there is no word."""
    words = ask(f"SELECT {WORDS_OF} AS words FROM (SELECT $text AS text)", {"text": text})[0]["words"]
    if not words:
        raise StoreError(f"nothing to search for in {text!r}: give at least one word")
    terms = ask(
        f"SELECT term_id FROM derived.search_terms WHERE dictionary_id = {scope.dictionary_id} "
        "AND list_contains($terms, term)",
        {"terms": sorted(set(stem(words)))},
    )
    numbers = _list(row["term_id"] for row in terms)
    query = sql_text("search").replace("{dictionary_id}", str(scope.dictionary_id)).replace("{terms}", numbers)
    found = columns(query.replace("{limit}", "" if limit is None else f"LIMIT {int(limit)}"))
    return WordScores(found["feature"], found["score"], numbers)


def word_places(ask: Ask, scope: Scope, terms: str, features: Sequence[int]) -> dict[int, Why]:
    """Where the words of a search stand in some of the features that it found."""
    places = ask(
        f"SELECT feature, field, word FROM derived.search_postings WHERE dictionary_id = {scope.dictionary_id} "
        f"AND term_id IN ({terms}) AND feature IN ({_list(features)}) "
        "ORDER BY term_id, score DESC, word"
    )
    matched: dict[int, Why] = {feature: {} for feature in features}
    for place in places:
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


def by_token(ask: Ask, scope: Scope, token: str) -> list[Scored]:
    """Features that fire on a token, by the F1 of firing and token. Raises StoreError for one that no text has."""
    token = _known_token(ask, token)
    rows = ask("FROM fires_on($token, dict := $name)", {"token": token, "name": scope.dictionary})
    return [
        Scored(
            row["feature"],
            row["f1"],
            {
                f"fires on [{token}]": [
                    f"{row['count']} times",
                    f"{row['share_of_token']:.0%} of the token's",
                    f"{row['share_of_feature']:.0%} of its own",
                ]
            },
        )
        for row in rows
    ]


def by_effect(ask: Ask, scope: Scope, token: str) -> list[Scored]:
    """Features that promote a token, by the rise of its logit. Raises StoreError for a token that there is not."""
    token = _known_token(ask, token)
    rows = ask(  # what the macro `promotes` finds, without labels, and planned in a fifth of the time
        "SELECT feature, rank, effect FROM evidence.logit_effects "
        f"WHERE dictionary_id = {scope.dictionary_id} AND direction = 'promoted' AND token_id IN ("
        "SELECT token_id FROM evidence.dictionaries JOIN evidence.models USING (model_id) "
        "JOIN evidence.vocabulary USING (vocabulary_id) "
        f"WHERE dictionary_id = {scope.dictionary_id} AND token = $token) ORDER BY effect DESC, feature",
        {"token": token},
    )
    return [Scored(row["feature"], row["effect"], {f"promotes [{token}]": [f"rank {row['rank'] + 1}"]}) for row in rows]


def _known_token(ask: Ask, token: str) -> str:
    """The token as it is spelled in a vocabulary: as given, or with a space before it."""
    for spelled in (token, f" {token}"):
        if ask("SELECT 1 AS found FROM evidence.vocabulary WHERE token = $token LIMIT 1", {"token": spelled}):
            return spelled
    raise StoreError(f"no tokenizer of this store has {token!r} as one token: SELECT token FROM tokens lists them")


#: Ways to search by a text; those of a model are in pipelines.
METHODS: dict[str, Callable[[Ask, Scope, str], list[Scored]]] = {
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
