"""Statements of strangers: all of hostile.toml is refused or stopped in time, and what is allowed still works."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from saeql.store.console import Console, memory_bytes
from saeql.store.errors import OldStoreError, SQLError, StoreError
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.parquet_store import STORE_FILE, write_parquet

HOSTILE = tomllib.loads(Path(__file__).with_name("hostile.toml").read_text())["statement"]
LIMIT_SECONDS = 0.5
SPARE_SECONDS = 30.0  # a busy machine; by themselves they end within 0.1 s, and unstopped not within minutes
NOT_ESCAPED = "/tmp/saeql-escape"


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def console(store_path: Path) -> Iterator[Console]:
    with Console(store_path, memory_limit="400MB") as opened:
        yield opened


@pytest.fixture(scope="module")
def parquet_path(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(store_path, tmp_path_factory.mktemp("store") / "features.parquet")


@pytest.fixture(scope="module")
def parquet_console(parquet_path: Path) -> Iterator[Console]:
    with Console(parquet_path, memory_limit="400MB") as opened:
        yield opened


def test_there_are_at_least_sixty() -> None:
    assert len({s["sql"] for s in HOSTILE}) == len(HOSTILE) >= 60
    assert {s["ends"] for s in HOSTILE} == {"refused", "stopped"}


@pytest.mark.parametrize("statement", HOSTILE, ids=lambda s: s["sql"][:60])
def test_hostile(console: Console, store_path: Path, evidence: Evidence, statement: dict[str, str]) -> None:
    get_through(console, store_path, evidence, statement)


@pytest.mark.parametrize("statement", [s for s in HOSTILE if s["ends"] == "refused"], ids=lambda s: s["sql"][:60])
def test_hostile_to_parquet(
    parquet_console: Console, parquet_path: Path, evidence: Evidence, statement: dict[str, str]
) -> None:
    files = {"{store}": "{store}/evidence.windows.parquet", "{folder}": "{store}", "{evidence}": "{store}"}
    for name, place in files.items():
        statement = {**statement, "sql": statement["sql"].replace(name, place)}
    get_through(parquet_console, parquet_path, evidence, statement)


def get_through(console: Console, store_path: Path, evidence: Evidence, statement: dict[str, str]) -> None:
    """Try to: the statement must fail in time, leave everything as it is, and tell nothing of where it is."""
    secret_python_variable = pa.table({"password": [42]})
    places = {"store": str(store_path), "folder": str(store_path.parent), "evidence": str(evidence.folder)}
    query = statement["sql"]
    for name, place in places.items():
        query = query.replace(f"{{{name}}}", place)
    before = contents(store_path.parent), contents(evidence.folder)
    assert console.sql("SELECT 1 AS x")["x"].to_pylist() == [1]  # so that the process is there

    begun = time.monotonic()
    with pytest.raises(SQLError) as caught:
        console.sql(query, timeout_seconds=LIMIT_SECONDS, max_bytes=10 << 20)
    seconds = time.monotonic() - begun

    assert seconds < LIMIT_SECONDS + SPARE_SECONDS
    stopped = any(sign in str(caught.value) for sign in ("ran longer", "more memory", "ended its process"))
    assert stopped == (statement["ends"] == "stopped"), caught.value
    assert "\n" not in str(caught.value) and secret_python_variable.num_rows == 1
    if str(store_path.parent) not in query:
        assert str(store_path.parent) not in str(caught.value)
    assert (contents(store_path.parent), contents(evidence.folder)) == before
    assert not list(Path(NOT_ESCAPED).parent.glob(f"{Path(NOT_ESCAPED).name}*"))


def test_a_killed_process_is_replaced(console: Console) -> None:
    with pytest.raises(SQLError, match=r"ran longer than 0\.2 s"):
        console.sql("SELECT count(*) FROM range(10000000) a, range(10000000) b", timeout_seconds=0.2)
    assert console.sql("SELECT count(*) AS n FROM features")["n"].to_pylist() == [80]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT f.feature FROM features f JOIN examples e USING (dictionary, feature) WHERE e.rank = 1 LIMIT 3",
        "FROM documents",
        "TABLE documents",
        "VALUES (1), (2)",
        "DESCRIBE features",
        "DESCRIBE SELECT 1",
        "SUMMARIZE documents",
        "SHOW TABLES",
        "SHOW ALL TABLES",
        "EXPLAIN SELECT 1",
        "explain analyze select count(*) from features",
        "EXPLAIN (FORMAT json) SELECT 1",
        "WITH t AS (SELECT 1 AS a UNION ALL SELECT 2) SELECT * FROM t",
        "WITH RECURSIVE t AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM t WHERE i < 9) SELECT * FROM t",
        "SELECT f.feature, t.x FROM features f, unnest(f.top_tokens) t(x)",
        "SELECT * FROM generate_series(1, 3)",
        "SELECT * FROM json_each('[1, 2]')",
        "PIVOT (SELECT split, kind FROM examples) ON split IN ('train', 'test') USING count(*)",
        "UNPIVOT (SELECT 1 AS a, 2 AS b) ON a, b",
        "SELECT column_name, comment FROM duckdb_columns() WHERE table_name = 'features'",
        "SELECT table_name FROM information_schema.tables",
        "SELECT * FROM evidence.labels, main.meta",
        "SELECT feature FROM features INTERSECT SELECT feature FROM labels",
        "SELECT list_transform([1, 2], lambda x: x + 1)",
        "-- a comment first\nSELECT 1;",
        "SELECT now(), 'it''s; fine' AS a, $$ ; $$ AS b",
    ],
)
def test_questions_are_answered(console: Console, query: str) -> None:
    assert console.sql(query).num_rows > 0


def test_results_are_those_of_the_trusted_connection(store: FeatureStore) -> None:
    for view in ("features", "activations", "examples", "windows", "metrics"):
        query = f"SELECT * FROM {view} ORDER BY ALL"
        assert store.sql(query).equals(store.trusted_sql(query)), view
    types = "SELECT 1::HUGEINT AS h, 1.5::DECIMAL(9, 2) AS d, DATE '2026-01-02' AS t, 'a'::BLOB AS b, {'x': [1]} AS s"
    assert store.sql(types).to_pylist() == store.trusted_sql(types).to_pylist()


def test_a_parquet_store_gives_the_same_rows_and_no_path(
    console: Console, parquet_console: Console, parquet_path: Path
) -> None:
    views = console.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'")
    for view in views["view_name"].to_pylist():
        query = f"SELECT * FROM {view} ORDER BY ALL"
        assert parquet_console.sql(query).to_pylist() == console.sql(query).to_pylist(), view
    query = "FROM fires_on(' river') ORDER BY ALL"
    assert parquet_console.sql(query).to_pylist() == console.sql(query).to_pylist()
    for listing in ("duckdb_views()", "duckdb_functions()", "duckdb_columns()"):
        told = parquet_console.sql(f"SELECT x::VARCHAR AS x FROM {listing} x")["x"].to_pylist()
        assert not any(str(parquet_path.parent) in text for text in told)


def test_an_old_store_is_called_old(tmp_path: Path, store_path: Path, parquet_path: Path) -> None:
    import duckdb

    old = tmp_path / "features.duckdb"
    old.write_bytes(store_path.read_bytes())
    with duckdb.connect(str(old)) as connection:
        connection.execute("UPDATE meta SET schema_version = 1")
    folder = tmp_path / "features.parquet"
    shutil.copytree(parquet_path, folder)
    (folder / STORE_FILE).write_text('{"schema_version": 1}')
    for path in (old, folder):
        with Console(path) as console, pytest.raises(OldStoreError, match="has schema version 1"):
            console.start()


def test_rows_are_cut_and_said_to_be(console: Console) -> None:
    cut = console.sql("SELECT * FROM range(200000) ORDER BY 1", max_rows=100_000)
    assert cut.num_rows == 100_000 and cut.schema.metadata == {b"truncated": b"true"}
    assert cut["range"].to_pylist() == list(range(100_000))
    whole = console.sql("SELECT * FROM range(7)", max_rows=7)
    assert whole.num_rows == 7 and not whole.schema.metadata
    assert console.sql("SELECT * FROM range(7)", max_rows=0).num_rows == 0


def test_what_is_too_large_says_so(console: Console) -> None:
    with pytest.raises(SQLError, match="larger than 1 MiB: ask for fewer"):
        console.sql("SELECT repeat('x', 1000) FROM range(2000)", max_bytes=1 << 20)
    with pytest.raises(SQLError, match="longer than 8 MiB"):
        console.sql("SELECT 1 -- " + "x" * (8 << 20))
    assert console.sql("SELECT 1 AS x").num_rows == 1


@pytest.mark.parametrize(
    "query",
    [
        "SELECT NULL FROM range(10000000)",
        "SELECT i > 5 FROM range(10000000) r(i)",
        "SELECT CAST('{long}' AS ENUM ('{long}')) FROM range(100000)",
        "SELECT [CAST('{long}' AS ENUM ('{long}'))] FROM range(100000)",
        "SELECT {{'a': [CAST('{long}' AS ENUM ('{long}'))]}} FROM range(100000)",
        "SELECT MAP {{'a': CAST('{long}' AS ENUM ('{long}'))}} FROM range(100000)",
    ],
)
def test_what_is_small_on_the_way_and_large_on_arrival_counts_as_large(console: Console, query: str) -> None:
    with pytest.raises(SQLError, match="larger than 16 MiB"):
        console.sql(query.format(long="long" * 500), max_bytes=16 << 20)


def test_enums_come_as_text(console: Console) -> None:
    query = "SELECT x, [x] AS l, {'a': x} AS s FROM (SELECT CAST('b' AS ENUM ('a', 'b')) AS x)"
    found = console.sql(query)
    assert found.schema.field("x").type == pa.string()
    assert found.to_pylist() == [{"x": "b", "l": ["b"], "s": {"a": "b"}}]


def test_parameters(console: Console) -> None:
    import numpy as np

    assert console.sql("SELECT $a + 1 AS x", {"a": np.int64(2)})["x"].to_pylist() == [3]
    assert console.sql("SELECT ? || ? AS x", ["a", "'; DROP VIEW features; --"])["x"].to_pylist() == [
        "a'; DROP VIEW features; --"
    ]
    assert console.sql("SELECT count(*) AS n FROM unnest($x) t(i)", {"x": [1, 2, None]})["n"].to_pylist() == [3]
    with pytest.raises(SQLError, match="object is neither a number, text"):
        console.sql("SELECT $a", {"a": object()})
    with pytest.raises(SQLError, match="a"):
        console.sql("SELECT $a")


@pytest.mark.parametrize(
    "condition",
    [
        "1 = 1) UNION SELECT * FROM labels; --",
        "1 = 1) UNION SELECT 1 --",
        "1 = 1) OR (1 = 1",
        "true) , (false",
        "1 = 1; DROP VIEW features",
        "1 = 1;",
        "1 = 1 LIMIT 5",
        "1 FROM features",
        "density < 1 GROUP BY 1",
        "true /*",
        "label = 'x",
        "a AS b",
        "",
        "-- nothing",
        "feature IN (SELECT 1 FROM duckdb_databases())",
        "current_setting('threads') = '1'",
    ],
)
def test_conditions_are_one_expression(store: FeatureStore, condition: str) -> None:
    with pytest.raises(SQLError) as caught:
        store.search("river", where=condition)
    assert "\n" not in str(caught.value)


def test_conditions_filter(store: FeatureStore) -> None:
    everything = {h.feature for h in store.search("token river", limit=100)}
    kept = {h.feature for h in store.search("token river", limit=100, where="feature % 2 = 0 -- even")}
    assert kept == {f for f in everything if f % 2 == 0} and 0 < len(kept) < len(everything)
    asked = "feature IN (SELECT feature FROM neighbours WHERE neighbour = 5) OR label = '1) OR (1'"
    assert {h.feature for h in store.search("token river", limit=100, where=asked)} <= everything


def test_limits_must_make_sense(store_path: Path, console: Console) -> None:
    for seconds in (0, -1, float("nan"), 1e9):
        with pytest.raises(SQLError, match="time limit"):
            console.sql("SELECT 1", timeout_seconds=seconds)
    with pytest.raises(SQLError, match="max_rows is -1"):
        console.sql("SELECT 1", max_rows=-1)
    for text in ("much", "2", "0GB", "-1GB", "80%"):
        with pytest.raises(SQLError, match="amount of memory"):
            Console(store_path, memory_limit=text)
    assert memory_bytes("1.5 GiB") == 3 << 29 and memory_bytes("200mb") == 200_000_000


def test_files_that_are_no_store(tmp_path: Path, store_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist: build it"):
        Console(tmp_path / "nothing.duckdb")
    (tmp_path / "text.duckdb").write_text("hello " * 1000)
    with Console(tmp_path / "text.duckdb") as console, pytest.raises(StoreError, match="not a feature store") as caught:
        console.sql("SELECT 1")
    assert str(tmp_path) not in str(caught.value)
    damaged = tmp_path / "damaged.duckdb"
    content = bytearray(store_path.read_bytes())
    for at in range(12_288 + 4096, len(content), 4096):
        content[at] ^= 255
    damaged.write_bytes(content)
    with Console(damaged) as console, pytest.raises(StoreError, match=r"damaged|cannot open") as caught:
        console.sql("SELECT count(*), max(activation) FROM activations")
    assert "damaged.duckdb" in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_rebuilt_file_is_not_mixed_up(tmp_path: Path, store_path: Path) -> None:
    mine = tmp_path / "features.duckdb"
    mine.write_bytes(store_path.read_bytes())
    with Console(mine) as console:
        (tmp_path / "new").write_bytes(store_path.read_bytes())
        (tmp_path / "new").rename(mine)
        with pytest.raises(StoreError, match="was rebuilt"):
            console.sql("SELECT 1")
    with Console(mine) as console:
        assert console.sql("SELECT 1 AS x").num_rows == 1


def test_threads_take_turns_and_closing_ends_a_statement(store_path: Path) -> None:
    console = Console(store_path)
    found: list[object] = []

    def ask(i: int) -> None:
        found.append(console.sql("SELECT $i AS i", {"i": i})["i"][0].as_py())

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(12))  # pyright: ignore[reportArgumentType]

    def wait() -> None:
        try:
            console.sql("SELECT count(*) FROM range(10000000) a, range(10000000) b")
        except StoreError as error:
            found.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    console.close()
    waiting.join(timeout=300)
    assert not waiting.is_alive() and "has been closed" in str(found[-1])
    with pytest.raises(StoreError, match="has been closed"):
        console.sql("SELECT 1")


def program(store_path: Path, text: str) -> list[str]:
    paths = f"import sys; sys.path[:] = {sys.path!r}; store = {str(store_path)!r}\n"
    return [sys.executable, "-c", paths + textwrap.dedent(text)]


def test_behind_the_gate_the_process_can_neither_open_nor_write_nor_take(store_path: Path, tmp_path: Path) -> None:
    """The kernel's limits hold by themselves: here statements go to the locked connection directly."""
    text = """
        import json, os, socket
        from pathlib import Path
        from saeql.store.console_child import _Worker
        os.chdir(Path(store).parent)
        found = Path(store).stat()
        start = dict(name=Path(store).name, identity=[found.st_dev, found.st_ino], memory_limit="200MB",
                     memory_bytes=200_000_000, threads=1)
        answers = open(os.devnull, "wb", buffering=0)
        worker = _Worker(start, answers)
        kept = os.open("grows", os.O_WRONLY | os.O_CREAT)
        os.unlink("grows")
        worker.lock_down()
        told = {}
        for name, act in {
            "wal": lambda: worker.connection.execute(f"COPY (SELECT 1) TO '{store}.wal' (USE_TMP_FILE false)"),
            "open": lambda: open("/etc/passwd"),
            "socket": lambda: socket.socket(),
            "write": lambda: os.write(kept, b"x"),
            "memory": lambda: bytearray(1_000_000_000),
            "rows": lambda: worker.connection.execute("SELECT count(*) FROM features").fetchall(),
        }.items():
            try:
                told[name] = str(act())
            except BaseException as error:
                told[name] = type(error).__name__ + ": " + str(error)
        print(json.dumps(told))
    """
    before = contents(store_path.parent)
    result = subprocess.run(program(store_path, text), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    for name in ("wal", "open", "socket"):
        assert "Too many open files" in told[name], told
    assert "File too large" in told["write"] and "MemoryError" in told["memory"] and told["rows"] == "[(80,)]"
    assert contents(store_path.parent) == before


def test_the_process_has_no_environment_and_ends_with_its_program(store_path: Path) -> None:
    text = """
        from saeql.store.console import Console
        console = Console(store)
        console.sql("SELECT 1")
        print(console._process._popen.pid, flush=True)
        console.sql("SELECT length(repeat('x', 900000000::BIGINT)) FROM range(100)", timeout_seconds=60)
    """
    environment = {**os.environ, "SECRET_TOKEN": "hunter2"}
    parent = subprocess.Popen(program(store_path, text), stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().strip()
    if not child.exists():
        pytest.skip("needs /proc")
    assert b"hunter2" not in (child / "environ").read_bytes()
    time.sleep(0.5)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(3000):
        if not child.exists():
            return
        time.sleep(0.1)
    pytest.fail("the process outlives its program")


def test_frames(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    query = "SELECT feature, label FROM features WHERE dictionary = $d ORDER BY feature"
    expected = store.sql(query, {"d": "topk"}).to_pylist()
    pandas = pytest.importorskip("pandas")
    frame = store.frame(query, params={"d": "topk"})
    assert isinstance(frame, pandas.DataFrame) and frame.to_dict("records") == expected
    assert len(store.frame("FROM features", max_rows=3)) == 3
    for library in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(StoreError, match=f"need the package {library}: pip install {library}"):
            store.frame("SELECT 1", library)
    with pytest.raises(StoreError, match="no results as 'numpy': there are arrow, pandas, polars"):
        store.frame("SELECT 1", "numpy")


def test_polars(store: FeatureStore) -> None:
    polars = pytest.importorskip("polars")
    query = "SELECT feature, top_tokens FROM features ORDER BY ALL"
    frame = store.frame(query, "polars")
    assert isinstance(frame, polars.DataFrame) and frame.to_dicts() == store.sql(query).to_pylist()
