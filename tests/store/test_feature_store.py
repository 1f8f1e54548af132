"""Reading a store: views, search, features, and SQL that must not get through."""

import hashlib
import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from saeql.store.errors import FeatureNotFound, SQLError, StoreError
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.vectors import read_embeddings
from saeql.store.words import stem

VIEWS = {
    "dictionaries": "dictionary fvu l0 dead_share ce_increase ce_recovered config d_in d_sae k hook_point",
    "features": "dictionary feature label kind auroc auroc_low auroc_high f1 n_active n_inactive density test_density "
    "mean_activation max_activation p50 p90 p99 token_entropy num_documents top_tokens promotes suppresses",
    "examples": "dictionary feature split kind decile rank window_id document_id position activation tokens "
    "activations focus title",
    "documents": "document_id split title source num_tokens sha256",
    "labels": "dictionary feature label kind predicate auroc f1 calibration_f1",
    "neighbours": "dictionary feature rank neighbour cosine neighbour_label",
    "logit_effects": "dictionary feature direction rank token_id token effect",
    "activations": "dictionary feature split window_id position document_id token_id token activation",
    "metrics": "dictionary split metric value n low high",
    "tokens": "window_id position split document_id token_id token",
    "windows": "window_id split token_ids document_ids tokens",
    "feature_stats": "dictionary feature split num_activations density",
    "split_rows": "split num_kept_rows",
}

REFUSED = [
    "INSERT INTO meta VALUES (9, 'x', now())",
    "WITH x AS (INSERT INTO meta VALUES (9, 'x', now()) RETURNING 1) SELECT * FROM x",
    "EXPLAIN ANALYZE INSERT INTO meta VALUES (9, 'x', now())",
    "SELECT 1; DROP VIEW features",
    "DROP VIEW features",
    "DROP SCHEMA evidence CASCADE",
    "CREATE TABLE t (i INTEGER)",
    "CREATE TEMP TABLE t (i INTEGER)",
    "CREATE MACRO f(x) AS x",
    "CREATE OR REPLACE VIEW features AS SELECT 1",
    "UPDATE evidence.labels SET label = 'x'",
    "DELETE FROM evidence.activations",
    "TRUNCATE evidence.activations",
    "ALTER TABLE evidence.labels ADD COLUMN x INTEGER",
    "COPY (SELECT 1) TO '/tmp/saeql-escape.csv'",
    "COPY evidence.labels FROM '/etc/passwd'",
    "EXPORT DATABASE '/tmp/saeql-escape'",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM read_parquet('https://example.com/x.parquet')",
    "ATTACH '/tmp/saeql-escape.duckdb'",
    "ATTACH ':memory:' AS m",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET memory_limit = '100GB'",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PRAGMA enable_profiling",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN TRANSACTION",
    "CALL pragma_version()",
    "USE evidence",
    "CREATE SECRET s (TYPE s3)",
    "SELECT * FROM secret_python_variable",
    "COMMENT ON VIEW features IS 'x'",
]


@pytest.mark.parametrize("view", VIEWS)
def test_views_have_their_columns_and_a_comment(store: FeatureStore, view: str) -> None:
    columns = store.trusted_sql(f"SELECT * FROM {view} LIMIT 1")
    assert columns.num_rows == 1
    assert set(VIEWS[view].split()) <= set(columns.column_names)
    assert store.trusted_sql("SELECT comment FROM duckdb_views() WHERE view_name = $v", {"v": view})["comment"][
        0
    ].as_py()


def test_columns_have_comments(store: FeatureStore) -> None:
    found = store.sql("SELECT comment FROM duckdb_columns() WHERE table_name = 'features' AND column_name = 'density'")
    assert "kept train rows" in found["comment"][0].as_py()


def test_views_count_what_the_evidence_has(store: FeatureStore, evidence: Evidence) -> None:
    for view in ("documents", "labels", "neighbours", "logit_effects", "activations", "metrics", "windows"):
        assert store.sql(f"SELECT count(*) AS n FROM {view}")["n"][0].as_py() == evidence.read(view).num_rows
    assert store.sql("SELECT count(*) AS n FROM features")["n"][0].as_py() == 80
    joined = "activations a JOIN tokens t USING (window_id, position)"
    wrong = f"SELECT count(*) AS n FROM {joined} WHERE a.token_id <> t.token_id OR a.document_id <> t.document_id"
    assert store.sql(wrong)["n"][0].as_py() == 0


