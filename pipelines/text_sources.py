"""Rows of text from wherever it lies, each named by its place: a file and line, a dataset and row.

A source is `embedded:wikipedia`, a file, a folder, or `hf:NAME[:CONFIG][@REVISION]`. What a file is, its name says:

.txt .md                one document a file
.jsonl .ndjson          one row a line
.parquet                one row a row, read by row groups
a folder                every such file below it in name order, or a dataset that `Dataset.save_to_disk` wrote

Text files and lines may be compressed (.gz, .xz, .zst). Reading starts at any row without parsing what is before it.
"""

import bz2
import hashlib
import importlib.util
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from saeql.sae.config import ConfigError, suggestion

EMBEDDED_TEXT = "embedded:wikipedia"
_WIKIPEDIA_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_TEXT, _LINES, _PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), ".parquet"
_ARROW_NAMES = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSIONS = (*_ARROW_NAMES, ".xz")
_ROWS_AT_ONCE = 1024

CONTENTS = ("text", "tokens", "chat")


class CorpusError(ValueError):
    """A source of text is missing, unreadable or empty."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture."""

    source: str
    """embedded:wikipedia, a file or folder, or hf:NAME[:CONFIG][@REVISION]."""
    weight: float = 1.0
    """Share of the harvested tokens, relative to the other sources."""
    content: str = "text"
    """What a row holds: "text", "tokens" (ids of this model's tokenizer) or "chat" (a list of messages)."""
    text_column: str = "text"
    """Field of a row that holds the text."""
    tokens_column: str = "input_ids"
    """Field of a row that holds token ids."""
    messages_column: str = "messages"
    """Field of a row that holds messages with "role" and "content"."""
    split_column: str = ""
    """Field whose value decides the split in place of the text, for rows that are pieces of one document."""
    tokenizer_sha256: str = ""
    """Tokenizer that made the ids of "tokens"; unset reads it from the metadata of a Parquet file."""
    hub_split: str = "train"
    """Split of a hub or saved dataset to read; saeql's own splits are made from its documents."""

    def __post_init__(self) -> None:
        if self.content not in CONTENTS:
            raise ConfigError(
                f"corpus.mixture: content must be one of {', '.join(CONTENTS)}; got {self.content!r}"
                f"{suggestion(self.content, CONTENTS)}"
            )
        if not self.weight > 0:
            raise ConfigError(f"corpus.mixture: weight of {self.source} must be above 0, got {self.weight}")

    @property
    def column(self) -> str:
        """The field that is read."""
        return {"text": self.text_column, "tokens": self.tokens_column, "chat": self.messages_column}[self.content]


@dataclass(frozen=True)
class Row:
    """What one row of a source holds; `fields` is None where its bytes are not UTF-8."""

    place: str  # for messages: file and line, dataset and row
    title: str
    fields: Mapping[str, Any] | None
    tokenizer_sha256: str = ""  # as the file says


#: KEY of a Parquet file's schema metadata that names the tokenizer of its ids.
TOKENIZER_KEY = "saeql.tokenizer_sha256"


def read_rows(source: SourceConfig, start: int = 0, stride: int = 1) -> Iterator[Row]:
    """Every `stride`-th row of a source from row `start` on, in an order that never changes; others are not parsed.

    Raises CorpusError, in one line, where the source is missing, unreachable, damaged, or has not the column.
    """
    check_place(source)
    if source.source == EMBEDDED_TEXT:
        return _wikipedia(source.text_column, start, stride)
    if source.source.startswith("hf:"):
        return _hub(source, start, stride)
    path = Path(source.source).expanduser()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved_dataset(source, path, start, stride)
    return _files(source, path, start, stride)


def check_place(source: SourceConfig) -> None:
    """Raises CorpusError where a source is not embedded, not on this machine, and not named as one on the hub."""
    name = source.source
    if name.startswith("embedded:"):
        if name != EMBEDDED_TEXT:
            raise CorpusError(f"no embedded corpus {name!r}{suggestion(name, [EMBEDDED_TEXT])}")
    elif not name.startswith("hf:") and not Path(name).expanduser().exists():
        raise CorpusError(f"no corpus at {Path(name).expanduser()}: name a file, a folder, {EMBEDDED_TEXT} or hf:NAME")


