"""Killed writers, two writers, readers of an old version, damage: the store is always a whole one."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from saeql.store import migrations
from saeql.store.build import upgrade_store
from saeql.store.errors import StoreError
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.publish import find_store_damage, hash_path

WRITERS = Path(__file__).with_name("writers.py")
QUERY = "SELECT dictionary, feature, label, density, max_activation, top_tokens FROM features ORDER BY ALL"


def start(what: str, store: Path, evidence: Evidence) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(WRITERS), what, str(store), str(evidence.folder)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word


def content(path: Path) -> list[dict]:
    with FeatureStore.open(path) as store:
        return store.sql(QUERY).to_pylist()


def relabel(evidence: Evidence, word: str) -> None:
    table = evidence.read("labels")
    place = table.schema.get_field_index("label")
    evidence.write("labels", table.set_column(place, "label", pa.array([word] * table.num_rows)))


def make_old(path: Path, evidence: Evidence) -> None:
    """Turn a store into one of the version before the keyed tables."""
    old = tuple(m for m in migrations.migrations() if m.version <= 3)
    source = path.with_name("new.duckdb")
    path.rename(source)
    quoted = {"new": str(source), "old": str(path)}
    with duckdb.connect(quoted["old"]) as connection:
        migrations.apply(connection, old)
        connection.execute(f"ATTACH '{quoted['new']}' AS new (READ_ONLY)")
        for table in ("dictionaries", "documents", "windows", "tokens", "split_rows", "labels", "metrics"):
            names = [c[0] for c in connection.execute(f"DESCRIBE evidence.{table}").fetchall()]
            connection.execute(f"INSERT INTO evidence.{table} SELECT {', '.join(names)} FROM new.evidence.{table}")
        for table in ("logit_effects", "neighbours"):
            connection.execute(f"INSERT INTO evidence.{table} FROM new.evidence.{table}")
        connection.execute("INSERT INTO evidence.vocabulary SELECT token_id, token FROM new.evidence.vocabulary")
        connection.execute(
            """
            INSERT INTO evidence.activations
            SELECT g.dictionary_id, a.feature, a.split, a.window_id, a.position, t.token_id, t.document_id, a.activation
            FROM new.evidence.activations_by_feature a JOIN new.evidence.segments g USING (segment_id)
            JOIN new.evidence.tokens t USING (window_id, position)
            ORDER BY ALL
            """
        )
        connection.execute(
            "INSERT INTO derived.feature_stats SELECT g.dictionary_id, s.* EXCLUDE (segment_id) "
            "FROM new.derived.feature_stats s JOIN new.evidence.segments g USING (segment_id)"
        )
        connection.execute(
            "INSERT INTO derived.feature_tokens SELECT g.dictionary_id, s.* EXCLUDE (segment_id) "
            "FROM new.derived.feature_tokens s JOIN new.evidence.segments g USING (segment_id)"
        )
        connection.execute("INSERT INTO derived.feature_logits FROM new.derived.feature_logits")
        connection.execute(
            """
            INSERT INTO derived.examples
            SELECT g.dictionary_id, v.feature, v.split, v.kind, v.decile, v.rank, v.window_id, v.document_id,
                   v.position, v.activation, v.tokens, v.activations, v.focus
            FROM new.main.examples v JOIN new.evidence.dictionaries g USING (dictionary)
            """
        )
    source.unlink()
    hash_path(path).unlink(missing_ok=True)


def killed_in_time(what: str, store: Path, evidence: Evidence, seconds: float) -> bool:
    """Kill a writer after some time; returns whether it was killed before it was done."""
    process = start(what, store, evidence)
    wait_for(process, "ready")
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    return "done" not in output


def duration(what: str, store: Path, evidence: Evidence) -> float:
    process = start(what, store, evidence)
    wait_for(process, "ready")
    began = time.monotonic()
    wait_for(process, "done")
    process.communicate()
    return time.monotonic() - began


def check_kills(evidence: Evidence, folder: Path, kills: int, seed: int) -> None:
    """Kill builds, label writes and upgrades at random moments; the store is the one before or the one after."""
    rng = random.Random(seed)
    path = FeatureStore.build(folder / "s.duckdb", evidence)
    took, killed, number, total = {}, 0, -1, evidence.read("activations").num_rows
    while killed < kills:
        number, what = number + 1, ("build", "labels", "upgrade")[killed % 3]
        if what == "upgrade":
            make_old(path, evidence)
        relabel(evidence, f"word{number}")
        kept = folder / "kept.duckdb"
        shutil.copyfile(path, kept)
        if what not in took:
            took[what] = duration(what, path, evidence)
            shutil.copyfile(kept, path)
            hash_path(path).unlink(missing_ok=True)
            if what != "upgrade":
                relabel(evidence, f"word{number} again")
        old_bytes = path.read_bytes()
        if killed_in_time(what, path, evidence, rng.uniform(0, took[what] * 0.95)):
            killed += 1
        else:
            took[what] *= 0.7  # the machine was busier when the time was taken: it is tried again
        assert find_store_damage(path) is None
        if path.read_bytes() != old_bytes:  # published before the kill
            with FeatureStore.open(path) as store:
                assert store.sql("SELECT count(*) AS n FROM activations")["n"][0].as_py() == total
        FeatureStore.build(path, evidence)  # the next writer goes on, and removes what was left
        assert content(path)[0]["label"].startswith("word")
        assert not list(folder.glob("*.tmp.*"))


def test_killed_writers_leave_a_whole_store(bare_labelled: Evidence, tmp_path: Path) -> None:
    check_kills(bare_labelled, tmp_path, 3, seed=0)


@pytest.mark.full
def test_thirty_killed_writers_leave_a_whole_store(bare_labelled: Evidence, tmp_path: Path) -> None:
    check_kills(bare_labelled, tmp_path, 30, seed=1)


@pytest.mark.parametrize("what", ["build", "labels"])
def test_a_second_writer_fails_at_once_and_names_the_first(bare_labelled: Evidence, tmp_path: Path, what: str) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_labelled)
    process = start("hold", path, bare_labelled)
    wait_for(process, "ready")
    wait_for(process, "holding")
    relabel(bare_labelled, "other")
    with pytest.raises(StoreError, match=f"pid {process.pid}"):
        (FeatureStore.build if what == "build" else FeatureStore.sync)(path, bare_labelled)
    assert content(path)[0]["label"] != "other"  # readers are not in its way
    process.communicate("")
    assert FeatureStore.sync(path, bare_labelled) == ["labels"]
    assert not list(tmp_path.glob("*.tmp.*"))


def test_readers_keep_their_version_until_they_reopen(bare_labelled: Evidence, tmp_path: Path) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_labelled)
    with FeatureStore.open(path) as reader:
        relabel(bare_labelled, "newer")
        assert FeatureStore.sync(path, bare_labelled) == ["labels"]
        assert reader.feature(4)["label"] != "newer"
    assert content(path)[4]["label"] == "newer"


def test_an_old_store_is_upgraded_when_it_is_opened(bare_labelled: Evidence, tmp_path: Path) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_labelled)
    queries = {
        view: f"SELECT * FROM {view} ORDER BY ALL"
        for view in (*("features", "examples", "activations", "document_activations", "feature_stats", "cofirings"),
                     *("labels", "neighbours", "logit_effects", "documents", "windows", "tokens", "metrics"))
    }  # fmt: skip
    with FeatureStore.open(path) as store:
        wanted = {view: store.sql(query) for view, query in queries.items()}
        found = [(h.feature, h.matched) for h in store.search("river token")]
    make_old(path, bare_labelled)
    with FeatureStore.open(path) as store:
        for view, query in queries.items():
            assert store.sql(query).to_pylist() == wanted[view].to_pylist(), view
        assert [(h.feature, h.matched) for h in store.search("river token")] == found
    assert upgrade_store(path) == []


def test_a_store_from_before_comparisons_keeps_what_it_has(bare_labelled: Evidence, tmp_path: Path) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_labelled)
    views = ("features", "dead", "unexplained", "cofirings", "stability", "matches")
    with FeatureStore.open(path) as store:
        wanted = {view: store.sql(f"SELECT * FROM {view} ORDER BY ALL").to_pylist() for view in views}
        found = store.search("river token")
    with duckdb.connect(str(path)) as connection:
        old_views = ("VIEW matches", "VIEW stability", "VIEW steering", "VIEW steering_effects")
        tables = ("evidence.matches", "evidence.stability", "evidence.steering_effects")
        tables += ("derived.token_features", "derived.token_counts")
        for what in (*old_views, *(f"TABLE {table}" for table in tables)):
            connection.execute(f"DROP {what}")
        connection.execute("DROP VIEW cards; ALTER TABLE evidence.receipts DROP COLUMN detail")
        for step in migrations.migrations()[4:7]:
            connection.execute(step.sql)
        connection.execute("DELETE FROM migrations WHERE version > 7; UPDATE meta SET schema_version = 7")
    hash_path(path).unlink()
    with FeatureStore.open(path) as store:
        assert store.search("river token") == found
        for view in views:
            assert store.sql(f"SELECT * FROM {view} ORDER BY ALL").to_pylist() == wanted[view], view
    assert upgrade_store(path) == []


def test_damage_is_found_before_anything_is_added(bare_labelled: Evidence, tmp_path: Path) -> None:
    path = FeatureStore.build(tmp_path / "s.duckdb", bare_labelled)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    assert "differs at byte" in str(find_store_damage(path))
    relabel(bare_labelled, "newer")
    done = FeatureStore.sync(path, bare_labelled)
    assert len(done) == 1 and done[0].startswith("built anew") and path.name in done[0]
    assert find_store_damage(path) is None and content(path)[4]["label"] == "newer"


def test_leftovers_of_killed_writers_are_removed(bare_labelled: Evidence, tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    for name in ("s.duckdb.tmp.99999999", "s.duckdb.tmp.99999999.wal", "s.duckdb.hash.json.tmp.99999999"):
        (tmp_path / name).write_text("left")
    (tmp_path / "s.duckdb.tmp.99999999.spill" / "segment-0").mkdir(parents=True)
    FeatureStore.build(path, bare_labelled)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["evidence", path.name, hash_path(path).name]