def test_without_labels_and_metrics(bare_evidence: Evidence, tmp_path: Path) -> None:
    with FeatureStore.open(FeatureStore.build(tmp_path / "s.duckdb", bare_evidence)) as store:
        row = store.feature(3)
        assert (row["label"], row["kind"], row["auroc"]) == ("unexplained", "none", None)
        assert store.dictionaries()[0]["fvu"] is None and store.metrics() == []
        assert store.neighbours(3)[0]["neighbour_label"] == "unexplained"
        assert store.search("river")[0].feature == 3


def test_dictionaries_carry_their_test_metrics(store: FeatureStore) -> None:
    first, second = store.dictionaries()
    assert (first["dictionary"], second["dictionary"]) == ("topk", "other")
    assert first["fvu"] == 1.0 and first["ce_recovered"] == pytest.approx(1.4)
    assert {r["split"] for r in store.metrics("topk")} == {"calibration", "test"}


@pytest.mark.parametrize("text", ["rivers", "River", "stream of rivers", "STREAMS"])
def test_search_finds_the_obvious_feature_first(store: FeatureStore, text: str) -> None:
    hit = store.search(text)[0]
    assert (hit.dictionary, hit.feature, hit.label) == ("topk", 3, "rivers and streams")
    assert hit.auroc == pytest.approx(0.9) and hit.density > 0 and "label" in hit.matched


def test_search_says_what_matched_where(store: FeatureStore) -> None:
    assert store.search("river")[0].matched == {"label": ["rivers"], "activates": ["river"], "promotes": ["river"]}


def test_search_filters_and_limits(store: FeatureStore) -> None:
    assert len(store.search("token", limit=4)) == 4
    assert {h.kind for h in store.search("token running", where="kind = 'lexical' -- only", limit=50)} == {"lexical"}
    assert {h.dictionary for h in store.search("river", dictionary="other")} == {"other"}
    assert store.search("nosuchwordatall") == []


def test_search_scores_are_bm25(store: FeatureStore) -> None:
    texts: dict[int, Counter] = {}
    for row in store.sql("SELECT * FROM features WHERE dictionary = 'topk'").to_pylist():
        counts: Counter = texts.setdefault(row["feature"], Counter())
        fields = ((4, [row["label"]] if row["kind"] != "none" else []), (2, row["top_tokens"]), (1, row["promotes"]))
        for weight, parts in fields:
            for word in re.findall(r"\w+", " ".join(parts).lower()):
                counts[stem([word])[0]] += weight
    texts = {f: c for f, c in texts.items() if c}
    lengths = {f: c.total() for f, c in texts.items()}
    mean = sum(lengths.values()) / len(lengths)
    wanted: dict[int, float] = {}
    for term in stem(["rivers", "token"]):
        having = [f for f, c in texts.items() if term in c]
        rarity = math.log(1 + (len(texts) - len(having) + 0.5) / (len(having) + 0.5))
        for f in having:
            n = texts[f][term]
            wanted[f] = wanted.get(f, 0) + rarity * n * 2.2 / (n + 1.2 * (0.25 + 0.75 * lengths[f] / mean))
    hits = store.search("Rivers token", limit=100)
    assert {h.feature: h.score for h in hits} == pytest.approx(wanted, abs=0.005)


def test_search_by_token(store: FeatureStore) -> None:
    for text in (" river", "river"):
        hit = store.search(text, by="token")[0]
        assert (hit.feature, hit.label) == (3, "rivers and streams") and hit.score > 0.9
        assert "100% of its own" in hit.matched["fires on [ river]"]
    assert {h.feature for h in store.search("river", by="token", where="kind = 'none'")}.isdisjoint({3})
    with pytest.raises(StoreError, match="as one token"):
        store.search("rivers and streams", by="token")


def test_search_by_effect(store: FeatureStore) -> None:
    hits = store.search("river", by="effect")
    assert 3 in [h.feature for h in hits] and all("promotes [ river]" in h.matched for h in hits)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    with pytest.raises(StoreError, match="there is words, token, effect"):
        store.search("river", by="magic")


