"""Adding to a store: what is new comes in, what is there is not made again, and the result is what a build gives."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeql.store.errors import StoreError
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore

VIEWS = ("features", "examples", "activations", "document_activations", "cofirings", "feature_stats", "labels",
         "neighbours", "logit_effects", "documents", "windows", "tokens", "metrics", "receipts", "corpora")  # fmt: skip


def everything(path: Path) -> dict[str, list[dict]]:
    with FeatureStore.open(path) as store:
        return {view: store.sql(f"SELECT * FROM {view} ORDER BY ALL").to_pylist() for view in VIEWS}


def only(evidence: Evidence, folder: Path, name: str) -> Evidence:
    """A folder with one dictionary of another folder."""
    made = Evidence(folder)
    for table in ("documents", "windows", "vocabulary", "split_rows"):
        made.write(table, evidence.read(table))
    for table in ("dictionaries", "activations", "logit_effects", "neighbours", "labels", "metrics"):
        rows = evidence.read(table)
        made.write(
            table, rows.filter(pa.array([d == name for d in rows["dictionary"].to_pylist()])), part=f"part-{name}"
        )
    return made


def test_nothing_to_do(evidence: Evidence, tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    assert FeatureStore.sync(path, evidence) == ["built anew: there was none"]
    before = path.stat()
    assert FeatureStore.sync(path, evidence) == []
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


def test_a_dictionary_is_added(evidence: Evidence, store_path: Path, tmp_path: Path, synthetic) -> None:
    folders = [only(evidence, tmp_path / name, name) for name in ("topk", "other")]
    path = tmp_path / "s.duckdb"
    FeatureStore.sync(path, folders[:1])
    assert FeatureStore.sync(path, folders) == ["other"]
    assert everything(path) == everything(store_path)
    assert FeatureStore.sync(path, folders) == []


def test_folders_may_hold_the_same(evidence: Evidence, store_path: Path, tmp_path: Path) -> None:
    folders = [evidence, only(evidence, tmp_path / "again", "topk")]
    path = FeatureStore.build(tmp_path / "s.duckdb", folders)
    assert everything(path) == everything(store_path) and FeatureStore.sync(path, folders) == []


def test_a_corpus_is_added(evidence: Evidence, tmp_path: Path, synthetic) -> None:
    second = synthetic.write(tmp_path / "second", synthetic.Size(windows=30, dictionaries=("topk",)), seed=5)
    path = FeatureStore.build(tmp_path / "s.duckdb", evidence)
    alone = everything(FeatureStore.build(tmp_path / "alone.duckdb", second))
    before = everything(path)
    assert FeatureStore.sync(path, [evidence, second]) == ["text", "topk"]
    after = everything(path)
    assert [r["corpus"] for r in after["corpora"]] == ["text", "text (2)"]
    assert after["features"] == before["features"]  # of the first corpus
    for view in ("examples", "activations", "feature_stats", "cofirings"):
        assert [r for r in after[view] if r["corpus"] == "text"] == before[view]
        moved = [r | {"corpus": "text"} for r in after[view] if r["corpus"] == "text (2)"]
        assert len(moved) == len(alone[view])
        for got, wanted in zip(moved, alone[view], strict=True):
            shift = {"window_id": 60, "document_id": 1 + max(r["document_id"] for r in before["documents"])}
            expected = {k: v + shift.get(k, 0) if v is not None and k in shift else v for k, v in wanted.items()}
            assert got | {"title": None} == expected | {"title": None}
    with FeatureStore.open(path) as store:
        assert store.dictionaries()[0]["corpora"] == ["text", "text (2)"]
        assert {e.corpus for e in store.examples(3)} == {"text"}
        assert {e.corpus for e in store.examples(3, corpus="text (2)")} == {"text (2)"}


def test_labels_and_receipts_are_added(bare_evidence: Evidence, tmp_path: Path, synthetic) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)
    labelled = synthetic.write(tmp_path / "labelled", synthetic.Size(), metrics=False)
    bare_evidence.write("labels", labelled.read("labels"))
    row = {"dictionary": "topk", "feature": 3, "control": "shuffled", "value": 0.51, "threshold": 0.6, "n": 100,
           "low": 0.4, "high": 0.6, "verdict": "passed", "detail": None}  # fmt: skip
    bare_evidence.write("receipts", pa.Table.from_pylist([row]))
    assert sorted(FeatureStore.sync(path, bare_evidence)) == ["labels", "receipts"]
    assert everything(path) == everything(FeatureStore.build(tmp_path / "again.duckdb", bare_evidence))
    with FeatureStore.open(path) as store:
        assert store.search("streams")[0].feature == 3
        assert store.sql("SELECT * FROM receipts").to_pylist() == [row]


def test_a_table_that_is_gone_is_gone_from_the_store(bare_evidence: Evidence, tmp_path: Path) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)
    row = {"dictionary": "topk", "feature": 3, "num_compared": 2, "num_shared": 1, "stability": 0.5, "mean_cosine": 0.6,
           "first_seen": "a", "compared_as": "b", "compared": ["a", "b", "c"]}  # fmt: skip
    bare_evidence.write("stability", pa.Table.from_pylist([row]))
    assert FeatureStore.sync(path, bare_evidence) == ["stability"]
    query = "SELECT feature, stability, first_seen FROM features WHERE stability IS NOT NULL"
    with FeatureStore.open(path) as store:
        assert store.sql(query).to_pylist() == [{"feature": 3, "stability": 0.5, "first_seen": "a"}]
    bare_evidence.path("stability").unlink()
    assert FeatureStore.sync(path, bare_evidence) == ["built anew: the table stability is gone"]
    with FeatureStore.open(path) as store:
        assert store.sql(query).num_rows == 0 and store.sql("FROM stability").num_rows == 0
    assert FeatureStore.sync(path, bare_evidence) == []


@pytest.mark.parametrize("change", ["activations", "windows"])
def test_what_changed_is_built_anew(bare_evidence: Evidence, tmp_path: Path, change: str) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)
    if change == "activations":
        part = bare_evidence.files("activations")[0]
        bare_evidence.write("activations", pq.read_table(part).slice(1), part=part.stem)
    else:
        part = bare_evidence.read("windows")
        bare_evidence.write("windows", part.take(list(range(part.num_rows))[::-1]))
    assert FeatureStore.sync(path, bare_evidence)[0].startswith("built anew")
    assert everything(path) == everything(FeatureStore.build(tmp_path / "again.duckdb", bare_evidence))


def test_a_dictionary_that_never_fires(bare_evidence: Evidence, tmp_path: Path) -> None:
    rows = bare_evidence.read("dictionaries").to_pylist()
    bare_evidence.write("dictionaries", pa.Table.from_pylist([*rows, rows[0] | {"dictionary": "dead"}]))
    with FeatureStore.open(FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)) as store:
        assert store.feature(3, "dead")["density"] == 0 and store.examples(3, dictionary="dead") == []
        assert store.cofirings(3, dictionary="dead") == [] and store.document_features(0, dictionary="dead") == []
        assert store.search("river", dictionary="dead") == [] and store.search("river")[0].feature == 3


def test_another_dictionary_of_the_same_name_is_refused(evidence: Evidence, tmp_path: Path, synthetic) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", evidence)
    wider = synthetic.write(tmp_path / "wider", synthetic.Size(features=50, windows=30), seed=5)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another dictionary named 'topk'"):
        FeatureStore.sync(path, [evidence, wider])
    assert path.read_bytes() == before


def test_where_evidence_comes_from(bare_evidence: Evidence, tmp_path: Path) -> None:
    import datetime

    row = {"dictionary": "topk", "run": "mine", "corpus": "pages", "model_name": "x", "model_revision": "r1",
           "model_sha256": "x", "tokenizer_sha256": "x", "dataset_fingerprint": "f", "code_version": "0.1",
           "config": "{}", "indexed": datetime.datetime(2026, 1, 2)}  # fmt: skip
    bare_evidence.write("runs", pa.Table.from_pylist([row]))
    with FeatureStore.open(FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)) as store:
        assert store.sql("SELECT * FROM runs").to_pylist() == [row]
        assert store.sql("SELECT corpus FROM corpora")["corpus"].to_pylist() == ["pages"]
        assert store.sql("SELECT model_revision FROM models")["model_revision"].to_pylist() == ["r1"]
