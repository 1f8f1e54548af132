"""Documents, and the split that is decided before anything else: by a hash of each document's normalised text.

The same text is on the same side in every run, whatever source it comes from and whether it was stored as text or as
token ids; a conversation counts as the text of its messages, without the model's template. Several sources are mixed
by weights. A document is addressed by (source, index): reading can stop after any of them and go on from its state.
"""

import base64
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from saeql.sae.config import ConfigError, check_least, suggestion

from .text_sources import CONTENTS, EMBEDDED_TEXT, CorpusError, Row, SourceConfig, one_line, read_rows

__all__ = ["EMBEDDED_TEXT", "CorpusConfig", "CorpusError", "CorpusReader", "Document", "SourceConfig", "documents"]

BOS_RULES = ("window", "document", "never")
SEPARATORS = ("eos", "bos", "none")
#: Why a row gives no document.
LEFT_OUT = ("empty", "not_utf8", "duplicate", "template_refused")
_RECENT_DIGESTS = 2**16


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text is read, how it is put into windows, and how much of it."""

    source: str = EMBEDDED_TEXT
    """embedded:wikipedia, a file or folder (.txt .md .jsonl .ndjson, also .gz, .xz and .zst; .parquet; a saved dataset), or hf:NAME[:CONFIG][@REVISION]."""  # noqa: E501
    content: str = "text"
    """What a row holds: "text", "tokens" (ids of this model's tokenizer) or "chat" (messages, through the model's template)."""  # noqa: E501
    text_column: str = "text"
    """Field of a .jsonl line or dataset row that holds the text."""
    tokens_column: str = "input_ids"
    """Field of a row that holds token ids."""
    messages_column: str = "messages"
    """Field of a row that holds a list of messages with "role" and "content"."""
    split_column: str = ""
    """Field whose value decides the split in place of the text, for rows that are pieces of one document."""
    tokenizer_sha256: str = ""
    """Tokenizer that made the ids of "tokens"; unset reads it from the metadata of a Parquet file."""
    hub_split: str = "train"
    """Split of a hub or saved dataset to read; saeql's own splits are made from its documents."""
    mixture: tuple[SourceConfig, ...] = ()
    """Several sources in place of one: [[corpus.mixture]] tables with source, weight and the seven keys above."""
    bos: str = "window"
    """BOS stands at the start of every "window", before every "document" (windows then start anywhere), or "never"."""
    separator: str = "eos"
    """Token after every document: "eos", "bos" or "none"."""
    pack: bool = True
    """Windows run on over document borders; false starts every document in a window of its own and drops its tail."""
    drop_duplicates: bool = True
    """Leave out documents whose normalised text was read before (in the same part, see harvest.parts); takes 8 bytes of memory a document."""  # noqa: E501
    train_share: float = 0.7
    """Share of documents that the dictionary learns from and labels are made from."""
    calibration_share: float = 0.15
    """Share of documents that choices are made on; what is left is for testing."""
    max_document_tokens: int = 6000
    """Tokens taken of one document, so that long ones do not crowd out the rest."""
    max_tokens: int = 370_000
    """Tokens harvested over all splits, shared out like the documents; 0 takes everything."""

    def __post_init__(self) -> None:
        for key, choices in (("content", CONTENTS), ("bos", BOS_RULES), ("separator", SEPARATORS)):
            value = getattr(self, key)
            if value not in choices:
                raise ConfigError(
                    f"corpus.{key} must be one of {', '.join(choices)}; got {value!r}{suggestion(value, choices)}"
                )
        if self.mixture and self.source != EMBEDDED_TEXT:
            raise ConfigError(
                f"corpus.source ({self.source}) and [[corpus.mixture]] exclude each other: make it one of the mixture"
            )
        check_least(self, "corpus", max_document_tokens=1, max_tokens=0)
        for name in ("train_share", "calibration_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"corpus.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.train_share + self.calibration_share >= 1:
            raise ConfigError("corpus.train_share + corpus.calibration_share must leave a share for testing")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """What is read: the mixture, or the one source."""
        shared = {f.name: getattr(self, f.name) for f in fields(SourceConfig) if f.name != "weight"}
        return self.mixture or (SourceConfig(**shared),)

    @property
    def title(self) -> str:
        """The sources in words."""
        return " + ".join(s.source for s in self.sources)

    def split_shares(self) -> dict[str, float]:
        """Share of every split."""
        rest = 1 - self.train_share - self.calibration_share
        return {"train": self.train_share, "calibration": self.calibration_share, "test": rest}


@dataclass(frozen=True)
class Document:
    """One text with the side that it is on."""

    document_id: int
    split: str
    title: str
    text: str
    sha256: str  # of what decided the split
    source: int = 0  # its place in the mixture
    index: int = 0  # its row in that source
    token_ids: tuple[int, ...] | None = None  # where the source is pre-tokenised


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


def documents(config: CorpusConfig, tokenizer: Any = None) -> Iterator[Document]:
    """Documents of the sources in order, empty ones and repeats left out.

    Raises CorpusError where a source is missing or there is no document.
    """
    return iter(CorpusReader(config, tokenizer))


@dataclass
class SourceProgress:
    """How far one source has been read, and what became of its rows."""

    next_row: int = 0
    num_tokens: int = 0  # credited to it: what the mixture goes by
    num_documents: int = 0
    num_cut: int = 0  # documents of which only the first tokens were taken
    is_finished: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


class CorpusReader:
    """Iterates over the documents of a corpus; `state()` after a document is where another reader goes on.

    The next document comes from the source that is furthest behind its weight in tokens that `credit` counted, the
    first of them where several are: an order that depends on the text and the weights alone.

    `part` of `parts` reads every `parts`-th row of every source, from row `part` on: the parts are disjoint and
    together are the corpus. Repeats are found within a part.
    """

    def __init__(
        self,
        config: CorpusConfig,
        tokenizer: Any = None,
        *,
        tokenizer_sha256: str = "",
        state: dict[str, Any] | None = None,
        part: int = 0,
        parts: int = 1,
    ):
        self.config, self.tokenizer, self.tokenizer_sha256 = config, tokenizer, tokenizer_sha256
        self.part, self.parts = part, parts
        self.shares = config.split_shares()
        self.progress = [SourceProgress(next_row=part) for _ in config.sources]
        self.num_documents = 0
        self.seen = SeenDigests()
        if state is not None:
            self._restore(state)

    def __iter__(self) -> Iterator[Document]:
        sources = self.config.sources
        rows = [read_rows(s, p.next_row, self.parts) for s, p in zip(sources, self.progress, strict=True)]
        while (number := self._next_source(sources)) is not None:
            place = self.progress[number]
            row = next(rows[number], None)
            if row is None:
                place.is_finished = True
                if place.num_documents == 0 and self.parts == 1:
                    raise empty_source(sources[number].source, place.left_out)
                continue
            index, place.next_row = place.next_row, place.next_row + self.parts
            document = self._document(sources[number], number, index, row)
            if document is not None:
                place.num_documents += 1
                self.num_documents += 1
                yield document

    def credit(self, document: Document, num_tokens: int, *, is_cut: bool = False) -> None:
        """Count tokens taken of a document towards its source's share; `is_cut`: it was longer than allowed."""
        place = self.progress[document.source]
        place.num_tokens += num_tokens
        place.num_cut += is_cut

    def report(self) -> list[dict[str, Any]]:
        """What became of every source's rows: documents, tokens, and those left out by reason."""
        return [
            {
                "source": source.source,
                "content": source.content,
                "weight": source.weight,
                "num_rows": (p.next_row - self.part) // self.parts,
                "num_documents": p.num_documents,
                "num_tokens": p.num_tokens,
                "num_cut": p.num_cut,
                "left_out": {why: p.left_out[why] for why in LEFT_OUT},
            }
            for source, p in zip(self.config.sources, self.progress, strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Plain form of the place after the last document handed out, for JSON."""
        seen = base64.b64encode(self.seen.sorted().tobytes()).decode()
        return {**self.position(), "seen": seen}

    def position(self) -> dict[str, Any]:
        """`state` without the digests of what was read, for who keeps those elsewhere (`seen`)."""
        sources = [{**vars(p), "left_out": dict(p.left_out)} for p in self.progress]
        return {"num_documents": self.num_documents, "sources": sources}

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["sources"]) != len(self.progress):
            raise CorpusError(
                f"the state is of a corpus of {len(state['sources'])} sources, this one has {len(self.progress)}"
            )
        self.num_documents = state["num_documents"]
        self.progress = [SourceProgress(**{**s, "left_out": Counter(s["left_out"])}) for s in state["sources"]]
        if "seen" in state:
            self.seen.update(np.frombuffer(base64.b64decode(state["seen"]), "<u8"))

    def _next_source(self, sources: Sequence[SourceConfig]) -> int | None:
        left = [n for n, p in enumerate(self.progress) if not p.is_finished]
        return min(left, key=lambda n: self.progress[n].num_tokens / sources[n].weight, default=None)

    def _document(self, source: SourceConfig, number: int, index: int, row: Row) -> Document | None:
        """The document of a row; None, counted, where it gives none."""
        left_out = self.progress[number].left_out
        if row.fields is None:
            left_out["not_utf8"] += 1
            return None
        try:
            found = self._content(source, row)
            text_sha256 = document_sha256(found.hashed)
            sha256 = document_sha256(str(row.fields.get(source.split_column))) if source.split_column else text_sha256
        except UnicodeEncodeError:  # a half of a surrogate pair, which JSON can spell
            left_out["not_utf8"] += 1
            return None
        except _TemplateRefused:
            left_out["template_refused"] += 1
            return None
        if not found.text.strip():
            left_out["empty"] += 1
            return None
        if self.config.drop_duplicates and not self.seen.add(int(text_sha256[:16], 16)):
            left_out["duplicate"] += 1
            return None
        title = str(row.fields.get("title") or row.title)
        split = split_of(sha256, self.shares)
        document_id = self.num_documents * self.parts + self.part
        return Document(document_id, split, title, found.text, sha256, number, index, found.token_ids)

    def _content(self, source: SourceConfig, row: Row) -> "_Content":
        assert row.fields is not None
        value = row.fields[source.column]
        if source.content == "tokens":
            return self._tokens(source, row, value)
        if source.content == "chat":
            return self._chat(row, value)
        if value is not None and not isinstance(value, str):
            raise CorpusError(f'{row.place} has no text field "{source.column}": it is {type(value).__name__}')
        text = (value or "").strip()
        return _Content(text, text)

    def _tokens(self, source: SourceConfig, row: Row, value: Any) -> "_Content":
        if self.tokenizer is None:
            raise CorpusError(f"{source.source}: token ids can be read only together with a model's tokenizer")
        if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
            raise CorpusError(f'{row.place}: "{source.column}" is no list of token ids')
        mine, theirs = self.tokenizer_sha256, source.tokenizer_sha256 or row.tokenizer_sha256
        if theirs != mine:
            said = f"were made by tokenizer {theirs[:16]}" if theirs else "do not say which tokenizer made them"
            raise CorpusError(
                f"{row.place}: the ids {said}, the model's is {mine[:16]}; set corpus.tokenizer_sha256 = "
                f'"{mine}" if it was this one, else give text'
            )
        size = len(self.tokenizer)
        wrong = next((i for i in value if not 0 <= i < size), None)
        if wrong is not None:
            raise CorpusError(f"{row.place}: token id {wrong} is outside the vocabulary of {size}")
        text = self.tokenizer.decode(value, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        return _Content(text, text, tuple(value))

    def _chat(self, row: Row, value: Any) -> "_Content":
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise CorpusError(f'the model\'s tokenizer has no chat template: {row.place} needs content = "text"')
        if value is not None and not (isinstance(value, list) and all(isinstance(m, dict) for m in value)):
            raise CorpusError(f"{row.place}: messages are no list of {{role, content}}")
        spoken = [m for m in value or () if isinstance(m.get("role"), str) and isinstance(m.get("content"), str)]
        if len(spoken) != len(value or ()):
            raise CorpusError(f'{row.place}: a message lacks "role" or "content" as text')
        if not any(m["content"].strip() for m in spoken):
            return _Content("", "")
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(spoken, tokenize=False)
        except TemplateError as error:
            raise _TemplateRefused(one_line(error)) from None
        return _Content(text, "\n".join(f"{m['role']}: {m['content'].strip()}" for m in spoken))


def empty_source(source: str, left_out: Mapping[str, int]) -> CorpusError:
    """The error of a source without a document."""
    left = "".join(f", {count} {why}" for why, count in left_out.items())
    return CorpusError(f"the corpus {source} is empty: no document with text in it{left}")


class SeenDigests:
    """A set of 64-bit numbers in eight bytes each: sorted arrays of growing size, the newest numbers in a set."""

    def __init__(self):
        self._arrays: list[np.ndarray] = []  # uint64, sorted, each more than twice as long as the next
        self._recent: set[int] = set()
        self._new: list[int] | None = None

    def add(self, digest: int) -> bool:
        """Put a number in; False where it was there."""
        if digest in self._recent or any(_holds(array, digest) for array in self._arrays):
            return False
        self._recent.add(digest)
        if self._new is not None:
            self._new.append(digest)
        if len(self._recent) >= _RECENT_DIGESTS:
            self.update(np.zeros(0, np.uint64))
        return True

    def update(self, digests: np.ndarray) -> None:
        """Put in many numbers [n] that are not there."""
        merged = np.sort(np.concatenate([digests, np.fromiter(self._recent, np.uint64, len(self._recent))]))
        self._recent.clear()
        while self._arrays and len(self._arrays[-1]) <= 2 * len(merged):
            merged = np.sort(np.concatenate([self._arrays.pop(), merged]))
        self._arrays.append(merged)

    def take_new(self) -> np.ndarray:
        """Numbers [n] that `add` put in since the last call, in that order; the first call only begins to note them."""
        taken = np.array(self._new or [], np.uint64)
        self._new = []
        return taken

    def sorted(self) -> np.ndarray:
        """All numbers, sorted."""
        self.update(np.zeros(0, np.uint64))
        return np.sort(np.concatenate(self._arrays)).astype("<u8")


def _holds(array: np.ndarray, digest: int) -> bool:
    at = int(np.searchsorted(array, np.uint64(digest)))
    return at < len(array) and int(array[at]) == digest


class _TemplateRefused(Exception):
    """The model's chat template does not take a conversation (two turns of one role, a role that it lacks)."""


@dataclass(frozen=True)
class _Content:
    text: str
    hashed: str  # what decides split and sameness
    token_ids: tuple[int, ...] | None = None


def document_sha256(text: str) -> str:
    """Hash of a document's normalised text: what decides its split, and whether it was read before."""
    return hashlib.sha256(normalise(text).encode("utf-8")).hexdigest()