def fingerprint(source: SourceConfig) -> str:
    """What a local source consists of: number, bytes, a hash of names and sizes of files; '' where there are none."""
    path = Path(source.source).expanduser()
    if source.source.startswith(("embedded:", "hf:")) or not path.exists():
        return ""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sizes = [(file.relative_to(path).as_posix(), file.stat().st_size) for file in files]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return f"{len(sizes)} files, {sum(size for _, size in sizes)} bytes, {digest[:12]}"


def _files(source: SourceConfig, path: Path, start: int, stride: int) -> Iterator[Row]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    readable = [(file, kind) for file in files if (kind := _kind(file)) is not None]
    if not readable:
        raise CorpusError(
            f"{path} holds no text that saeql reads: .txt .md .jsonl .ndjson (also .gz .xz .zst) .parquet, or a "
            "dataset written by save_to_disk"
        )
    for file, kind in readable:
        wanted, count = Wanted(start, stride), 0
        try:
            for row in kind(source, file, wanted):
                count += 1
                if row is not None:
                    yield row
        except (OSError, EOFError, ArithmeticError, lzma.LZMAError) as error:
            raise CorpusError(f"{file} cannot be read: {one_line(error)}") from None
        start = wanted.first_from(count) - count


@dataclass(frozen=True)
class Wanted:
    """Which rows of a file are read: every `stride`-th from `start` on."""

    start: int
    stride: int

    def __contains__(self, row: int) -> bool:
        return row >= self.start and (row - self.start) % self.stride == 0

    def first_from(self, row: int) -> int:
        """The first wanted row that is not before `row`."""
        return self.start + max(0, -(-(row - self.start) // self.stride)) * self.stride


#: Yields a row, or None for one that is not wanted, for every row of the file.
_Reader = Callable[[SourceConfig, Path, Wanted], Iterator[Row | None]]


def _kind(file: Path) -> _Reader | None:
    suffix = Path(file.stem).suffix if file.suffix in _COMPRESSIONS else file.suffix
    if suffix in _TEXT:
        return _text_file
    if suffix in _LINES:
        return _json_lines
    return _parquet if file.suffix == _PARQUET else None


def _opened(file: Path) -> BinaryIO:
    """Bytes of a file, decompressed; several members or frames in a row are read as one."""
    if file.suffix == ".xz":
        return io.BufferedReader(lzma.open(file))
    compression = _ARROW_NAMES.get(file.suffix)
    if compression is None:
        return file.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(file), compression=compression))  # pyright: ignore[reportArgumentType, reportReturnType]


def _text_file(source: SourceConfig, file: Path, wanted: Wanted) -> Iterator[Row | None]:
    if 0 not in wanted:
        yield None
        return
    with _opened(file) as opened:
        text = _decoded(opened.read())
    yield Row(str(file), file.name, None if text is None else {source.column: text})


def _json_lines(source: SourceConfig, file: Path, wanted: Wanted) -> Iterator[Row | None]:
    row = -1
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row += 1
            if row not in wanted:
                yield None
                continue
            place, title = f"{file} line {number}", f"{file.name}:{number}"
            text = _decoded(line)
            yield Row(place, title, None if text is None else _json_row(source, place, text))


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _json_row(source: SourceConfig, place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict) or source.column not in row:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CorpusError(f'{place} has no {source.content} field "{source.column}" (it has {keys})')
    return row


