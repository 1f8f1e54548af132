"""What is done of a label stage that has not ended: one that was stopped or killed goes on behind it.

    RUN/label.parts/key                        hash of all that the parts were made of
    RUN/label.parts/candidates.0.predicates.0.json   what an explainer proposed, a block of features a file
    RUN/label.parts/choices.json               which candidate is a feature's label
    RUN/label.parts/labels.<hash>.parquet ...  the labels with their scores; the receipts of one control

Each part is a function of its key, and of the parts before it, so what comes out is the same with and without.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from saeql.sae.config import to_dict
from saeql.store.integrity import hash_file

from .atomic import remove_folder, remove_leftovers, write_whole
from .explainers.base import Candidate
from .label_choice import Choice
from .output import note
from .predicates import Predicate

if TYPE_CHECKING:
    from .run import Run

LABEL_WORK = "label.parts"
#: What took less is sooner made again than read.
LEAST_SECONDS = 5.0
#: Evidence that labels are not made of: what the stage writes, and what is made later.
_NOT_READ = ("labels", "receipts", "metrics", "runs")

T = TypeVar("T")


class LabelParts:
    """Parts of one label stage. Without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None, key: str = ""):
        """Parts in `folder` of another key are removed."""
        self.folder, self.key = folder, key
        if folder is not None and folder.exists():
            file = folder / "key"
            if file.exists() and file.read_text(encoding="utf-8") == key:
                remove_leftovers(folder)
                found = len([*folder.iterdir()]) - 1
                note(f"label: going on with {found} part{'s' if found != 1 else ''} that {folder} holds")
            else:
                remove_folder(folder)

    @classmethod
    def of(cls, run: "Run", only: str | None) -> "LabelParts":
        """Of the label stage of `run` with its configuration; `only` as in `LabelOptions`."""
        return cls(run.path / LABEL_WORK, _key_of(run, only))

    def kept(self, name: str, make: Callable[[], T], dump: Callable[[T], bytes], load: Callable[[bytes], T]) -> T:
        """What `make` gives, from its file where there is a whole one. `load(dump(x))` has to equal x."""
        if self.folder is None:
            return make()
        file = self.folder / name
        if file.exists():
            try:
                return load(file.read_bytes())
            except (ValueError, LookupError, TypeError):  # not what was written: made again
                file.unlink()
        started = time.monotonic()
        made = make()
        if time.monotonic() - started >= LEAST_SECONDS:
            self._begin()
            write_whole(file, dump(made))
        return made

    def _begin(self) -> None:
        assert self.folder is not None
        if not self.folder.exists():
            self.folder.mkdir()
            write_whole(self.folder / "key", self.key)

    def candidates(self, name: str, make: Callable[[], Mapping[int, list[Candidate]]]) -> Mapping[int, list[Candidate]]:
        """Candidates by feature."""

        def dump(found: Mapping[int, list[Candidate]]) -> bytes:
            return json.dumps({f: [_candidate(c) for c in own] for f, own in found.items()}).encode()

        def load(content: bytes) -> dict[int, list[Candidate]]:
            return {int(f): [_candidate_of(c) for c in own] for f, own in json.loads(content).items()}

        return self.kept(f"candidates.{name}.json", make, dump, load)

    def choices(self, make: Callable[[], dict[int, Choice]]) -> dict[int, Choice]:
        """Labels by feature."""

        def dump(found: dict[int, Choice]) -> bytes:
            return json.dumps({f: [_candidate(c.candidate), c.f1, c.auroc] for f, c in found.items()}).encode()

        def load(content: bytes) -> dict[int, Choice]:
            return {int(f): Choice(_candidate_of(c), f1, auroc) for f, (c, f1, auroc) in json.loads(content).items()}

        return self.kept("choices.json", make, dump, load)

    def features(self, make: Callable[[], list[int]]) -> list[int]:
        """The features of `only`: those of the labels that were there when the stage began; kept however short."""
        if self.folder is None:
            return make()
        file = self.folder / "features.json"
        if not file.exists():
            self._begin()
            write_whole(file, json.dumps(make()))
        return json.loads(file.read_text(encoding="utf-8"))

    def table(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        """A table, such as the receipts of a control."""
        return self.kept(f"{name}.parquet", make, _dump_table, lambda content: pq.read_table(pa.BufferReader(content)))

    def remove(self) -> None:
        """The stage has ended."""
        if self.folder is not None:
            remove_folder(self.folder)


def hash_of(table: pa.Table) -> str:
    """Short hash of a table's content."""
    return hashlib.sha256(_dump_table(table)).hexdigest()[:16]


def _dump_table(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _candidate(c: Candidate) -> list[Any]:
    return [c.label, c.kind, c.explainer, None if c.predicate is None else c.predicate.to_json()]


def _candidate_of(parts: list[Any]) -> Candidate:
    label, kind, explainer, predicate = parts
    return Candidate(label, kind, explainer, _predicate_of(predicate) if predicate else None)


@cache
def _predicate_of(text: str) -> Predicate:
    return Predicate.from_json(text)


def _key_of(run: "Run", only: str | None) -> str:
    """Everything that a label stage reads, by content: text and activations, dictionary, configuration, the code."""
    digest = hashlib.sha256(json.dumps([run.spec.name, only, to_dict(run.config)], default=str).encode())
    evidence = run.evidence.folder
    files = [f for f in evidence.rglob("*.parquet") if f.relative_to(evidence).parts[0].split(".")[0] not in _NOT_READ]
    files += [*evidence.glob("activations/*.parquet")]  # where the folder is a link
    files += [f for f in run.dictionary_path.glob("*") if f.is_file()]
    files += [run.activations / "harvest.json", Path(run.config.label.bank)]
    files += Path(__file__).parent.rglob("*.py")
    for file in sorted({f for f in files if f.is_file()}):
        digest.update(f"{file.name} {hash_file(file).sha256}\n".encode())
    return digest.hexdigest()
