"""Training straight from the model: the rows that a harvest stores, mixed, within the budget, exact from any cursor."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeql.pipelines import Run
from saeql.pipelines.corpus import CorpusError
from saeql.pipelines.harvest import open_source
from saeql.pipelines.live_source import LiveError, LiveSource
from saeql.pipelines.models import load_model
from saeql.sae.stream import ActivationBatch, Cursor
from saeql.store.shards import ShardReader

PLACE = "resid_post.1"
T, D = 32, 32
WINDOW_BYTES = T * (D * 4 + 40)


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return Run.open(tiny_run)


def num_windows(run: Run) -> int:
    return ShardReader(run.activations / PLACE / "train").num_windows


def live(run: Run, *, groups: int = 4, **options) -> LiveSource:
    """A source whose text takes about `groups` groups."""
    room = (2 if options.get("overlap") else 1) * WINDOW_BYTES * (num_windows(run) // groups + 8)
    options = {"batch_tokens": 64, "seed": 5, "buffer_bytes": room, "corpus": run.config.corpus, **options}
    limits = {PLACE: run.harvest_info.norm_limit(PLACE)}
    return LiveSource(
        run.language_model, {PLACE: D}, options.pop("corpus"), run.config.harvest, norm_limits=limits, **options
    )


def first(batches: Iterator[ActivationBatch], count: int) -> list[ActivationBatch]:
    return [next(batches) for _ in range(count)]


def first_epoch(source: LiveSource) -> list[ActivationBatch]:
    found = []
    for batch in source.batches():
        if batch.cursor.epoch and batch.cursor != Cursor(1):
            break
        found.append(batch)
    return found


def rows_of(batches: list[ActivationBatch]) -> tuple[np.ndarray, np.ndarray]:
    """Origins [N, 3] and activations [N, d], in the order of their origins."""
    columns = [torch.cat([getattr(b, name) for b in batches]).long().numpy()
               for name in ("document_ids", "positions", "token_ids")]  # fmt: skip
    acts = torch.cat([b.acts for b in batches]).float().numpy()
    order = np.lexsort((*acts.T[:2], *columns))
    return np.stack(columns, 1)[order], acts[order]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("max_tokens", [0, 4000])
def test_the_first_epoch_has_the_rows_that_a_harvest_stores(run: Run, tmp_path: Path, pack: bool, max_tokens: int):
    config = run.config
    if not pack or max_tokens:
        corpus = replace(config.corpus, pack=pack, max_tokens=max_tokens)
        run = Run.create(tmp_path / "run", replace(config, corpus=corpus))
        run.harvest()
    with live(run, batch_tokens=1, groups=3) as source:
        origins, acts = rows_of(first_epoch(source))
    stored = open_source(run.activations, "train", run.harvest_info, [PLACE], 512)
    expected_origins, expected = rows_of(list(stored.batches()))
    assert len(origins) == len(expected_origins) > 2000
    assert (origins == expected_origins).all()
    np.testing.assert_allclose(acts, expected, rtol=1e-5, atol=1e-6)


def test_massive_rows_are_left_out_and_windows_are_numbered(run: Run):
    limits = {PLACE: run.harvest_info.median_norms[PLACE]}
    with live(run) as source:
        every = first(source.batches(), 8)
        source.norm_limits = limits
        kept = first(source.batches(Cursor(1)), 8)
    assert max(float(b.acts.norm(dim=1).max()) for b in every) > 1.1 * limits[PLACE]
    assert all(float(b.acts.norm(dim=1).max()) <= limits[PLACE] * 1.0001 for b in kept)
    assert all(bool((b.positions > 0).all()) for b in every)
    assert all(int(b.window_ids.max()) < num_windows(run) for b in every)


def test_batches_mix_documents_as_independent_draws_would(run: Run):
    with live(run, groups=3) as source:
        batches = first_epoch(source)
        tokens = source.group_windows * T
    groups: dict[int, list[ActivationBatch]] = {}
    for batch in batches:
        groups.setdefault(int(batch.window_ids.min()) * T // tokens, []).append(batch)
    assert len(groups) >= 3
    for members in groups.values():
        owners = torch.cat([b.document_ids for b in members])
        share = owners.bincount().double() / len(owners)
        expected = float((1 - (1 - share) ** 64).sum())
        distinct = np.mean([len(b.document_ids.unique()) for b in members])
        assert distinct == pytest.approx(expected, abs=1.5) and distinct > 20
        place = torch.cat([b.window_ids for b in members]).double()
        ranks = torch.stack([torch.arange(len(place)).double(), place.argsort().argsort().double()])
        assert abs(float(torch.corrcoef(ranks)[0, 1])) < 4 / len(place) ** 0.5


def test_epochs_read_the_text_again_in_other_groups(run: Run):
    with live(run) as source:
        whole = first(source.batches(), 400)
    epochs = [b.cursor.epoch for b in whole]
    assert epochs == sorted(epochs) and epochs[-1] >= 2
    groups = {e: {b.cursor.group for b in whole if b.cursor.epoch == e and b.cursor.offset} for e in (0, 1)}
    assert all(len(g) >= 3 for g in groups.values())
    places = {e: {b.cursor.place["start"]["num_taken"] for b in whole
                  if b.cursor.place and b.cursor.epoch == e and b.cursor.group} for e in (0, 1)}  # fmt: skip
    assert places[0] != places[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_goes_on_bit_for_bit_from_any_cursor(run: Run, overlap: bool):
    with live(run, overlap=overlap) as source:
        whole = first(source.batches(), 400)  # over two epochs
    assert whole[-1].cursor.epoch >= 2
    ends = [n for n, b in enumerate(whole) if b.cursor.offset == 0]
    for stop in (1, 17, *(ends[0] + d for d in (0, 1, 2)), 130):
        state = json.loads(json.dumps(whole[stop - 1].cursor.state()))
        with live(run, overlap=overlap) as source:
            rest = first(source.batches(Cursor.from_state(state)), 12)
        for expected, batch in zip(whole[stop : stop + 12], rest, strict=True):
            assert batch.acts.equal(expected.acts) and batch.cursor == expected.cursor
            assert batch.token_ids.equal(expected.token_ids) and batch.window_ids.equal(expected.window_ids)


def test_a_second_stream_of_a_source_starts_over_and_the_group_in_memory_is_not_computed_again(run: Run):
    counted = []
    counter = run.language_model.model.model.embed_tokens.register_forward_pre_hook(
        lambda _m, args: counted.append(len(args[0]))
    )
    try:
        with live(run) as source:
            one = first(source.batches(), 3)
            num = sum(counted)
            two = first(source.batches(), 3)
            assert sum(counted) == num == source.group_windows
    finally:
        counter.remove()
    assert all(a.acts.equal(b.acts) for a, b in zip(one, two, strict=True))


def test_filling_ahead_in_a_thread_gives_the_same_rows_and_ends_with_the_block(run: Run):
    with live(run) as source:
        alone = first(source.batches(), 90)
    with live(run, overlap=True) as source:
        ahead = first(source.batches(), 90)
        assert any(t.name.startswith("live-model") for t in threading.enumerate())
    assert all(a.acts.equal(b.acts) and a.cursor == b.cursor for a, b in zip(alone, ahead, strict=True))
    assert not any(t.name.startswith("live-model") for t in threading.enumerate())


def test_an_error_of_the_thread_reaches_training(run: Run):
    def fail(_module: torch.nn.Module, args: tuple) -> None:
        if threading.current_thread().name.startswith("live-model"):
            raise RuntimeError("of the model")

    hook = run.language_model.model.model.embed_tokens.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="of the model"), live(run, overlap=True) as source:
            first(source.batches(), 90)
    finally:
        hook.remove()


def test_groups_are_of_one_size_and_none_is_computed_for_nothing(run: Run):
    wanted = 40 * 64
    with live(run, groups=1, wanted_rows=wanted) as source:
        assert source.group_windows == 88  # 2560 rows of 31 a window, a batch that may be left out, in passes of 8
        whole = first(source.batches(), 40)
    assert {b.cursor.group for b in whole} == {0}
    with live(run, groups=4) as source:
        full = source.group_windows
    with live(run, groups=4, wanted_rows=int(1.5 * full * (T - 1))) as source:
        assert full * 0.75 <= source.group_windows < full * 0.95


def test_what_cannot_be_done_is_one_line(run: Run, tmp_path: Path):
    with pytest.raises(LiveError, match=r"shuffle_buffer_bytes = 1000 .* set at least 43008$"):
        live(run, buffer_bytes=1000)
    live(run, buffer_bytes=43008)
    with pytest.raises(LiveError, match="does not come from a live model"), live(run) as source:
        next(source.batches(Cursor(0, 1, 64)))
    with pytest.raises(LiveError, match=r"fewer rows than one batch of 100000; lower train\.batch_tokens"):  # noqa: SIM117
        with live(run, batch_tokens=100_000, buffer_bytes=10**9) as source:
            next(source.batches())
    with pytest.raises(CorpusError, match="no window of 32 tokens for the split 'train'"):  # noqa: SIM117
        with live(run, corpus=replace(run.config.corpus, max_tokens=20)) as source:
            next(source.batches())


def test_another_text_behind_the_same_cursor_is_refused(run: Run, tmp_path: Path):
    with live(run) as source:
        cursor = first(source.batches(), 30)[-1].cursor
    text = Path(run.config.corpus.source).read_text().replace("river", "stone")
    file = tmp_path / "text.jsonl"
    file.write_text(text)
    message = r"text\.jsonl changed since the checkpoint: from window \d+ on its tokens have hash"
    with (
        live(run, corpus=replace(run.config.corpus, source=str(file))) as source,
        pytest.raises(LiveError, match=message),
    ):
        next(source.batches(cursor))


def test_a_mixture_is_read_in_the_order_of_a_harvest(run: Run, tmp_path: Path):
    from saeql.pipelines.corpus import SourceConfig

    lines = Path(run.config.corpus.source).read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:80]))
    (tmp_path / "b.jsonl").write_text("".join(lines[80:]))
    sources = tuple(SourceConfig(source=str(tmp_path / f"{n}.jsonl"), weight=w) for n, w in (("a", 1.0), ("b", 3.0)))
    corpus = replace(run.config.corpus, source="embedded:wikipedia", mixture=sources, max_tokens=9000)
    other = Run.create(tmp_path / "run", replace(run.config, corpus=corpus))
    other.harvest()
    with live(other, batch_tokens=1, groups=2) as source:
        origins, _ = rows_of(first_epoch(source))
    stored = open_source(other.activations, "train", other.harvest_info, [PLACE], 512)
    assert (origins == rows_of(list(stored.batches()))[0]).all()


def test_parts_share_the_text_out_and_another_number_of_them_begins_the_next_epoch(run: Run):
    with live(run, batch_tokens=1) as source:
        every = {tuple(row) for row in rows_of(first_epoch(source))[0][:, :1].tolist()}
    owners, cursors = [], []
    for part in range(2):
        with live(run, batch_tokens=1, part=part, parts=2) as source:
            batches = first_epoch(source)
            owners.append({tuple(row) for row in rows_of(batches)[0][:, :1].tolist()})
            cursors.append(batches[20].cursor)
    assert not owners[0] & owners[1]
    assert len(owners[0]) + len(owners[1]) == pytest.approx(len(every), abs=2)  # but for the last windows
    with live(run, part=1, parts=2) as source:
        following = next(source.batches(cursors[0]))
        assert following.acts.equal(next(source.batches(Cursor(1))).acts)
        assert not following.acts.equal(next(source.batches(Cursor(0))).acts)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_that_should_stop_ends_in_the_middle_of_a_group(run: Run, overlap: bool):
    passes = []
    counter = run.language_model.model.model.embed_tokens.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with live(run, overlap=overlap, should_stop=lambda: len(passes) > 3) as source:
            assert list(source.batches()) == [] and len(passes) <= 5
        passes.clear()
        with live(run, groups=3, overlap=overlap, should_stop=lambda: len(passes) > 20) as source:
            batches = list(source.batches())
            assert 10 * 8 < source.group_windows < 20 * 8 and 20 < len(passes) <= 22
    finally:
        counter.remove()
    assert batches and {b.cursor.epoch for b in batches} == {0} and batches[-1].cursor.offset == 0
    with live(run, groups=3, overlap=overlap) as source:
        whole = first(source.batches(), len(batches) + 1)
    with live(run, groups=3, overlap=overlap) as source:
        assert next(source.batches(batches[-1].cursor)).acts.equal(whole[-1].acts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_fills_ahead_on_a_stream_of_its_own_and_gives_the_rows_of_a_cpu(run: Run):
    config = replace(run.config.model, device="cuda", dtype="float32")
    limits = {PLACE: run.harvest_info.norm_limit(PLACE)}
    room = 2 * WINDOW_BYTES * (num_windows(run) // 4 + 8)
    on_gpu = LiveSource(
        load_model(config), {PLACE: D}, run.config.corpus, run.config.harvest,
        batch_tokens=64, norm_limits=limits, seed=5, buffer_bytes=room,
    )  # fmt: skip
    with on_gpu as source, live(run, overlap=True) as other:
        assert source.overlap and source.group_windows == other.group_windows
        mine = first(source.batches(), 200)
        for batch, expected in zip(mine, first(other.batches(), 200), strict=True):
            assert batch.acts.is_cuda and batch.cursor == expected.cursor
            assert batch.token_ids.equal(expected.token_ids)
            torch.testing.assert_close(batch.acts.cpu(), expected.acts, rtol=1e-3, atol=1e-4)
        cursor = mine[99].cursor
        for batch, expected in zip(first(source.batches(cursor), 30), mine[100:130], strict=True):
            torch.testing.assert_close(batch.acts, expected.acts, rtol=1e-5, atol=1e-6)


MEMORY = """
import json, sys, threading
from pathlib import Path
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from saeql.pipelines.corpus import CorpusConfig
from saeql.pipelines.harvest import HarvestConfig
from saeql.pipelines.live_source import LiveSource
from saeql.pipelines.models import LanguageModel, ModelConfig, load_model