def _parquet(source: SourceConfig, file: Path, wanted: Wanted) -> Iterator[Row | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            columns = _columns(source, str(file), opened.schema_arrow.names)
            made_by = (opened.schema_arrow.metadata or {}).get(TOKENIZER_KEY.encode(), b"").decode()
            number = 0
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if wanted.first_from(number) >= number + rows:
                    yield from (None for _ in range(rows))
                    number += rows
                    continue
                for batch in opened.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                    count = batch.num_rows
                    chosen = [row for row in range(count) if number + row in wanted]
                    read = _arrow_rows(
                        batch if len(chosen) == batch.num_rows else batch.take(pa.array(chosen, "int32"))
                    )
                    for row in range(number, number + batch.num_rows):
                        yield (
                            Row(f"{file} row {row}", f"{file.name}:{row}", next(read), made_by)
                            if row in wanted
                            else None
                        )
                    number += batch.num_rows
    except pa.ArrowException as error:
        raise CorpusError(f"{file} cannot be read as Parquet: {one_line(error)}") from None


def _saved_dataset(source: SourceConfig, path: Path, start: int, stride: int) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise CorpusError(f"{path} is not a whole dataset: {one_line(error)}") from None
    if isinstance(dataset, DatasetDict):
        if source.hub_split not in dataset:
            raise CorpusError(f"{path} has no split {source.hub_split!r}, it has {', '.join(map(str, dataset))}")
        dataset = dataset[source.hub_split]
    columns = _columns(source, str(path), dataset.column_names)
    arrow = dataset.select_columns(columns).with_format("arrow")
    for first in range(start, len(arrow), _ROWS_AT_ONCE * stride):
        rows = range(first, min(first + _ROWS_AT_ONCE * stride, len(arrow)), stride)
        for number, fields in zip(rows, _arrow_rows(arrow[rows]), strict=True):
            yield Row(f"{path} row {number}", f"{path.name}:{number}", fields)


def _columns(source: SourceConfig, place: str, names: list[str]) -> list[str]:
    for column in (source.column, source.split_column):
        if column and column not in names:
            raise CorpusError(f'{place} has no column "{column}", it has {", ".join(names)}')
    return [n for n in names if n in {source.column, source.split_column, "title"}]


def _arrow_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Rows of an Arrow table or batch; None for a row whose text is not UTF-8, which Arrow checks only here."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _hub(source: SourceConfig, start: int, stride: int) -> Iterator[Row]:
    from datasets import load_dataset

    name, _, revision = source.source.removeprefix("hf:").partition("@")
    name, _, subset = name.partition(":")
    try:
        rows = load_dataset(name, subset or None, split=source.hub_split, revision=revision or None, streaming=True)  # pyright: ignore[reportArgumentType]
        for number, row in islice(enumerate(rows.skip(start), start), 0, None, stride):
            if source.column not in row:
                raise CorpusError(f'dataset {name} has no column "{source.column}", it has {", ".join(row)}')
            yield Row(f"{name} row {number}", f"{name}:{number}", row)
    except (OSError, EOFError, LookupError) as error:
        raise CorpusError(f"cannot read dataset {name}: {one_line(error)}") from None
    except ValueError as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"cannot read dataset {name}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """Text of an error without its line breaks."""
    return " ".join(str(error).split())[:300]


def _wikipedia(text_column: str, start: int, stride: int) -> Iterator[Row]:
    """Articles of an English Wikipedia dump that the gensim wheel carries; its redirect stubs are dropped."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise CorpusError(f"{EMBEDDED_TEXT} is not installed: pip install 'saeql[demo]'")
    path = Path(spec.origin).parent / _WIKIPEDIA_FILE
    if not path.exists():
        raise CorpusError(f"this gensim carries no {path.name}: pip install 'gensim>=4.4'")
    from gensim.corpora import wikicorpus

    with bz2.open(path) as dump:
        pages = wikicorpus.extract_pages(dump, filter_namespaces=("0",))  # pyright: ignore[reportArgumentType]
        articles = ((t, markup) for t, markup, _ in pages if not markup.lstrip().lower().startswith("#redirect"))
        for title, markup in islice(articles, start, None, stride):
            text = _clean_wikitext(wikicorpus.filter_wiki(markup))
            yield Row(f"{EMBEDDED_TEXT} {title}", title, {text_column: text})


def _clean_wikitext(text: str) -> str:
    """What gensim's filter leaves of the markup: bold and italic quotes, heading signs, runs of empty lines."""
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()
