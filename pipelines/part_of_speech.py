"""Parts of speech of model tokens, from a spaCy pipeline that the user has installed (`label.part_of_speech`).

The text between two special tokens of a window is tagged as it stands. A model token has the part of the word that its
first character lies in, blanks aside, so that all pieces of a word have its part; blanks and special tokens have none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .models import cache_folder
from .progress import progress
from .text_cache import TextCache

if TYPE_CHECKING:
    from .token_classes import RowTable

#: Pipes that parts of speech come from, or that those need.
_PIPES = ("tok2vec", "transformer", "curated_transformer", "tagger", "morphologizer", "attribute_ruler")
_TAGGERS = ("tagger", "morphologizer")
_TEXTS_AT_ONCE = 512
_INSTALL = "pip install spacy, then `python -m spacy download en_core_web_sm` or another pipeline with a tagger"


class PartOfSpeechError(ValueError):
    """Parts of speech are asked for and cannot be had."""


@dataclass(frozen=True)
class Parts:
    """The part of speech of every row: `names[codes]`, -1 where it has none."""

    names: list[str]
    codes: np.ndarray  # [W, T] int16

    def code_of(self, part: str) -> int:
        """Its code; -2, which no row has, where the text has no such part."""
        return self.names.index(part) if part in self.names else -2


class Tagger:
    """A loaded spaCy pipeline with a cache of what it said, by the hash of pipeline and text."""

    def __init__(self, nlp: Any, *, cache: Path | None = None):
        """Raises PartOfSpeechError where the pipeline has no tagger, or one that is not trained."""
        named = f"spaCy pipeline {nlp.meta.get('lang', '')}_{nlp.meta.get('name', '')}"
        if not any(pipe in nlp.pipe_names for pipe in _TAGGERS):
            has = ", ".join(nlp.pipe_names) or "nothing"
            raise PartOfSpeechError(
                f"{named} has no tagger or morphologizer (it has: {has}): set label.part_of_speech to one that does, "
                "such as en_core_web_sm"
            )
        nlp.select_pipes(enable=[pipe for pipe in nlp.pipe_names if pipe in _PIPES])
        self.nlp = nlp
        try:
            tagged = _words(nlp("This is a test."))
        except ValueError as error:  # E109: not initialised
            raise PartOfSpeechError(f"{named} cannot tag: {' '.join(str(error).split())}") from None
        if not tagged:
            raise PartOfSpeechError(f"{named} gives no parts of speech: its tagger is not trained")
        identity = json.dumps([nlp.meta, tagged], sort_keys=True, default=str)
        self._cache = TextCache(
            cache or cache_folder() / "parts_of_speech.sqlite", f"parts {sha256(identity.encode()).hexdigest()}"
        )

    @classmethod
    def load(cls, name: str, *, cache: Path | None = None) -> Self:
        """The pipeline of that name or folder. Raises PartOfSpeechError with the command for what is missing."""
        try:
            import spacy  # pyright: ignore[reportMissingImports]  # only where the user has it
        except ImportError:
            raise PartOfSpeechError(f"label.part_of_speech = {name!r} needs spaCy: {_INSTALL}") from None
        try:
            nlp = spacy.load(name)
        except (OSError, ValueError, ImportError) as error:
            first = " ".join(str(error).split())[:200]
            raise PartOfSpeechError(f"label.part_of_speech: no spaCy pipeline {name!r} ({first}): {_INSTALL}") from None
        return cls(nlp, cache=cache)

    @classmethod
    def of(cls, name: str) -> Self | None:
        """By the configuration key; None where it is empty."""
        return cls.load(name) if name else None

    def parts(self, windows: "RowTable") -> Parts:
        """Of every row of `windows`."""
        vocabulary, flat = windows.vocabulary, windows.tokens.ravel()
        is_text = windows.valid.ravel() & ~np.append(vocabulary.classes["special"], False)[flat]
        rows = np.flatnonzero(is_text)
        begins = np.flatnonzero(np.append(True, np.diff(windows.segments[rows]) != 0)) if len(rows) else rows
        stretches = np.split(rows, begins[1:])
        lengths = np.array([*map(len, vocabulary.texts)], np.int64)
        blank = np.array([len(t) - len(t.lstrip()) for t in vocabulary.texts], np.int64)
        found = np.full(flat.size, -1, np.int16)
        index: dict[str, int] = {}
        with progress("parts of speech", len(stretches), "texts") as advance:
            for start in range(0, len(stretches) if len(rows) else 0, _TEXTS_AT_ONCE):
                some = stretches[start : start + _TEXTS_AT_ONCE]
                texts = ["".join([vocabulary.texts[t] for t in flat[own]]) for own in some]
                for own, words in zip(some, self._tagged(texts), strict=True):
                    if not words:
                        continue
                    tokens = flat[own]
                    at = np.cumsum(lengths[tokens]) - lengths[tokens] + blank[tokens]
                    starts, ends, names = zip(*words, strict=True)
                    codes = np.array([index.setdefault(name, len(index)) for name in names], np.int16)
                    place = np.searchsorted(np.array(starts), at, "right") - 1
                    inside = (place >= 0) & (at < np.array(ends)[place]) & (blank[tokens] < lengths[tokens])
                    found[own[inside]] = codes[place[inside]]
                advance(len(some))
        return Parts(list(index), found.reshape(windows.tokens.shape))

    def _tagged(self, texts: Sequence[str]) -> list[list[tuple[int, int, str]]]:
        known = self._cache.get(texts)
        new = [text for text in dict.fromkeys(texts) if text not in known]
        made = dict(zip(new, (json.dumps(_words(doc)).encode() for doc in self.nlp.pipe(new)), strict=True))
        self._cache.put(made)
        answers = known | made
        return [[tuple(word) for word in json.loads(answers[text])] for text in texts]


def _words(doc: Any) -> list[tuple[int, int, str]]:
    """(first character, behind the last, part) of the words that have one: universal where the pipeline says so."""
    tagged = [(token.idx, token.idx + len(token.text), token.pos_ or token.tag_) for token in doc if not token.is_space]
    return [word for word in tagged if word[2]]
