"""Executable predicates over a row (one position of one window): what a label claims is what its predicate computes.

    token " bank"            Token(" bank")                      lexical
    word "river" (any case)  Word("river")                       lexical
    words with stem "walk"   Stems(("walk",))                    lexical
    words ending in -ing     Affix("suffix", "ing")              lexical
    a number                 TokenClass("number")                structural
    the token after " the"   Neighbour(-1, Token(" the"))        structural
    token "," after a number Both(Token(","), Neighbour(-1, TokenClass("number")))  structural
    token "," not after a number  Both(Token(","), Not(Neighbour(-1, TokenClass("number"))))  structural
    words with stem "war" among the last 8 tokens  Recent(Stems(("war",)), 8)       structural
    token " war"; or words ending in -ing   Either(Token(" war"), Affix("suffix", "ing"))     lexical
    token " to" as a particle  Both(Token(" to"), PartOfSpeech("PART"))               structural
    n-gram " United" " States"   NGrams(((" United", " States"),))   structural

The *word* of a token is its text, stripped and case-folded; a token is often only a piece of what a reader calls a
word.
`predicate.to_json()` and `Predicate.from_json(text)` are inverse to each other.
"""

from dataclasses import fields

from .context_predicates import Both, Either, Neighbour, NGrams, Not, Piece, Position, Recent
from .part_predicates import PartOfSpeech
from .predicate_base import Predicate, TokenPredicate, quoted
from .token_predicates import Affix, Stems, Token, TokenClass, TokenSet, Word

__all__ = [
    "PREDICATES", "Affix", "Both", "Either", "NGrams", "Neighbour", "Not", "PartOfSpeech", "Piece", "Position",
    "Predicate", "Recent", "Stems", "Token", "TokenClass", "TokenPredicate", "TokenSet", "Word", "predicate_of",
    "quoted",
]  # fmt: skip

#: JSON type name -> class.
PREDICATES: dict[str, type[Predicate]] = {
    p.name: p
    for p in (
        Token, TokenSet, Word, Stems, Affix, TokenClass, Piece, Position, Neighbour, Recent, Not, Both, Either, NGrams,
        PartOfSpeech,
    )
}  # fmt: skip


def predicate_of(data: object) -> Predicate:
    """The predicate of an object of JSON; see `Predicate.from_json`. Raises ValueError where it is none."""
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise ValueError(f"a predicate must be an object with a 'type', not {data!r}")
    made = PREDICATES.get(data["type"])
    if made is None:
        raise ValueError(f"unknown predicate type {data['type']!r}; known: {', '.join(PREDICATES)}")
    wanted = {f.name for f in fields(made)}  # type: ignore[arg-type]
    given = set(data) - {"type"}
    if wanted != given:
        raise ValueError(f"predicate {data['type']!r} takes {sorted(wanted)}, not {sorted(given)}")
    values = {key: predicate_of(v) if isinstance(v, dict) else _tuples(v) for key, v in data.items() if key != "type"}
    return made(**values)


def _tuples(value: object) -> object:
    """JSON's lists as tuples, at any depth."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
