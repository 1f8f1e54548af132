"""A store is shared as Parquet and taken in again; what was damaged or is no store is named."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeql.pipelines import Run
from saeql.pipelines.cli import main
from saeql.pipelines.share import ShareError, import_store
from saeql.store.feature_store import FeatureStore

VIEWS = ("features", "examples", "neighbours", "logit_effects", "labels", "metrics", "documents", "activations")


@pytest.fixture(scope="module")
def shared(tiny_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "store"
    main(["export", str(tiny_run), str(out), "--format", "parquet"])
    return out


def copy(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "copy"))


def test_round_trip_answers_alike(shared, tiny_run, tmp_path, capsys):
    main(["import", str(shared), str(tmp_path / "mine"), "--format", "parquet"])
    assert "features.duckdb" in capsys.readouterr().out
    with FeatureStore.open(tmp_path / "mine" / "features.duckdb") as mine, Run.open(tiny_run).store() as theirs:
        for view in VIEWS:
            query = f"SELECT * EXCLUDE (source) FROM {view} ORDER BY ALL" if view == "documents" else (
                f"SELECT * FROM {view} ORDER BY ALL"
            )  # fmt: skip
            assert mine.sql(query).equals(theirs.sql(query)), view


def test_no_path_of_this_machine_leaves_it(shared, tiny_run, tiny_corpus, tiny_model_folder):
    text = "".join(file.read_text() for file in shared.glob("*.*"))
    tables = [pq.read_table(file) for file in shared.rglob("*.parquet")]
    text += "".join(str(t[c].to_pylist()) for t in tables for c in t.column_names if t.schema.field(c).type == "string")
    for secret in (tiny_corpus.parent, tiny_model_folder.parent, tiny_run.parent):
        assert str(secret) not in text
    assert tiny_corpus.name in text


def test_the_card_has_front_matter_and_what_was_measured(shared, tiny_run):
    from huggingface_hub import DatasetCardData
    from huggingface_hub.repocard import RepoCard

    card = RepoCard((shared / "README.md").read_text(), ignore_metadata_errors=False)
    assert isinstance(card.data, object) and "sparse-autoencoder" in card.data.to_dict()["tags"]
    DatasetCardData(**card.data.to_dict())
    patterns = {c["config_name"]: c["data_files"] for c in card.data.to_dict()["configs"]}
    for pattern in patterns.values():
        assert list(shared.glob(pattern)), pattern
    assert "| fvu |" in card.text and Run.open(tiny_run).spec.name in card.text


def test_a_flipped_byte_is_named(shared, tmp_path):
    here = copy(shared, tmp_path)
    file = here / "evidence" / "neighbours.parquet"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ShareError, match=r"neighbours\.parquet.*100"):
        import_store(here, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../secret.parquet", "/etc/passwd", "evidence/../x.parquet", "features.duckdb"])
def test_a_list_that_names_other_files_is_refused(shared, tmp_path, name):
    here = copy(shared, tmp_path)
    hashes = json.loads((here / "hashes.json").read_text())
    hashes[name] = next(iter(hashes.values()))
    (here / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(ShareError, match="no evidence file"):
        import_store(here, tmp_path / "out")


def test_other_columns_missing_files_and_used_folders_are_refused(shared, tmp_path, tiny_run):
    from dataclasses import asdict

    from saeql.store.integrity import hash_file

    here = copy(shared, tmp_path)
    file = here / "evidence" / "neighbours.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(4, "cosine", table["cosine"].cast(pa.string())), file)
    hashes = json.loads((here / "hashes.json").read_text())
    hashes["evidence/neighbours.parquet"] = asdict(hash_file(file))
    (here / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(ShareError, match="'cosine' is string, not float"):
        import_store(here, tmp_path / "out")
    file.unlink()
    with pytest.raises(ShareError, match=r"neighbours\.parquet is missing"):
        import_store(here, tmp_path / "out")
    with pytest.raises(ShareError, match=r"hashes\.json is missing"):
        import_store(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["export", str(tiny_run), str(shared), "--format", "parquet"])
