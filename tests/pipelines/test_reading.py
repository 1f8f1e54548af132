"""Reading in sets: from every mark another reader goes on with exactly what follows; parts are the corpus, divided."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from saeql.pipelines import corpus as corpus_file
from saeql.pipelines.corpus import CorpusConfig, CorpusReader, SeenDigests
from saeql.pipelines.harvest_config import HarvestConfig
from saeql.pipelines.reading import WindowBatch, WindowReader, one_ahead

from .test_text_sources import KINDS, read, written


class Words:
    """Ids of words: enough of a tokenizer to read with."""

    chat_template = None

    def __init__(self):
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.ids.setdefault(word, 10 + len(self.ids)) for word in text.split()]}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 90 words, some empty, some twice."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("texts")
    for name, count in (("a", 60), ("b", 25)):
        words = [" ".join(f"w{i}" for i in random.integers(0, 500, random.integers(0, 90))) for _ in range(count)]
        lines = [json.dumps({"text": text}) for text in [*words, words[3], *words[:2]]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def reader(texts: Path, tokenizer: Words, rules: dict[str, Any], **options: Any) -> WindowReader:
    lm: Any = SimpleNamespace(
        tokenizer=tokenizer, bos_id=1, separator_id=2, identity=SimpleNamespace(tokenizer_sha256="")
    )
    rules = {"source": str(texts / "a.jsonl"), "max_tokens": 0, "train_share": 0.5, "calibration_share": 0.25, **rules}
    if "mixture" in rules:
        del rules["source"]
    config = HarvestConfig(context_tokens=8, batch_windows=3, windows_per_shard=10, parts=rules.pop("parts", 1))
    return WindowReader(lm, CorpusConfig(**rules), config, **options)


def plain(batch: WindowBatch) -> tuple[Any, ...]:
    mark = batch.mark and (json.dumps(batch.mark.state), batch.mark.documents, batch.mark.seen.tolist())
    arrays = (batch.splits, batch.token_ids, batch.document_ids, batch.window_ids)
    return (*(a.tolist() for a in arrays), mark, batch.mark is not None and batch.mark.is_last)


def mixture(texts: Path) -> tuple[corpus_file.SourceConfig, ...]:
    return tuple(
        corpus_file.SourceConfig(source=str(texts / f"{name}.jsonl"), weight=weight)
        for name, weight in (("a", 2.0), ("b", 1.0))
    )


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"pack": False},
        {"bos": "document", "separator": "bos"},
        {"max_tokens": 700},
        {"max_tokens": 700, "max_document_tokens": 20, "drop_duplicates": False},
        {"mixture": True, "max_tokens": 1200, "parts": 2},
    ],
    ids=str,
)
def test_from_every_mark_reading_goes_on_exactly(texts: Path, rules: dict[str, Any]):
    if "mixture" in rules:
        rules = {**rules, "mixture": mixture(texts)}
    tokenizer = Words()
    for part in range(rules.get("parts", 1)):
        whole = list(reader(texts, tokenizer, dict(rules), part=part).batches())
        marks = [n for n, batch in enumerate(whole) if batch.mark is not None]
        assert len(marks) >= 3 and marks[-1] == len(whole) - 1
        expected = [plain(batch) for batch in whole]
        for n in marks[:-1]:
            sets = [whole[m].mark for m in marks if m <= n]
            state = json.loads(json.dumps(sets[-1].state))  # pyright: ignore[reportOptionalMemberAccess]
            seen = (mark.seen for mark in sets)  # pyright: ignore[reportOptionalMemberAccess]
            rest = reader(texts, tokenizer, dict(rules), part=part, state=state, seen=seen)
            assert [plain(batch) for batch in rest.batches()] == expected[n + 1 :]


def test_sets_end_when_a_split_has_its_windows(texts: Path):
    counts: dict[str, int] = {}
    for batch in reader(texts, Words(), {}).batches():
        for split in batch.splits.tolist():
            counts[split] = counts.get(split, 0) + 1
        assert batch.mark is not None or max(counts.values()) < 10
        if batch.mark is not None:
            assert batch.mark.is_last or 10 <= max(counts.values()) < 13
            counts = {}


def test_parts_share_nothing_and_are_the_whole(texts: Path):
    found, ids = [], set()
    for part in range(3):
        tokenizer, mine = Words(), []
        for batch in reader(texts, tokenizer, {"parts": 3, "drop_duplicates": False}, part=part).batches():
            mine += batch.mark.documents if batch.mark else []
            assert not ids & set(batch.window_ids.tolist()) and (batch.window_ids % 3 == part).all()
            ids |= set(batch.window_ids.tolist())
        found.append(mine)
    whole = []
    for batch in reader(texts, Words(), {"drop_duplicates": False}).batches():
        whole += batch.mark.documents if batch.mark else []
    together = [document for part in found for document in part]
    assert len({document["document_id"] for document in together}) == len(together) == len(whole)
    assert sorted(d["sha256"] for d in together) == sorted(d["sha256"] for d in whole)


def test_parts_share_the_budget(texts: Path):
    taken = []
    for part in range(3):
        documents = [d for b in reader(texts, Words(), {"parts": 3, "max_tokens": 600}, part=part).batches()
                     for d in (b.mark.documents if b.mark else [])]  # fmt: skip
        taken.append(sum(d["num_tokens"] for d in documents))
    assert all(abs(tokens - 200) <= 3 for tokens in taken)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_is_divided_by_rows(tmp_path: Path, kind: str):
    source = str(written(tmp_path, kind))
    whole = {d.index: d.text for d in read(source=source, drop_duplicates=False)[0]}
    found: dict[int, str] = {}
    for part in range(4):
        divided = CorpusReader(CorpusConfig(source=source, drop_duplicates=False), part=part, parts=4)
        mine = {d.index: d.text for d in divided}
        assert all(index % 4 == part for index in mine)
        found |= mine
        assert divided.report()[0]["num_rows"] == len(range(part, 6, 4))
    assert found == whole


def test_seen_digests_are_a_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus_file, "_RECENT_DIGESTS", 16)
    random = np.random.default_rng(0)
    numbers = [int(n) for n in random.integers(0, 2**64 - 1, 300, dtype=np.uint64, endpoint=True) // 2**55 * 2**55]
    seen, expected = SeenDigests(), set()
    seen.take_new()
    for number in numbers:
        assert seen.add(number) == (number not in expected)
        expected.add(number)
    assert seen.sorted().tolist() == sorted(expected) == sorted(seen.take_new().tolist())
    assert len(seen.take_new()) == 0
    again = SeenDigests()
    again.update(np.array(sorted(expected), np.uint64))
    assert not any(again.add(number) for number in numbers)


def test_one_ahead_keeps_order_and_passes_errors_on():
    def items() -> Iterator[int]:
        yield from range(5)
        raise KeyError("at the end")

    taken = []
    with pytest.raises(KeyError, match="at the end"):
        for item in one_ahead(items()):
            taken.append(item)
    assert taken == [0, 1, 2, 3, 4]
