"""Labelled texts from a file: documents with one label each, words with a label each, or spans of characters.

    document level   columns text, label
    token level      columns tokens (list of words), labels (one each)      the case is a word's last token
                     columns text, spans ([{"start", "end", "label"}])      all tokens that a span touches

A file is .jsonl, .csv (lists as JSON) or .parquet. Splits are by the hash of each document's normalised text, as in
every corpus. Labels of two classes are one yes/no task; of more, one a class against the rest.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..corpus import document_sha256
from .tasks import TaskError

#: What a file of a task ends in.
FILES = (".jsonl", ".ndjson", ".csv", ".parquet")


@dataclass(frozen=True)
class LabelledText:
    """One document: its text, and the label of it or of parts of it."""

    place: str  # file and row
    text: str
    label: str | None  # at document level
    parts: tuple[tuple[int, int, str], ...]  # at token level: start, end, label
    is_words: bool  # whether the parts are all the words


def read_labelled(path: Path, *, level: str, text: str = "text", label: str = "label") -> list[LabelledText]:
    """All documents of a file. Raises TaskError, in one line, naming the file and row that is not as it must be."""
    found, seen = [], set()
    for place, row in _rows(path):
        document = _document(place, row, text, label) if level == "document" else _tokens(place, row, text)
        if not document.text.strip():
            raise TaskError(f"{place}: the text is empty")
        if (digest := document_sha256(document.text)) not in seen:
            seen.add(digest)
            found.append(document)
    if not found:
        raise TaskError(f"{path} has no rows")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise TaskError(f"no task {str(path)!r}: it is neither a file nor a task that comes with saeql")
    try:
        if path.suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise TaskError(f"{path} line {number} is no JSON object")
                        yield f"{path} line {number}", row
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                for number, row in enumerate(csv.DictReader(file), 2):
                    yield f"{path} line {number}", row
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            for number, row in enumerate(pq.read_table(path).to_pylist()):
                yield f"{path} row {number}", row
        else:
            raise TaskError(f"{path}: a task is a .jsonl, .csv or .parquet file")
    except TaskError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # JSON, UTF-8 and Arrow errors are ValueErrors
        raise TaskError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _column(place: str, row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise TaskError(f'{place} has no column "{name}"; it has {", ".join(map(str, row))}')
    return row[name]


def _label(place: str, value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise TaskError(f"{place}: the label is missing (empty, null or NaN)")
    if isinstance(value, list | dict):
        raise TaskError(f"{place}: a label is one value, not {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _text(place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{place}: the text is {type(value).__name__}, not text")
    return value


def _document(place: str, row: Mapping[str, Any], text: str, label: str) -> LabelledText:
    return LabelledText(
        place, _text(place, _column(place, row, text)), _label(place, _column(place, row, label)), (), False
    )


def _tokens(place: str, row: Mapping[str, Any], text: str) -> LabelledText:
    if "tokens" in row:
        words, labels = (_list(place, name, _column(place, row, name)) for name in ("tokens", "labels"))
        if len(words) != len(labels):
            raise TaskError(f"{place}: {len(words)} tokens but {len(labels)} labels")
        parts, at = [], 0
        for word, value in zip(words, labels, strict=True):
            if not isinstance(word, str) or not word:
                raise TaskError(f"{place}: a token is text, not {word!r}")
            parts.append((at, at + len(word), _label(place, value)))
            at += len(word) + 1
        return LabelledText(place, " ".join(words), None, tuple(parts), True)
    if "spans" not in row:
        raise TaskError(f'{place} has neither columns "tokens" and "labels" nor "spans"; it has {", ".join(row)}')
    whole = _text(place, _column(place, row, text))
    parts = []
    for span in _list(place, "spans", row["spans"]):
        if not isinstance(span, dict) or not {"start", "end"} <= set(span):
            raise TaskError(f'{place}: a span is an object with "start", "end" and perhaps "label", not {span!r}')
        start, end = span["start"], span["end"]
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(whole)):
            raise TaskError(f"{place}: a span from {start} to {end} is not inside a text of {len(whole)} characters")
        parts.append((start, end, _label(place, span.get("label", "span"))))
    return LabelledText(place, whole, None, tuple(parts), False)


def _list(place: str, name: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise TaskError(f'{place}: column "{name}" is no list')
    return value
