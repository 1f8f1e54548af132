"""Concepts that are planted as features to see whether labelling finds them: executable rules over words of real text.

A rule reads the row's whole word and the words beside it, nothing else; no tagger is asked. Two of the concepts differ
from their other uses by context alone: the infinitive marker "to" from the preposition, the conjunction "that" from the
pronoun. A concept holds on the last token of its word.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .row_text import Words


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _labels(text: str) -> frozenset[str]:
    return frozenset(label.strip() for label in text.split(";"))


_VERBS = _words(
    "be have do make take get give go see come find know think say tell ask use work call try keep let begin help "
    "show hear play run move live believe hold bring happen write provide sit stand lose pay meet include "
    "continue set learn change lead understand watch follow stop create speak read allow add spend grow open walk "
    "win offer remember love consider appear buy wait serve die send expect build stay fall cut reach kill remain "
    "become prevent produce describe protect avoid determine develop establish form explain improve increase "
    "reduce support achieve maintain obtain perform identify prove join leave return refer mean represent "
    "distinguish enter express act receive gain"
)
_BEFORE_THAT = _words(
    "say says said saying believe believes believed believing argue argues argued arguing claim claims claimed "
    "claiming state states stated stating suggest suggests suggested suggesting show shows showed shown showing "
    "find finds found note notes noted noting think thinks thought know knows knew known fact idea belief view "
    "evidence indicate indicates indicated conclude concludes concluded announce announced propose proposes "
    "proposed report reports reported admit admitted assume assumes assumed held feel feels felt ensure means "
    "mean meant hope hoped agree agreed declare declared realise realised realize realized reveal revealed "
    "discover discovered demonstrate demonstrated maintain maintains maintained insist insisted possible likely "
    "clear true so theory doubt assert asserts asserted explain explains explained told prove proves proved "
    "proven estimate estimated imply implies implied require"
)


@dataclass(frozen=True)
class Context:
    """The words of rows as rules see them: case-folded, "" where there is none; arrays of str are never made."""

    words: Words
    folded: list[str]

    @classmethod
    def of(cls, words: Words) -> "Context":
        """Of all rows of some windows."""
        return cls(words, [name.casefold() for name in words.names])

    def where(self, test: Callable[[str], bool]) -> np.ndarray:
        """[W, T] bool: the row's word passes."""
        return np.append(np.array([test(w) for w in self.folded], bool), False)[self.words.codes]

    def beside(self, rows: np.ndarray, offset: int) -> np.ndarray:
        """[W, T] bool: `rows` holds on the token right before (-1) or right behind (+1) the row's word."""
        edge = self.words.starts - 1 if offset < 0 else self.words.ends + 1
        inside = (edge >= 0) & (edge < rows.shape[1])
        return np.take_along_axis(rows, np.where(inside, edge, 0), axis=1) & inside


Rule = Callable[[Context], np.ndarray]


def _one_of(text: str) -> Rule:
    lexicon = _words(text)
    return lambda c: c.where(lambda w: w in lexicon)


def _opening_quote(c: Context) -> np.ndarray:
    """A quotation mark with a word right behind it, and no word or mark right before it."""
    mark = c.where(lambda w: w in ('"', "\u201c", '("', "(\u201c"))
    bare = c.words.bare
    text = c.where(lambda w: w != "" and w not in ("(", "[", "-", "\u2014"))
    return mark & c.beside(c.where(lambda w: w[:1].isalnum()) & bare, 1) & ~(c.beside(text, -1) & bare)


@dataclass(frozen=True)
class Concept:
    """One planted concept: `rule` says where it holds, `label` what it is called in the bank.

    `accepted` are the labels of the bank that mean it, or its field: of hundreds, several are near.
    """

    name: str
    label: str
    accepted: frozenset[str]
    rule: Rule
    same_token: bool = False  # its own token also stands where it does not hold

    def rows(self, context: Context) -> np.ndarray:
        """[W, T] bool: last tokens of the words on which the concept holds."""
        last = context.words.ends == np.arange(context.words.codes.shape[1])
        return self.rule(context) & last & (context.words.codes >= 0)


_YEAR = re.compile(r"1[0-9]\d\d|20[0-2]\d")

