"""Shuffled reading of shards: mixed over documents, within its budget, the same from any cursor."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saeql.pipelines.sources import ShardSource
from saeql.store.shards import ShardError, ShardReader, ShardWriter

T, D, WINDOWS = 16, 24, 320
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 windows in shards of 7, four windows a document; a row's first value is its place in the files."""
    folder = tmp_path_factory.mktemp("shards")
    acts = np.random.default_rng(0).standard_normal((WINDOWS, T, D), dtype=np.float32)
    acts[:, :, 0] = np.arange(WINDOWS * T).reshape(WINDOWS, T)
    ids = np.arange(WINDOWS * T, dtype=np.int32).reshape(WINDOWS, T)
    owners = np.repeat(np.arange(WINDOWS, dtype=np.int32) // 4, T).reshape(WINDOWS, T)
    with ShardWriter(folder, d_in=D, context_tokens=T, attributes={}, windows_per_shard=7, dtype="float32") as writer:
        writer.append(acts, ids, owners, np.arange(WINDOWS, dtype=np.int32), np.ones((WINDOWS, T), np.float32))
    return folder


def source(folder: Path, **options) -> ShardSource:
    options = {
        "batch_tokens": 64,
        "shuffle_seed": 5,
        "block_rows": 64,
        "buffer_bytes": 2 * (D * 4 + 40) * 1280,
        **options,
    }
    return ShardSource({"a": folder}, norm_limits={"a": 2.0}, **options)


def test_every_row_comes_with_its_own_origin(folder: Path):
    places = []
    for batch in source(folder, shuffle_seed=None).batches():
        place = batch.acts[:, 0].int()
        assert place.equal(batch.token_ids) and (place % T).equal(batch.positions.int())
        assert (place // T).equal(batch.window_ids) and (place // T // 4).equal(batch.document_ids)
        places.append(place)
    assert torch.cat(places).tolist() == [n for n in range(WINDOWS * T) if n % T]
    shuffled = source(folder).batches()
    for _ in range(100):
        batch = next(shuffled)
        assert batch.acts[:, 0].int().equal(batch.token_ids)
        assert (batch.token_ids // T // 4).equal(batch.document_ids) and bool((batch.positions > 0).all())


def test_a_group_with_less_than_a_batch_is_passed_over(tmp_path: Path):
    """Where many rows are massive some groups keep less than a batch: the stream goes on with the next."""
    norms = np.ones((80, T), np.float32)
    norms[:30] = 9
    with ShardWriter(tmp_path, d_in=D, context_tokens=T, attributes={}, windows_per_shard=7, dtype="float32") as writer:
        acts, ids = np.zeros((80, T, D), np.float32), np.arange(80 * T, dtype=np.int32).reshape(80, T)
        writer.append(acts, ids, ids, np.arange(80, dtype=np.int32), norms)
    options = {"batch_tokens": 130, "block_rows": 16, "buffer_bytes": 2 * (D * 4 + 40) * 240}
    batches = source(tmp_path, **options).batches()
    drawn = [next(batches) for _ in range(12)]
    seen = {n for batch in drawn for n in batch.token_ids.tolist()}
    assert len({(b.cursor.epoch, b.cursor.group) for b in drawn}) < 6 * drawn[-1].cursor.epoch  # of six groups an epoch
    assert min(seen) >= 30 * T
    with pytest.raises(ValueError, match="fewer than one batch of 200"):
        next(source(tmp_path, **{**options, "batch_tokens": 200}).batches())


def test_batches_mix_documents_as_independent_draws_would(folder: Path):
    batches = source(folder).batches()
    drawn = [next(batches) for _ in range(18 * 4)]  # one epoch: four groups of 1200 kept rows, 18 batches of each
    distinct = np.mean([len(b.document_ids.unique()) for b in drawn])
    # a group holds 20 blocks of 64 rows, which are 20 of the 80 documents: 20 (1 - (1 - 1/20)^64) = 19.2
    assert distinct == pytest.approx(20 * (1 - (1 - 1 / 20) ** 64), abs=0.4)
    place = torch.cat([b.token_ids for b in drawn]).double()
    ranks = torch.stack([torch.arange(len(place)).double(), place.argsort().argsort().double()])
    assert abs(float(torch.corrcoef(ranks)[0, 1])) < 0.35  # of four groups: which blocks come first is chance
    for group in range(4):
        inside = place[group * 1152 : (group + 1) * 1152]
        ranks = torch.stack([torch.arange(1152).double(), inside.argsort().argsort().double()])
        assert abs(float(torch.corrcoef(ranks)[0, 1])) < 4 / 1152**0.5
    in_order = next(iter(source(folder, shuffle_seed=None).batches()))
    assert len(in_order.document_ids.unique()) == 1


def test_a_stream_goes_on_from_any_cursor(folder: Path):
    stream = source(folder).batches()
    whole = [next(stream) for _ in range(160)]  # over two epochs
    for stop in (1, 17, 18, 73, 130):
        rest = source(folder).batches(whole[stop - 1].cursor)
        for expected in whole[stop : stop + 20]:
            batch = next(rest)
            assert batch.acts.equal(expected.acts) and batch.cursor == expected.cursor


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_hold_their_share_of_the_rows_and_give_those_of_one_process(
    num_ranks: int, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    taken, room = [], ShardSource._room
    monkeypatch.setattr(ShardSource, "_room", lambda self, rows: taken.append(rows) or room(self, rows))
    options = {"batch_tokens": 66, "first_positions": True}
    alone = source(folder, **options).batches()
    ranks = [source(folder, rank=rank, num_ranks=num_ranks, **options).batches() for rank in range(num_ranks)]
    for _ in range(18 * 6):  # six groups
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert torch.cat([part.acts for part in parts]).equal(whole.acts)
        for name in ("token_ids", "document_ids", "window_ids", "positions"):
            assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(whole, name)), name
        assert {part.cursor for part in parts} == {whole.cursor}
    assert taken[:2] == [1280, 1280] and set(taken[2:]) == {1280 // 66 * (66 // num_ranks)}


def test_batches_stay_what_they_were(folder: Path):
    stream = source(folder).batches()
    kept = [next(stream) for _ in range(80)]
    assert all(batch.acts[:, 0].int().equal(batch.token_ids) for batch in kept)


@pytest.mark.parametrize(("hold", "rooms"), [(False, 2), (True, 3)])
def test_memory_is_filled_again_only_where_nobody_holds_a_batch_of_it(
    hold: bool, rooms: int, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    taken, room = [], ShardSource._room
    monkeypatch.setattr(ShardSource, "_room", lambda self, rows: taken.append(rows) or room(self, rows))
    stream = source(folder).batches()
    first = next(stream)
    held = [first] if hold else []
    place, first = first.token_ids, None
    for _, batch in zip(range(18 * 6), stream, strict=False):  # six groups
        assert batch.acts[:, 0].int().equal(batch.token_ids)
    assert len(taken) == rooms
    assert all(batch.acts[:, 0].int().equal(place) for batch in held)


def test_a_buffer_that_is_too_small_is_refused_with_the_least_size(folder: Path):
    with pytest.raises(ShardError, match=r"shuffle_buffer_bytes = 1000 .* set at least 34816$"):
        next(source(folder, buffer_bytes=1000).batches())
    next(source(folder, buffer_bytes=34816).batches())


def test_mapped_shards_hold_no_descriptors_and_closed_streams_no_thread(folder: Path):
    import threading

    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = ShardReader(folder)
    total = sum(float(reader.acts(shard)[0, 0]) for shard in range(len(reader)))
    assert len(reader) == 46 and total > 0 and len(list(Path("/proc/self/fd").iterdir())) == before
    stream = source(folder).batches()
    next(stream)
    del stream
    assert not any(t.name.startswith("shard-reader") for t in threading.enumerate())


def test_anonymous_memory_stays_within_the_budget(tmp_path: Path):
    import json

    out = tmp_path / "out.json"
    options = {"gigabytes": 0.6, "d-in": 256, "steps": 60, "buffer-bytes": 400_000_000, "folder": tmp_path, "json": out}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "scripts" / "bench_shards.py"), "--memory", *flags]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(out.read_text())["memory"]
    assert found["groups_read"] > 0.5 and found["cache_bytes"] > 5e8
    assert 0.5 < found["share_of_budget"] < 1.15
