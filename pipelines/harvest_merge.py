"""Finished parts of a harvest -> the run's shards and evidence.

Every step can be done again after it was interrupted, by whoever comes next, and gives the same bytes: the order is
that of the parts and of their sets, whoever harvested them, and shards are moved, not copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from saeql.store.evidence import Evidence, PartWriter
from saeql.store.manifest import NewManifest, check_size
from saeql.store.records import SPLITS, TABLES
from saeql.store.shards import ShardReader

from .atomic import remove_leftovers, sync
from .corpus import LEFT_OUT, CorpusConfig, CorpusError, empty_source
from .harvest_part import HarvestPart
from .models import LanguageModel

TABLES_OF_HARVEST = ("documents", "windows", "vocabulary", "split_rows")
_MEDIAN_ROWS = 8192


def shard_folder(activations: Path, hook_point: str, split: str) -> Path:
    """Where the shards of a hook point and split are."""
    return activations / hook_point / split


@dataclass(frozen=True)
class Merger:
    """Puts the parts of one harvest together."""

    parts: Sequence[HarvestPart]
    folder: Path  # activations of the run
    hook_points: Sequence[str]
    context_tokens: int

    def require_every_split(self, corpus: CorpusConfig) -> None:
        """Raise CorpusError unless every source has a document and every split a window."""
        for source in self.sources():
            if source["is_finished"] and source["num_documents"] == 0:
                raise empty_source(source["source"], {why: n for why, n in source["left_out"].items() if n})
        found = {split for part in self.parts for commit in part.commits() for _, split, _ in commit.shards}
        missing = [split for split in SPLITS if split not in found]
        if missing:
            num_documents = sum(source["num_documents"] for source in self.sources())
            raise CorpusError(
                f"the corpus {corpus.title} is too small: no window of {self.context_tokens} tokens for the split "
                f"{missing[0]!r} ({num_documents} documents); add text or lower harvest.context_tokens"
            )

    def sources(self) -> list[dict[str, Any]]:
        """What became of every source's rows, over all parts."""
        merged: list[dict[str, Any]] = []
        for state in self._states():
            progress = state["reader"]["sources"]
            reports = [{**r, "is_finished": p["is_finished"]} for r, p in zip(state["report"], progress, strict=True)]
            merged = [_added(a, b) for a, b in zip(merged, reports, strict=True)] if merged else reports
        return merged

    def num_dropped_tail_tokens(self) -> int:
        """Tokens of windows that were never full."""
        packers = (packer for state in self._states() for packer in state["packers"].values())
        return sum(len(packer["token_ids"]) + packer["num_dropped"] for packer in packers)

    def num_batch_halvings(self) -> int:
        """Times that memory ran out in a forward pass."""
        return sum(state.get("num_batch_halvings", 0) for state in self._states())

    def _states(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            last = part.last()
            assert last is not None and last.is_last, part.folder
            yield last.state

    def move_shards(self) -> None:
        """Give every shard its place and number, and publish them in one manifest for each hook point and split."""
        manifests, counts = {}, {}
        for hook_point in self.hook_points:
            for split in SPLITS:
                target = shard_folder(self.folder, hook_point, split)
                target.mkdir(parents=True, exist_ok=True)
                remove_leftovers(target)
                manifests[hook_point, split], counts[hook_point, split] = NewManifest(target), 0
        for part in self.parts:
            for commit in part.commits():
                for hook_point, split, record in commit.shards:
                    moved = replace(record, file=f"shard-{counts[hook_point, split]:05d}.h5")
                    manifest = manifests[hook_point, split]
                    source = part.shard_path(hook_point, split, record.file)
                    if source.exists():  # not moved by a merge that was interrupted
                        source.replace(manifest.folder / moved.file)
                    check_size(manifest.folder, moved)
                    manifest.add(moved)
                    counts[hook_point, split] += 1
        for manifest in manifests.values():
            manifest.publish()

    def median_norm(self, hook_point: str) -> float:
        """Median norm of the first training rows in stored order, first positions of windows left out."""
        reader, found, count = ShardReader(shard_folder(self.folder, hook_point, "train")), [], 0
        for shard in range(len(reader)):
            found.append(reader.norms(shard).reshape(-1, self.context_tokens)[:, 1:].ravel())
            count += len(found[-1])
            if count >= _MEDIAN_ROWS:
                break
        return float(np.median(np.concatenate(found)[:_MEDIAN_ROWS]))

    def write_evidence(self, evidence: Evidence, lm: LanguageModel, norm_limits: Mapping[str, float]) -> None:
        """Write the tables of a harvest, one set in memory at a time; durable when this returns."""
        if evidence.folder.exists():
            remove_leftovers(evidence.folder)
        documents: dict[str, int] = dict.fromkeys(SPLITS, 0)
        with _table(evidence, "documents") as table:
            for part in self.parts:
                for rows in part.documents():
                    table.add(rows)
                    for split in rows["split"].value_counts().to_pylist():
                        documents[split["values"]] += split["counts"]
        with _table(evidence, "windows") as table:
            for rows in self._windows():
                table.add(rows)
        ids = list(range(len(lm.tokenizer)))
        evidence.write("vocabulary", pa.table({"token_id": ids, "token": lm.token_texts(ids)}))
        rows = [{"split": s, "num_documents": documents[s], **self._row_counts(s, norm_limits)} for s in SPLITS]
        evidence.write("split_rows", pa.Table.from_pylist(rows))
        for path in (*(evidence.path(table) for table in TABLES_OF_HARVEST), evidence.folder):
            sync(path)

    def _windows(self) -> Iterator[pa.Table]:
        """Windows of every set, by their ids: they are in the shards of any hook point."""
        hook_point = self.hook_points[0]
        readers = {split: ShardReader(shard_folder(self.folder, hook_point, split)) for split in SPLITS}
        following: dict[str, int] = dict.fromkeys(SPLITS, 0)
        for part in self.parts:
            for commit in part.commits():
                tables = []
                for hook, split, record in commit.shards:
                    if hook == hook_point:
                        tables.append(_window_rows(readers[split], following[split], split, record.context_tokens))
                        following[split] += 1
                if tables:
                    yield pa.concat_tables(tables).sort_by("window_id")

    def _row_counts(self, split: str, norm_limits: Mapping[str, float]) -> dict[str, int]:
        readers = {name: ShardReader(shard_folder(self.folder, name, split)) for name in norm_limits}
        num_windows = num_massive = 0
        for shard, record in enumerate(next(iter(readers.values())).records):
            massive = np.zeros((record.windows, record.context_tokens), bool)
            for name, reader in readers.items():
                massive |= reader.norms(shard).reshape(massive.shape) > norm_limits[name]
            num_windows += record.windows
            num_massive += int(massive[:, 1:].sum())
        num_rows = num_windows * self.context_tokens
        return {
            "num_windows": num_windows,
            "num_rows": num_rows,
            "num_kept_rows": num_rows - num_windows - num_massive,
            "num_first_position_rows": num_windows,
            "num_massive_rows": num_massive,
        }


class _table:
    """A table's file, written piece by piece; it exists if the block ends well."""

    def __init__(self, evidence: Evidence, name: str):
        evidence.folder.mkdir(parents=True, exist_ok=True)
        self._writer = PartWriter(evidence.path(name), TABLES[name])

    def __enter__(self) -> PartWriter:
        return self._writer

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._writer.publish()
        else:
            self._writer.discard()


def _window_rows(reader: ShardReader, shard: int, split: str, context_tokens: int) -> pa.Table:
    ids = reader.window_ids(shard)
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values), context_tokens).cast(pa.list_(pa.int32()))
        for name, values in (("token_ids", reader.token_ids(shard)), ("document_ids", reader.document_ids(shard)))
    }
    return pa.table({"window_id": ids, "split": [split] * len(ids), **lists})


def _added(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two parts' reports of one source as one."""
    counts = {key: a[key] + b[key] for key in ("num_rows", "num_documents", "num_tokens", "num_cut")}
    left_out = {why: a["left_out"][why] + b["left_out"][why] for why in LEFT_OUT}
    return {**a, **counts, "left_out": left_out, "is_finished": a["is_finished"] and b["is_finished"]}