folder, corpus, overlap, budget = sys.argv[1], sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
lm = load_model(ModelConfig(name=folder, hook_point="resid_post.0", dtype="float32"))
torch.manual_seed(0)
lm.model = LlamaForCausalLM(LlamaConfig(
    vocab_size=len(lm.tokenizer), hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4))


def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


source = LiveSource(lm, {"resid_post.0": 256}, CorpusConfig(source=corpus, max_tokens=0),
                    HarvestConfig(context_tokens=64), batch_tokens=1024, norm_limits={"resid_post.0": 1e9}, seed=0,
                    buffer_bytes=budget, overlap=overlap)
with source:
    source.forward.run(np.ones((16, 64), np.int32))  # memory of the forward pass is not the buffer's
    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    stream, groups = source.batches(), set()
    while len(groups) < 3:
        cursor = next(stream).cursor
        groups.add((cursor.epoch, cursor.group))
    done.set()
    watcher.join()
print(json.dumps({"share": (peak[0] - before) / budget, "windows": source.group_windows}))
"""


@pytest.mark.parametrize("overlap", [False, True])
def test_anonymous_memory_stays_within_the_budget(
    tiny_model_folder: Path, tiny_corpus: Path, tmp_path: Path, overlap: bool
):
    lines = tiny_corpus.read_text().splitlines()
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(line.replace('"}', f' {n}"}}') for n in range(25) for line in lines) + "\n")
    command = [sys.executable, "-c", MEMORY, str(tiny_model_folder), str(many), str(overlap), "240000000"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["windows"] * 64 * (256 * 4 + 40) * (1 + overlap) <= 240_000_000
    assert 0.6 < found["share"] < 1.15