def test_embeddings_come_by_feature_and_labels_first() -> None:
    random = np.random.default_rng(0)
    rows = [(d, int(f), s) for d in (0, 1) for f in random.permutation(40) for s in ("evidence", "label")][:150]
    vectors = random.standard_normal((len(rows), 8)).astype("<f2")
    with duckdb.connect() as connection:
        connection.execute("CREATE SCHEMA evidence")
        connection.execute(
            "CREATE TABLE evidence.embeddings (dictionary_id USMALLINT, feature INTEGER, source VARCHAR, vector BLOB)"
        )
        values = [(*row, v.tobytes()) for row, v in zip(rows, vectors, strict=True)]
        connection.executemany("INSERT INTO evidence.embeddings VALUES (?, ?, ?, ?)", values)
        assert read_embeddings(connection, 7) is None
        found = read_embeddings(connection, 1)
    assert found is not None
    mine = sorted((f, s != "label", n) for n, (d, f, s) in enumerate(rows) if d == 1)
    assert found[0].features.tolist() == [f for f, _, _ in mine]
    assert found[1].tolist() == ["evidence" if later else "label" for _, later, _ in mine]
    wanted = vectors[[n for *_, n in mine]].astype(np.float64)
    np.testing.assert_allclose(found[0].vectors, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)


def test_search_by_vector(evidence: Evidence, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((40, 8)).astype("<f2")
    folder = Evidence(tmp_path / "evidence")
    for table in ("documents", "windows", "vocabulary", "split_rows", "dictionaries", "activations", "logit_effects"):
        folder.write(table, evidence.read(table))
    folder.write("neighbours", evidence.read("neighbours"))
    rows = [{"dictionary": "topk", "feature": i, "source": "label", "model": "m", "vector": v.tobytes()}
            for i, v in enumerate(vectors)]  # fmt: skip
    folder.write("embeddings", pa.Table.from_pylist(rows))
    with FeatureStore.open(FeatureStore.build(tmp_path / "s.duckdb", folder)) as store:
        full = vectors.astype(np.float64)
        full /= np.linalg.norm(full, axis=1, keepdims=True)
        wanted = np.argsort(-(full @ full[5]))[:4]
        hits = store.search_vector(vectors[5], limit=4)
        assert [h.feature for h in hits] == wanted.tolist() and hits[0].score == pytest.approx(1, abs=1e-3)
        assert hits[0].matched == {"label": ["cosine 1.000"]} and store.embedding_model() == "m"
        assert store.embedding_model("other") is None
        with pytest.raises(StoreError, match="no embeddings of other"):
            store.search_vector(vectors[5], dictionary="other")
        with pytest.raises(StoreError, match="needs 8 numbers"):
            store.search_vector(vectors[5][:3])


def test_search_refuses_nonsense_in_one_line(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match="at least one word"):
        store.search(" ,;! ")
    for where in ("nosuch > 1", "1 = 1) UNION SELECT 1 --", "1 = 1); DROP VIEW features; --"):
        with pytest.raises(SQLError) as caught:
            store.search("river", where=where)
        assert "\n" not in str(caught.value)


def test_feature_out_of_range_names_the_range(store: FeatureStore) -> None:
    for feature in (-1, 40):
        with pytest.raises(FeatureNotFound, match="0 to 39"):
            store.feature(feature)
    with pytest.raises(FeatureNotFound, match="it has topk, other"):
        store.examples(0, dictionary="nosuch")


def test_neighbours_and_logit_effects(store: FeatureStore) -> None:
    near = store.neighbours(2, limit=3)
    assert [n["neighbour"] for n in near] == [3, 4, 5] and near[0]["neighbour_label"] == "rivers and streams"
    effects = store.logit_effects(3, direction="promoted", limit=2)
    assert [e["rank"] for e in effects] == [0, 1] and effects[0]["token"] == " river"
    assert len(store.logit_effects(3, limit=2)) == 4


@pytest.mark.parametrize("statement", REFUSED)
def test_the_trusted_connection_cannot_write_or_escape(store: FeatureStore, store_path: Path, statement: str) -> None:
    secret_python_variable = store.trusted_sql("SELECT 42 AS password")
    before = hashlib.sha256(store_path.read_bytes()).hexdigest()
    files = set(store_path.parent.iterdir())
    with pytest.raises(SQLError) as caught:
        store.trusted_sql(statement)
    assert "\n" not in str(caught.value) and secret_python_variable.num_rows == 1
    assert hashlib.sha256(store_path.read_bytes()).hexdigest() == before
    assert set(store_path.parent.iterdir()) == files
    assert not list(Path("/tmp").glob("saeql-escape*"))
    assert store.trusted_sql("SELECT count(*) AS n FROM features")["n"][0].as_py() == 80


def test_sql_messages_help(store: FeatureStore) -> None:
    with pytest.raises(SQLError, match=r'"labell" not found.*"label"') as caught:
        store.sql("SELECT labell FROM features")
    assert "\n" not in str(caught.value) and "^" not in str(caught.value)
    with pytest.raises(SQLError, match="this store is read-only"):
        store.sql("DELETE FROM evidence.labels")
    with pytest.raises(SQLError, match="one SQL statement, not 0"):
        store.sql(" ")


def test_sql_params_cap_and_kinds(store: FeatureStore) -> None:
    assert store.sql("SELECT $a + 1 AS x", {"a": 2})["x"].to_pylist() == [3]
    assert store.sql("SELECT ?::INTEGER AS x", [5])["x"].to_pylist() == [5]
    cut = store.sql("SELECT * FROM activations ORDER BY activation DESC", max_rows=7)
    assert cut.num_rows == 7 and cut.schema.metadata == {b"truncated": b"true"}
    assert cut["activation"].to_pylist() == sorted(cut["activation"].to_pylist(), reverse=True)
    assert not store.sql("SELECT 1", max_rows=1).schema.metadata
    for query in ("DESCRIBE features", "SUMMARIZE features", "SHOW TABLES", "EXPLAIN SELECT 1", "FROM documents"):
        assert store.sql(query).num_rows > 0
    assert (
        store.sql("PIVOT (SELECT split, kind FROM examples) ON split IN ('train', 'test') USING count(*)").num_rows == 2
    )


def test_sql_is_stopped_at_its_deadline(store: FeatureStore) -> None:
    with pytest.raises(SQLError, match=r"longer than 0\.3 s"):
        store.sql("SELECT count(*) FROM range(10000000) a, range(10000000) b", timeout_seconds=0.3)
    assert store.sql("SELECT 1 AS x")["x"].to_pylist() == [1]


def test_threads_share_a_store(store: FeatureStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda i: (store.feature(i % 40)["feature"], store.search("river")[0].feature), range(80))
        )
    assert found == [(i % 40, 3) for i in range(80)]


