"""`saeql verify`: every kind of file of a finished run, damaged in turn."""

import re
import shutil
from pathlib import Path

import pytest

from saeql.pipelines import Run
from saeql.pipelines.cli import main
from saeql.pipelines.verify import HASHES_FILE, recorded, verify_run
from saeql.sae.checkpoint import _file_hash
from saeql.store.integrity import FileHash, hash_file

KINDS = {
    "shard": "activations/*/train/shard-00000.h5",
    "manifest": "activations/*/test/manifest.jsonl",
    "harvest": "activations/harvest.json",
    "weights": "dictionaries/*/sae_weights.safetensors",
    "dictionary config": "dictionaries/*/cfg.json",
    "checkpoint": "checkpoints/*/tensors.safetensors",
    "checkpoint state": "checkpoints/*/state.json",
    "evidence": "evidence/documents.parquet",
    "activations": "evidence/activations/*.parquet",
    "store": "features.duckdb",
    "configuration": "config.toml",
}


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("verify") / "run")


def test_a_finished_run_is_whole(run: Path, capsys: pytest.CaptureFixture[str]):
    main(["verify", str(run)])
    out = capsys.readouterr().out
    assert re.fullmatch(r"\d+ files, 0\.\d+ GB: all whole\n", out)
    on_disk = sum(p.is_file() for p in run.rglob("*")) - 4 - len(list(run.glob("checkpoints/*/hashes.json")))
    assert int(out.split()[0]) == on_disk  # all but .lock, stages.json and the hashes, the store's too


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_and_a_cut_end_are_named(run: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    path = sorted(run.glob(KINDS[kind]))[0]
    whole = path.read_bytes()
    place = len(whole) // 3
    try:
        for damaged, message in (
            (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], f"differs at byte {place}"),
            (whole[:place], rf"is truncated: (it ends at byte )?{place}"),
            (None, "is missing"),
        ):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            found = verify_run(run).damage
            assert any(re.search(rf"{re.escape(str(path))} {message}", line) for line in found), found
        if kind == "shard":
            with pytest.raises(SystemExit) as stopped:
                main(["verify", str(run)])
            assert stopped.value.code == 1
            assert str(path) in capsys.readouterr().err
    finally:
        path.write_bytes(whole)


def test_a_damaged_record_is_named(run: Path):
    path = run / HASHES_FILE
    whole = path.read_text()
    path.write_text(whole.replace("sha256", "sha257", 1))
    assert any("hashes.json is damaged" in line for line in verify_run(run).damage)
    path.write_text(whole)
    assert verify_run(run).damage == []


def test_an_interrupted_stage_is_named_and_another_run_of_it_mends(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(KeyError), recorded(copy, "label"):
        (copy / "evidence" / "labels.parquet").write_bytes(b"half")
        raise KeyError
    (line,) = verify_run(copy).damage
    assert "labels.parquet is truncated" in line and "the stage label was interrupted" in line
    list(Run.open(copy).execute(("label",), again=True))
    assert verify_run(copy).damage == []


def test_what_an_interrupted_stage_removed_or_finished_is_forgotten_and_what_was_lost_before_is_not(
    run: Path, tmp_path: Path
):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "evidence" / "documents.parquet").unlink()  # no stage did that
    for _ in range(2):  # interrupted twice
        with pytest.raises(KeyError), recorded(copy, "label"):
            (copy / "evidence" / "neighbours.parquet").unlink(missing_ok=True)
            (copy / "evidence" / "labels.parquet").write_bytes(b"done, and left as it is by the next start")
            raise KeyError
    with recorded(copy, "label"):
        pass
    (line,) = verify_run(copy).damage
    assert "documents.parquet is missing" in line
    assert verify_run(copy).unrecorded == []


def test_a_store_that_is_rebuilt_outside_of_a_stage_stays_whole(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    Run.open(copy).build_store(rebuild=True)
    assert verify_run(copy).damage == [] and verify_run(copy).unrecorded == []
    (copy / "features.duckdb.hash.json").write_text("{")
    assert any("hash.json is damaged" in line for line in verify_run(copy).damage)


def test_a_link_to_what_is_gone_is_a_missing_file(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    documents = copy / "evidence" / "documents.parquet"
    documents.unlink()
    documents.symlink_to(tmp_path / "unmounted" / "documents.parquet")
    list(Run.open(copy).execute(("report",), again=True))
    assert verify_run(copy).damage == [f"{documents} is missing"]


def test_files_without_a_hash_are_listed(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "notes.txt").write_text("mine")
    assert verify_run(copy).unrecorded == ["notes.txt"]


def test_checkpoints_and_the_store_hash_alike(run: Path):
    path = next(run.glob("checkpoints/*/tensors.safetensors"))
    assert FileHash(**_file_hash(path)) == hash_file(path)
