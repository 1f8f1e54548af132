"""Labelled texts of a guard: read, without repeats, and parted by the hash of each.

learn          features, their order and the relation of their thresholds
calibration    how high all thresholds are, and which setting is taken
test           the rates that are reported
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..corpus import document_sha256, split_of
from ..text_sources import CorpusError, SourceConfig, read_rows
from .guard import GuardError

PARTS: Mapping[str, float] = {"learn": 0.5, "calibration": 0.25, "test": 0.25}
#: Fewer texts of either label in a part than this say nothing.
LEAST_TEXTS = 5


@dataclass(frozen=True)
class LabelledTexts:
    """Bad and good texts by part."""

    bad: Mapping[str, list[str]]
    good: Mapping[str, list[str]]


def read_texts(bad: Path, good: Path, *, text_column: str = "text") -> LabelledTexts:
    """Texts of two files: .txt with one text a line, or whatever a corpus can be (.jsonl, .parquet, a folder).

    Raises GuardError where a part has too few texts, or a text is both bad and good.
    """
    found = {name: _distinct(path, text_column) for name, path in (("bad", bad), ("good", good))}
    both = found["bad"].keys() & found["good"].keys()
    if both:
        raise GuardError(f"{len(both)} texts are in {bad} and in {good}, such as {found['bad'][min(both)][:60]!r}")
    parts: dict[str, dict[str, list[str]]] = {}
    for name, texts in found.items():
        parts[name] = {part: [] for part in PARTS}
        for sha256, text in texts.items():
            parts[name][split_of(sha256, dict(PARTS))].append(text)
        few = min(PARTS, key=lambda part: len(parts[name][part]))
        if len(parts[name][few]) < LEAST_TEXTS:
            raise GuardError(
                f"{bad if name == 'bad' else good}: {len(texts)} different texts leave {len(parts[name][few])} for "
                f"{few}, at least {LEAST_TEXTS} are needed: give more"
            )
    return LabelledTexts(parts["bad"], parts["good"])


def _distinct(path: Path, column: str) -> dict[str, str]:
    """Texts by their hash, in the file's order."""
    texts = _lines(path) if path.suffix == ".txt" else _rows(path, column)
    return {document_sha256(text): text for text in texts if text.strip()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GuardError(f"{path} cannot be read: {error}") from None


def _rows(path: Path, column: str) -> list[str]:
    try:
        values = [
            (row.fields or {}).get(column) for row in read_rows(SourceConfig(source=str(path), text_column=column))
        ]
    except CorpusError as error:
        raise GuardError(str(error)) from None
    texts = [value for value in values if isinstance(value, str)]
    if not texts:
        raise GuardError(f'{path} has no row with text in a column "{column}"')
    return texts
