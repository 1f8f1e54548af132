"""The predicate of parts of speech: what a token is in its sentence, as `part_of_speech.py` tagged it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .predicate_base import Predicate
from .token_classes import RowTable

#: Universal parts of speech (universaldependencies.org) in words.
PARTS = {
    "ADJ": "an adjective", "ADP": "a preposition", "ADV": "an adverb", "AUX": "an auxiliary verb",
    "CCONJ": "a coordinating conjunction", "DET": "a determiner", "INTJ": "an interjection", "NOUN": "a noun",
    "NUM": "a numeral", "PART": "a particle", "PRON": "a pronoun", "PROPN": "a proper name", "PUNCT": "punctuation",
    "SCONJ": "a subordinating conjunction", "SYM": "a symbol", "VERB": "a verb", "X": "a word of another language",
}  # fmt: skip


@dataclass(frozen=True)
class PartOfSpeech(Predicate):
    """The token `offset` places on (0: the row's own, -1 the previous, 1 the next) is a `part` of speech."""

    name: ClassVar[str] = "part_of_speech"
    kind: ClassVar[str] = "structural"
    part: str
    offset: int = 0

    def __post_init__(self):
        if not (isinstance(self.part, str) and self.part):
            raise ValueError(f"a part of speech is a tag such as NOUN, not {self.part!r}")
        if type(self.offset) is not int or not -1 <= self.offset <= 1:
            raise ValueError(f"a part of speech is that of a token at an offset from -1 to 1, not {self.offset!r}")

    def rows(self, windows: RowTable) -> np.ndarray:
        """Raises PartOfSpeechError where the windows were not tagged."""
        parts = windows.parts
        holds = parts.codes == parts.code_of(self.part)
        return (windows.neighbour(holds, self.offset) if self.offset else holds) & windows.valid

    def at(self, windows: RowTable, rows: np.ndarray) -> np.ndarray:
        width, parts = windows.tokens.shape[1], windows.parts
        place = rows % width + self.offset
        inside = (place >= 0) & (place < width) & windows.valid.ravel()[rows]
        inside[inside] = parts.codes.ravel()[rows[inside] + self.offset] == parts.code_of(self.part)
        return inside

    def describe(self) -> str:
        if self.offset:
            return f"the token {self.relation}"
        return f"{self._part} (part of speech)"

    @property
    def relation(self) -> str:
        """'as a noun', 'after a verb', 'before an adjective'."""
        return f"{ {-1: 'after', 0: 'as', 1: 'before'}[self.offset] } {self._part}"

    @property
    def _part(self) -> str:
        return PARTS.get(self.part, f"a token tagged {self.part}")

    @property
    def complexity(self) -> float:
        return 1.25 + 0.1 * abs(self.offset)
