"""The store file: whole or not there, the schema it is at, and files that are no store."""

from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from saeql.store import migrations
from saeql.store.errors import StoreError
from saeql.store.evidence import Evidence, EvidenceError
from saeql.store.feature_store import FeatureStore
from saeql.store.migrations import Migration
from saeql.store.publish import hash_path


def test_steps_are_reported_and_nothing_is_left_beside_the_file(bare_evidence: Evidence, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_evidence, on_step=lambda *step: steps.append(step))
    assert [s[1] for s in steps] == list(range(steps[-1][2] + 1)) and steps[-1][0] == "done"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["evidence", path.name, hash_path(path).name]


@pytest.mark.parametrize("stage", ["text", "tables", "activations", "statistics and examples", "search", "checkpoint"])
def test_a_build_that_fails_leaves_the_old_store(bare_evidence: Evidence, tmp_path: Path, stage: str) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)
    before = path.read_bytes()

    def fail(name: str, done: int, total: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureStore.build(path, bare_evidence, on_step=fail)
    assert path.read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["evidence", path.name, hash_path(path).name]


def test_evidence_that_is_damaged_or_missing_is_named(bare_evidence: Evidence, tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    file = bare_evidence.files("activations")[0]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=file.name) as caught:
        FeatureStore.build(path, bare_evidence)
    assert "\n" not in str(caught.value) and not path.exists()
    file.write_bytes(whole)
    bare_evidence.path("windows").unlink()
    with pytest.raises(EvidenceError, match="windows"):
        FeatureStore.build(path, bare_evidence)
    assert not path.exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("dictionary", "nosuch", "no dictionary"),
        ("window_id", 10_000, "outside the windows"),
        ("feature", 40, "feature 40"),
    ],
)
def test_activations_must_fit_the_other_evidence(
    bare_evidence: Evidence, tmp_path: Path, column: str, value: object, message: str
) -> None:
    table = bare_evidence.read("activations").slice(0, 1)
    place = table.column_names.index(column)
    wrong = table.set_column(place, table.schema.field(place), pa.array([value], table.schema.field(place).type))
    bare_evidence.write("activations", wrong, part="wrong")
    with pytest.raises(StoreError, match=message):
        FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)


def test_a_rebuilt_store_is_not_mixed_up_with_the_old_one(bare_evidence: Evidence, tmp_path: Path) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)
    with FeatureStore.open(path) as old:
        FeatureStore.build(path, bare_evidence)
        assert old.feature(0)["feature"] == 0
        with pytest.raises(StoreError, match="close the old reader"):
            FeatureStore.open(path)
    with FeatureStore.open(path) as first, FeatureStore.open(path) as second:
        assert first.feature(0) == second.feature(0)


def test_meta_says_what_made_the_file(store: FeatureStore) -> None:
    meta = store.sql("SELECT * FROM meta").to_pylist()
    assert len(meta) == 1
    assert meta[0]["schema_version"] == migrations.schema_version()
    assert meta[0]["engine_version"] == f"v{duckdb.__version__}"
    applied = store.sql("SELECT version, name FROM migrations ORDER BY version").to_pylist()
    assert [(m["version"], m["name"]) for m in applied] == [(m.version, m.name) for m in migrations.migrations()]


def test_migrations_apply_once_and_in_order() -> None:
    with duckdb.connect() as connection:
        assert migrations.applied_version(connection) == 0
        assert migrations.apply(connection) == list(migrations.migrations())
        assert migrations.apply(connection) == []
        more = (
            *migrations.migrations(),
            Migration(migrations.schema_version() + 1, "more", "CREATE TABLE more (i INTEGER)"),
        )
        assert [m.name for m in migrations.apply(connection, more)] == ["more"]
        assert migrations.applied_version(connection) == migrations.schema_version() + 1
        with pytest.raises(StoreError, match="upgrade saeql"):
            migrations.apply(connection)


def test_a_migration_that_fails_leaves_no_trace() -> None:
    good = Migration(1, "one", "CREATE TABLE one (i INTEGER)")
    bad = Migration(2, "two", "CREATE TABLE two (i INTEGER); SELECT nosuch")
    with duckdb.connect() as connection:
        with pytest.raises(duckdb.Error):
            migrations.apply(connection, (good, bad))
        assert migrations.applied_version(connection) == 1
        assert [t[0] for t in connection.execute("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()] == [
            "meta",
            "migrations",
            "one",
        ]


@pytest.mark.parametrize(("version", "message"), [(1000, "upgrade saeql"), (3, "cannot upgrade.*rebuild it")])
def test_a_newer_store_and_one_that_is_not_what_it_says_are_refused(
    bare_evidence: Evidence, tmp_path: Path, version: int, message: str
) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE meta SET schema_version = ?", [version])
    with pytest.raises(StoreError, match=message) as caught:
        FeatureStore.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    text, empty, other = tmp_path / "text.duckdb", tmp_path / "empty.duckdb", tmp_path / "other.duckdb"
    text.write_text("hello " * 5000)
    empty.touch()
    duckdb.connect(str(other)).close()
    for path in (text, empty, other, tmp_path / "missing.duckdb", tmp_path):
        with pytest.raises(StoreError) as caught:
            FeatureStore.open(path)
        assert str(path) in str(caught.value) and "saeql index" in str(caught.value) and "\n" not in str(caught.value)


def test_damage_is_named(store_path: Path, tmp_path: Path) -> None:
    whole, path = store_path.read_bytes(), tmp_path / "damaged.duckdb"
    found = 0
    for place in range(5, len(whole), len(whole) // 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found += _reads_or_names(path)
    assert found >= 5
    for size in (100, 5000, len(whole) // 3):
        path.write_bytes(whole[:size])
        assert _reads_or_names(path)


def _reads_or_names(path: Path) -> bool:
    """Whether reading the whole store was refused; the refusal must name the file."""
    try:
        with FeatureStore.open(path) as store:
            for view in ("features", "examples", "activations", "tokens", "windows", "logit_effects"):
                store.sql(f"SELECT * FROM {view}")
    except StoreError as error:
        # found while a question is answered, without its folder: no question learns where a store lies
        assert path.name in str(error) and "\n" not in str(error)
        return True
    return False
