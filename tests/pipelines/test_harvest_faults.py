"""Harvests that are killed, starved of disk, or shared by processes of which some die: nothing lost, nothing twice."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from saeql.pipelines import Run, load_config
from saeql.pipelines.cli import main
from saeql.pipelines.verify import verify_run
from saeql.store.evidence import Evidence
from saeql.store.shards import ShardReader

#: Small sets, so that there are some thirty of them.
OVERRIDES = {"harvest.windows_per_shard": "16", "harvest.batch_windows": "4"}
HOOKS = {"model.more_hook_points": '["mlp_out.0"]'}


def new_run(tiny_config: Path, folder: Path, **more: str) -> Path:
    Run.create(folder, load_config(tiny_config, {**OVERRIDES, **HOOKS, **more}))
    return folder


def files(run: Path) -> dict[str, bytes]:
    """Everything that a harvest leaves, and the record of its hashes."""
    kept = [p for folder in ("activations", "evidence") for p in (run / folder).rglob("*") if p.is_file()]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in (*kept, run / "hashes.json")}


@pytest.fixture(scope="module")
def expected(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a harvest that nothing interrupted."""
    run = new_run(tiny_config, tmp_path_factory.mktemp("whole") / "run")
    main(["harvest", str(run)])
    return files(run)


@pytest.fixture(scope="module")
def expected_in_parts(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same of one process and four parts."""
    run = new_run(tiny_config, tmp_path_factory.mktemp("parts") / "run", **{"harvest.parts": "4"})
    main(["harvest", str(run)])
    return files(run)


def assert_whole(run: Path, expected: dict[str, bytes]) -> None:
    """The same files with the same bytes, every row once, hashes that hold, and nothing left over."""
    found = files(run)
    assert sorted(found) == sorted(expected)
    assert [name for name, content in found.items() if content != expected[name]] == []
    assert not list(run.rglob("*.tmp.*"))
    checked = verify_run(run)
    assert checked.damage == [] and checked.unrecorded == []
    ids = Evidence(run / "evidence").read("windows")["window_id"].to_pylist()
    for hook_point in Run.open(run).config.model.hook_points:
        stored = [
            int(i)
            for split in ("train", "calibration", "test")
            for reader in [ShardReader(run / "activations" / hook_point / split)]
            for shard in range(len(reader))
            for i in reader.window_ids(shard)
        ]
        assert len(set(stored)) == len(stored) and sorted(stored) == sorted(ids)


def there(run: Path, pattern: str) -> list[Path]:
    """Files of a run in which a process renames folders meanwhile."""
    while True:
        try:
            return list(run.glob(pattern))
        except FileNotFoundError:
            continue


def num_sets(run: Path) -> int:
    return len(there(run, "activations/parts/*/commit-*.json"))


def moments(run: Path, rng: random.Random) -> list[Callable[[], bool]]:
    """When to kill: as soon as one of these is so, and some milliseconds later."""
    begun, limit, sets = time.monotonic(), rng.uniform(0.05, 4.0), num_sets(run) + rng.randint(1, 12)
    at_end = rng.choice([
        lambda: bool(there(run, "activations/parts/merge.held.*")),
        lambda: bool(there(run, "activations/*/*/manifest.jsonl*")),
        lambda: (run / "evidence" / "documents.parquet").exists(),
        lambda: bool(there(run, "evidence/windows.parquet*")),
        lambda: (run / "activations" / "harvest.json").exists(),
    ])  # fmt: skip
    return [lambda: time.monotonic() - begun > limit, lambda: num_sets(run) >= sets, at_end]


def kill_at(process: BaseProcess, is_time: Callable[[], bool], rng: random.Random) -> bool:
    """Kill a process at a moment; False where it ended before."""
    while process.is_alive() and not is_time():
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join(600)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_until(kills: int, seed: int, folder: Path, tiny_config: Path, start: Any, expected: dict[str, bytes]) -> None:
    rng, killed, harvests = random.Random(seed), 0, 0
    while killed < kills:
        run = new_run(tiny_config, folder / f"run-{harvests}")
        process, interrupted = start("harvest", run), True
        while interrupted and killed < kills:
            interrupted = kill_at(process, moments(run, rng)[killed % 3], rng)
            killed += interrupted
            if interrupted:
                assert [line for line in verify_run(run).damage if "was interrupted" not in line] == []
                process = start("harvest", run, "--resume")
        process.join(600)
        assert process.exitcode == 0
        assert_whole(run, expected)
        shutil.rmtree(run)
        harvests += 1


def test_a_harvest_that_is_killed_ends_with_the_same_bytes(
    tmp_path: Path, tiny_config: Path, start: Any, expected: dict[str, bytes]
):
    kill_until(3, 0, tmp_path, tiny_config, start, expected)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_harvest_that_is_killed_thirty_times_ends_with_the_same_bytes(
    seed: int, tmp_path: Path, tiny_config: Path, start: Any, expected: dict[str, bytes]
):
    kill_until(10, seed, tmp_path, tiny_config, start, expected)


def test_processes_share_the_parts_and_one_of_them_dies(
    tmp_path: Path, tiny_config: Path, start: Any, expected_in_parts: dict[str, bytes]
):
    config = new_run(tiny_config, tmp_path / "other", **{"harvest.parts": "4"}) / "config.toml"
    run = tmp_path / "run"  # which they make
    workers = [start("harvest", run, "--config", config, "--join") for _ in range(3)]
    assert kill_at(workers[0], lambda: num_sets(run) >= 3, random.Random(0))
    for worker in workers[1:]:
        worker.join(600)
        assert worker.exitcode == 0
    assert_whole(run, expected_in_parts)
    assert list(Run.open(run).finished()) == ["harvest"]
    late = start("harvest", run, "--join")
    late.join(600)
    assert late.exitcode == 0 and files(run) == expected_in_parts


def test_a_process_that_slept_while_its_part_was_finished_changes_nothing(
    tmp_path: Path, tiny_config: Path, start: Any, expected_in_parts: dict[str, bytes]
):
    run = new_run(tiny_config, tmp_path / "run", **{"harvest.parts": "4"})
    sleeper = start("harvest", run, "--join", "--lease-seconds", "2")
    while num_sets(run) < 2:
        time.sleep(0.001)
        assert sleeper.is_alive()
    os.kill(sleeper.pid, signal.SIGSTOP)
    held = next(run.glob("activations/parts/*.held.*")).name
    other = start("harvest", run, "--join", "--lease-seconds", "2")
    other.join(600)
    assert other.exitcode == 0
    assert_whole(run, expected_in_parts)
    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.join(600)
    assert sleeper.exitcode == 0 and held.startswith("0000")
    assert_whole(run, expected_in_parts)


def test_a_killed_worker_s_parts_are_finished_by_a_run_alone(
    tmp_path: Path, tiny_config: Path, start: Any, expected_in_parts: dict[str, bytes]
):
    run = new_run(tiny_config, tmp_path / "run", **{"harvest.parts": "4"})
    assert kill_at(start("harvest", run, "--join"), lambda: num_sets(run) >= 5, random.Random(1))
    main(["harvest", str(run), "--resume"])
    assert_whole(run, expected_in_parts)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_line_and_the_harvest_goes_on_when_there_is_room(
    tmp_path: Path, tiny_config: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
):
    with small_disk(tmp_path / "disk", "3m") as disk:
        run = new_run(tiny_config, disk / "run")
        with pytest.raises(SystemExit) as stopped:
            main(["harvest", str(run)])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(lines) == 1
        assert "no space left, the shard was not published" in lines[0] and "shard-" in lines[0]
        assert num_sets(run) > 3 and not list(run.rglob("activations/**/*.tmp.*"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        main(["harvest", str(run), "--resume"])
        assert_whole(run, expected)


def test_a_file_that_may_not_grow_is_one_line_and_the_harvest_goes_on(
    tmp_path: Path, tiny_config: Path, start: Any, expected: dict[str, bytes]
):
    """A limit on the size of files, set while the harvest runs: a failing disk that needs no rights to make."""
    run = new_run(tiny_config, tmp_path / "run")
    process = start("harvest", run)
    while num_sets(run) < 3:
        time.sleep(0.001)
        assert process.is_alive()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    process.join(600)
    assert process.exitcode == 2
    main(["harvest", str(run), "--resume"])
    assert_whole(run, expected)


def interrupted(tiny_config: Path, folder: Path, start: Any, **more: str) -> Path:
    run = new_run(tiny_config, folder, **more)
    assert kill_at(start("harvest", run), lambda: num_sets(run) >= 3, random.Random(2))
    return run


def refused(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["harvest", str(run), "--resume"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


def test_what_was_begun_otherwise_is_not_gone_on_with(
    tmp_path: Path,
    tiny_config: Path,
    tiny_model_folder: Path,
    tiny_corpus: Path,
    start: Any,
    capsys: pytest.CaptureFixture[str],
):
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    text = Path(shutil.copy(tiny_corpus, tmp_path / "text.jsonl"))
    more = {"model.name": str(model), "corpus.source": str(text)}
    run = interrupted(tiny_config, tmp_path / "run", start, **more)

    config = (run / "config.toml").read_text()
    for old, new, message in (
        ("windows_per_shard = 16", "windows_per_shard = 17", r"harvest.windows_per_shard = 16, now it is 17"),
        ("max_document_tokens = 6000", "max_document_tokens = 50", "corpus.max_document_tokens = 6000, now it is 50"),
        ('["mlp_out.0"]', '["mlp_out.1"]', "model.hook_points = ['resid_post.1', 'mlp_out.0'], now it is"),
        ('dtype = "float32"', 'dtype = "bfloat16"', "the model's dtype = 'float32', now it is 'bfloat16'"),
    ):
        changed = config.replace(old, new) if old in config else config.replace('[\n    "mlp_out.0",\n]', new)
        assert changed != config
        (run / "config.toml").write_text(changed)
        assert message in refused(run, capsys)
    (run / "config.toml").write_text(config)

    size = text.stat().st_size
    text.write_text(text.read_text() + json.dumps({"text": "one more"}) + "\n")
    line = refused(run, capsys)
    assert f"1 files, {size} bytes" in line and f"1 files, {text.stat().st_size} bytes" in line
    shutil.copy(tiny_corpus, text)

    for name, what in (("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")):
        content = (model / name).read_bytes()
        if what == "weights":
            (model / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            (model / name).write_bytes(content.replace(b"river", b"rivet"))
        line = refused(run, capsys)
        assert what in line and "now it is" in line and len(line.split("= '")[1].split("'")[0]) == 64
        (model / name).write_bytes(content)
    before = num_sets(run)
    main(["harvest", str(run), "--resume"])
    assert before >= 3 and num_sets(run) == 0 and verify_run(run).damage == []


def test_a_damaged_shard_of_an_interrupted_harvest_is_named(tmp_path: Path, tiny_config: Path, start: Any):
    run = interrupted(tiny_config, tmp_path / "run", start)
    shard = next(run.glob("activations/parts/*/*/train/shard-00001.h5"))
    content = shard.read_bytes()
    shard.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    (line,) = [line for line in verify_run(run).damage if "was interrupted" not in line]
    assert f"{shard} differs at byte 1000" in line


def test_run_again_goes_on_and_harvest_starts_anew(
    tmp_path: Path, tiny_config: Path, start: Any, expected: dict[str, bytes]
):
    run = interrupted(tiny_config, tmp_path / "run", start)
    kept = {p.name: p.stat().st_ino for p in run.glob("activations/parts/*/resid_post.1/train/*.h5")}
    assert [stage for stage, _ in Run.open(run).execute(("harvest",))] == ["harvest"]
    assert_whole(run, expected)
    moved = {p.stat().st_ino for p in (run / "activations" / "resid_post.1" / "train").glob("*.h5")}
    # what was there is kept, not made again; the newest may have been written when its set was not committed yet
    assert len(kept) >= 3 and {kept[name] for name in sorted(kept)[:-1]} <= moved
    main(["harvest", str(run)])
    again = {p.stat().st_ino for p in (run / "activations" / "resid_post.1" / "train").glob("*.h5")}
    assert files(run) == expected and len(again) == len(moved)