def test_a_closed_store_says_so(store_path: Path) -> None:
    with FeatureStore.open(store_path) as store:
        pass
    with pytest.raises(StoreError, match="has been closed"):
        store.feature(0)
    with pytest.raises(StoreError, match="has been closed"):
        store.sql("SELECT 1")


def test_rows_of_a_feature_are_those_of_the_views(store: FeatureStore) -> None:
    """They are read from tables, because planning the views takes longer than all else; they must not drift apart."""
    for name in [row["dictionary"] for row in store.dictionaries()]:
        params = {"name": name}
        features = store.trusted_sql("SELECT feature FROM features WHERE dictionary = $name ORDER BY 1", params)
        for feature in features["feature"].to_pylist()[:40]:

            def view(what: str, order: str, name: str = name, feature: int = feature) -> list[dict]:
                query = f"SELECT * FROM {what} WHERE dictionary = $name AND feature = $feature ORDER BY {order}"
                return store.memory.rows(query, {"name": name, "feature": feature})

            row = store.feature(feature, name)
            assert [dict(row)] == view("features", "1") and list(row) == list(view("features", "1")[0])
            assert store.neighbours(feature, dictionary=name, limit=99) == view("neighbours", "rank")
            assert store.logit_effects(feature, dictionary=name, limit=99) == view("logit_effects", "direction, rank")
            for direction in ("promoted", "suppressed"):
                found = store.logit_effects(feature, dictionary=name, direction=direction, limit=2)
                every = view("logit_effects", "rank")
                assert found == [e for e in every if e["direction"] == direction and e["rank"] < 2]


def test_rows_of_features_kept_in_memory_are_those_that_are_asked_for(store_path: Path) -> None:
    with FeatureStore.open(store_path) as store:
        for name in [row["dictionary"] for row in store.dictionaries()]:
            features = range(store.memory.dictionary(name)[2])
            asked = [_row_or_none(store, feature, name) for feature in features]
            assert store.memory.dictionary(name)[1] not in store.memory._feature_columns
            store.cards(name)
            kept = [_row_or_none(store, feature, name) for feature in features]
            assert store.memory.dictionary(name)[1] in store.memory._feature_columns
            assert repr(asked) == repr(kept) and any(row and row["auroc"] is None for row in kept)
        documents = store.memory.rows("SELECT document_id, title FROM documents")
        titles = {row["document_id"]: row["title"] for row in documents}
        assert store.memory.titles([*titles, max(titles) + 1, -1]) == titles


def _row_or_none(store: FeatureStore, feature: int, name: str) -> dict | None:
    try:
        return dict(store.feature(feature, name))
    except FeatureNotFound:
        return None
