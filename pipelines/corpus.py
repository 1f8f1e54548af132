"""Documents, and the split that is decided before anything else: by a hash of each document's normalised text.

Sources: `embedded:wikipedia` (pages that come with the PyPI package gensim), a folder or file of text (.txt, .md,
.jsonl), or `hf:NAME[:CONFIG]`, a hub dataset that is streamed.
"""

import bz2
import hashlib
import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saeql.sae.config import ConfigError, suggestion

EMBEDDED_TEXT = "embedded:wikipedia"
_WIKIPEDIA_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text is read, and how much of it."""

    source: str = EMBEDDED_TEXT
    """embedded:wikipedia, a text file or folder (.txt .md .jsonl), or hf:NAME[:CONFIG]."""
    text_column: str = "text"
    """Field of a .jsonl line or dataset row that holds the text."""
    hub_split: str = "train"
    """Split of a hub dataset to stream from; saeql's own splits are made from its documents."""
    train_share: float = 0.7
    """Share of documents that the dictionary learns from and labels are made from."""
    calibration_share: float = 0.15
    """Share of documents that choices are made on; what is left is for testing."""
    max_document_tokens: int = 6000
    """Tokens taken of one document, so that long ones do not crowd out the rest."""
    max_tokens: int = 370_000
    """Tokens harvested over all splits, shared out like the documents; 0 takes everything."""

    def __post_init__(self) -> None:
        if not (0 < self.train_share < 1 and 0 < self.calibration_share < 1):
            raise ConfigError("corpus.train_share and corpus.calibration_share must lie between 0 and 1")
        if self.train_share + self.calibration_share >= 1:
            raise ConfigError("corpus.train_share + corpus.calibration_share must leave a share for testing")

    def split_shares(self) -> dict[str, float]:
        """Share of every split."""
        rest = 1 - self.train_share - self.calibration_share
        return {"train": self.train_share, "calibration": self.calibration_share, "test": rest}


class CorpusError(ValueError):
    """A source of text is missing, unreadable or empty."""


@dataclass(frozen=True)
class Document:
    """One text with the side that it is on."""

    document_id: int
    split: str
    title: str
    text: str
    sha256: str


def normalise(text: str) -> str:
    """Form under which two documents count as the same: NFKC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def split_of(sha256: str, shares: dict[str, float]) -> str:
    """Split of a document by the first 52 bits of its hash, read as a number in [0, 1)."""
    position = int(sha256[:13], 16) / 2**52  # exact in a float
    for split, share in shares.items():
        if position < share:
            return split
        position -= share
    return list(shares)[-1]


def documents(config: CorpusConfig) -> Iterator[Document]:
    """Documents of the source in order, empty ones and repeats left out.

    Raises CorpusError where the source is missing or has no document.
    """
    shares, seen = config.split_shares(), set()
    for title, text in _read(config):
        text = text.strip()
        if not text:
            continue
        sha256 = hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).hexdigest()
        if sha256 in seen:
            continue
        yield Document(len(seen), split_of(sha256, shares), title, text, sha256)
        seen.add(sha256)
    if not seen:
        raise CorpusError(f"the corpus {config.source} is empty: no document with text in it")


def _read(config: CorpusConfig) -> Iterable[tuple[str, str]]:
    """(title, text) of every document of the source."""
    source = config.source
    if source.startswith("embedded:"):
        if source != EMBEDDED_TEXT:
            raise CorpusError(f"no embedded corpus {source!r}{suggestion(source, [EMBEDDED_TEXT])}")
        return _wikipedia()
    if source.startswith("hf:"):
        return _hub(config)
    path = Path(source).expanduser()
    if not path.exists():
        raise CorpusError(f"no corpus at {path}: name a file, a folder, {EMBEDDED_TEXT} or hf:NAME")
    return _local(path, config.text_column)


def _local(path: Path, text_column: str) -> Iterator[tuple[str, str]]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{file.name}:{number}", _jsonl_text(file, number, line, text_column)
        elif file.suffix in (".txt", ".md"):
            yield file.name, file.read_text(encoding="utf-8", errors="replace")


def _jsonl_text(file: Path, number: int, line: str, text_column: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{file} line {number} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise CorpusError(f'{file} line {number} has no text field "{text_column}" (it has {keys})')
    return row[text_column]


def _hub(config: CorpusConfig) -> Iterator[tuple[str, str]]:
    from datasets import load_dataset

    name, _, subset = config.source.removeprefix("hf:").partition(":")
    try:
        rows = load_dataset(name, subset or None, split=config.hub_split, streaming=True)
        for number, row in enumerate(rows):
            yield str(row.get("title", f"{name}:{number}")), str(row[config.text_column])
    except KeyError as error:
        raise CorpusError(f"dataset {name} has no column {error}; set corpus.text_column") from None
    except (OSError, ValueError) as error:
        raise CorpusError(f"cannot read dataset {name}: {' '.join(str(error).split())[:300]}") from error


def _wikipedia() -> Iterator[tuple[str, str]]:
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
        for title, markup, _ in pages:
            if not markup.lstrip().lower().startswith("#redirect"):
                yield title, _clean_wikitext(wikicorpus.filter_wiki(markup))


def _clean_wikitext(text: str) -> str:
    """What gensim's filter leaves of the markup: bold and italic quotes, heading signs, runs of empty lines."""
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()