CONCEPTS: tuple[Concept, ...] = (
    Concept(
        "days",
        "days of the week",
        _labels("days of the week; weeks and weekends"),
        _one_of("monday tuesday wednesday thursday friday saturday sunday mondays fridays saturdays sundays"),
    ),
    Concept(
        "months",
        "months of the year",
        _labels("months of the year; dates; calendars"),
        _one_of("january february march april june july august september october november december"),
    ),
    Concept(
        "law",
        "law",
        _labels(
            "law; courts; judges; lawyers; trials; juries; legal rights; legal text; justice; legislation; "
            "lawsuits; appeals; constitutions"
        ),
        _one_of(
            "court courts judge judges law laws legal trial trials jury lawyer lawyers attorney lawsuit lawsuits "
            "verdict statute statutes prosecutor defendant plaintiff legislation judicial judiciary"
        ),
    ),
    Concept(
        "family",
        "family members",
        _labels(
            "family members; parents and children; mothers; fathers; brothers and sisters; husbands and wives; "
            "ancestors and descendants; grandparents; marriage; boys and girls"
        ),
        _one_of(
            "mother father mothers fathers son sons daughter daughters brother brothers sister sisters wife wives "
            "husband parents parent grandfather grandmother uncle aunt cousin nephew niece siblings"
        ),
    ),
    Concept(
        "body",
        "parts of the body",
        _labels(
            "parts of the body; the head and face; eyes; hands; hair; skin; bones; anatomy; internal organs; legs"
            " and feet; teeth; muscles; the heart; the brain; blood"
        ),
        _one_of(
            "hand hands eye eyes face arm leg legs foot feet skin heart brain bone bones hair mouth nose ear ears neck "
            "finger fingers teeth shoulder chest stomach lungs liver kidney knee tongue muscles"
        ),
    ),
    Concept(
        "music",
        "music",
        _labels(
            "music; musicians; singers; songs; albums; bands; musical instruments; guitars; concerts; orchestras;"
            " composers; classical music; opera; rock music; pop music; names of songs; lyrics; record labels"
        ),
        _one_of(
            "music musical song songs album albums singer singers musician musicians guitar piano orchestra concert "
            "concerts jazz opera composer composers symphony melody violin drums"
        ),
    ),
    Concept(
        "speech verbs",
        "verbs of speaking",
        _labels(
            "verbs of speaking; reported speech; direct speech; quotation; announcements; conversations; "
            "explanation; arguments and debate; answers; requests; criticism; agreement"
        ),
        _one_of(
            "said says say asked told stated states claimed claims argued argues replied announced declared suggested "
            "suggests explained remarked responded insisted spoke"
        ),
    ),
    Concept(
        "money",
        "money",
        _labels(
            "money; currencies; prices and costs; payment; banks; loans and debt; taxes; wages; investment; "
            "budgets; economics; wealth; profit and loss; buying and selling; large numbers"
        ),
        _one_of(
            "money dollar dollars cent cents cost costs pay paid price prices tax taxes currency coins coin fund funds "
            "income salary debt loan loans payment payments cash pounds euros budget"
        ),
    ),
    Concept(
        "colours",
        "colours",
        _labels("colours; black and white; red; blue; green; paint; brightness and darkness"),
        _one_of("red blue green yellow black white brown orange purple pink grey gray violet"),
    ),
    Concept(
        "years",
        "years",
        _labels(
            "years; dates; decades; centuries; historical periods; years in brackets; birth and death dates; "
            "publication"
        ),
        lambda c: c.where(lambda w: _YEAR.fullmatch(w) is not None),
    ),
    Concept(
        "comparatives",
        "comparatives",
        _labels(
            "comparatives; comparison; superlatives; comparing; size: big and small; increase and decrease; less "
            "and least; more and most"
        ),
        _one_of(
            "larger smaller greater higher lower older younger longer shorter better worse earlier later stronger "
            "weaker faster slower deeper wider heavier lighter easier closer broader richer"
        ),
    ),
    Concept(
        "opening quotes",
        "opening quotation marks",
        _labels(
            "opening quotation marks; quotation marks; closing quotation marks; quotation; quoted words; quoted "
            "titles; direct speech"
        ),
        _opening_quote,
    ),
    Concept(
        "infinitive to",
        "infinitive marker to",
        _labels("infinitive marker to; infinitives; verb phrases with a particle"),
        lambda c: c.where(lambda w: w == "to") & c.beside(c.where(lambda w: w in _VERBS), 1),
        same_token=True,
    ),
    Concept(
        "conjunction that",
        "that as a conjunction",
        _labels("that as a conjunction; reported speech; conjunctions"),
        lambda c: c.where(lambda w: w == "that") & c.beside(c.where(lambda w: w in _BEFORE_THAT), -1),
        same_token=True,
    ),
)
