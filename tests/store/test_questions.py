"""Macros and named views, against the evidence; the same on Parquet; the schema's page."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from saeql.store.errors import StoreError
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.parquet_store import STORE_FILE, write_parquet
from saeql.store.schema_text import schema_markdown

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def places(evidence: Evidence) -> dict[int, set[tuple[int, int]]]:
    """Where every feature of topk is active."""
    table = evidence.read("activations").to_pydict()
    found: dict[int, set[tuple[int, int]]] = {f: set() for f in range(40)}
    for name, feature, *place in zip(
        table["dictionary"], table["feature"], table["window_id"], table["position"], strict=True
    ):
        if name == "topk":
            found[feature].add((place[0], place[1]))
    return found


def test_fires_on_counts_every_row(store: FeatureStore, evidence: Evidence, places: dict) -> None:
    tokens = evidence.read("windows")["token_ids"].to_pylist()
    on = {(w, p) for w, row in enumerate(tokens) for p, t in enumerate(row) if t == 1}  # ' London'
    got = store.sql("FROM fires_on_exact(' London')").to_pylist()
    assert {r["feature"]: r["count"] for r in got} == {f: len(p & on) for f, p in places.items() if p & on}
    for r in got:
        both, own = len(places[r["feature"]] & on), len(places[r["feature"]])
        assert r["share_of_token"] == pytest.approx(both / len(on)) and r["share_of_feature"] == pytest.approx(
            both / own
        )
        assert r["f1"] == pytest.approx(2 * both / (own + len(on)))
    assert [r["f1"] for r in got] == sorted((r["f1"] for r in got), reverse=True)
    assert store.sql("FROM fires_on(' river') LIMIT 1")["feature"].to_pylist() == [3]
    assert store.sql("FROM fires_on(' nosuch')").num_rows == store.sql("FROM fires_on_exact(' nosuch')").num_rows == 0


def test_cofires_exact_counts_every_row(store: FeatureStore, places: dict) -> None:
    num_rows = len(set().union(*places.values()))
    got = store.sql("FROM cofires_exact(5)").to_pylist()
    assert {r["feature"]: r["count"] for r in got} == {
        f: len(p & places[5]) for f, p in places.items() if f != 5 and p & places[5]
    }
    for r in got:
        chance = len(places[5]) * len(places[r["feature"]]) / num_rows
        assert r["pmi"] == pytest.approx(np.log2(r["count"] / chance))
    near = store.sql("FROM cofires(5)").to_pylist()
    assert [r["feature"] for r in near] == [r["partner"] for r in store.cofirings(5, limit=64)]


def test_features_like_promotes_and_compare(store: FeatureStore) -> None:
    assert store.sql("FROM features_like(2)")["feature"].to_pylist() == [3, 4, 5, 6, 7]
    assert store.sql("FROM features_like(2, dict := 'other')")["dictionary"].to_pylist() == ["other"] * 5
    promoted = store.sql("FROM promotes(' river')").to_pylist()
    assert 3 in [r["feature"] for r in promoted]
    assert [r["effect"] for r in promoted] == sorted((r["effect"] for r in promoted), reverse=True)
    assert {r["token"] for r in store.sql("FROM suppresses(' river')").to_pylist()} == {" river"}
    compared = store.sql("FROM compare('topk', 'other')").to_pylist()
    assert len(compared) == 10 and all(r["difference"] == 0 for r in compared)


def test_named_views_are_parts_of_features(store: FeatureStore) -> None:
    def ids(query: str) -> set[tuple[str, int]]:
        return {tuple(r.values()) for r in store.sql(query).to_pylist()}

    assert ids("SELECT dictionary, feature FROM dead") == {("topk", 39), ("other", 39)}
    assert ids("SELECT dictionary, feature FROM lexical") == ids(
        "SELECT dictionary, feature FROM features WHERE kind = 'lexical'"
    )
    assert not ids("SELECT dictionary, feature FROM unexplained") & ids("SELECT dictionary, feature FROM lexical")
    assert ids("SELECT dictionary, feature FROM dense") == ids(
        "SELECT dictionary, feature FROM features WHERE density > 0.1"
    )


def test_features_of_a_document(store: FeatureStore, evidence: Evidence, places: dict) -> None:
    documents = evidence.read("windows")["document_ids"].to_pylist()
    for wanted in (0, 7, 20):
        inside = {(w, p) for w, row in enumerate(documents) for p, d in enumerate(row) if d == wanted}
        got = store.document_features(wanted, limit=100)
        assert {r["feature"]: r["count"] for r in got} == {f: len(p & inside) for f, p in places.items() if p & inside}
        shares = [r["share_of_largest"] for r in got if r["share_of_largest"] is not None]
        assert shares == sorted(shares, reverse=True)
    with pytest.raises(StoreError, match="no document 9999"):
        store.document_features(9999)


def test_a_store_on_parquet_answers_the_same(
    store: FeatureStore, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeql.store.parquet_store._LONG_GROUP_ROWS", 4)
    folder = write_parquet(store_path, tmp_path / "features.parquet")
    with FeatureStore.open(folder) as other:
        for query in (
            *(
                f"SELECT * FROM {v} ORDER BY ALL"
                for v in ("features", "examples", "activations", "cofirings", "tokens")
            ),
            *(
                "FROM fires_on(' river')",
                "FROM fires_on_exact(' river')",
                "FROM cofires_exact(4)",
                "FROM dead",
                "DESCRIBE features",
            ),
        ):
            assert other.sql(query).to_pylist() == store.sql(query).to_pylist()
        assert other.examples(3) == store.examples(3) and other.search("river token") == store.search("river token")
        assert other.document_features(3) == store.document_features(3)
    windows = pq.ParquetFile(folder / "evidence.windows.parquet").metadata
    assert windows.num_row_groups == -(-windows.num_rows // 4) > 1
    write_parquet(store_path, folder)  # again, in place of the one there
    (folder / STORE_FILE).write_text('{"schema_version": 999}')
    with pytest.raises(StoreError, match="upgrade saeql"):
        FeatureStore.open(folder)
    (tmp_path / "mine").mkdir()
    with pytest.raises(StoreError, match="no Parquet store"):
        write_parquet(store_path, tmp_path / "mine")


def test_schema_page_is_the_schema() -> None:
    assert (ROOT / "docs" / "schema.md").read_text(encoding="utf-8") == schema_markdown(), (
        "run python scripts/write_schema.py"
    )


def test_everything_is_commented(store: FeatureStore) -> None:
    for source, name in (("duckdb_tables()", "table_name"), ("duckdb_views()", "view_name")):
        bare = store.sql(
            f"SELECT {name} AS n FROM {source} WHERE NOT internal AND comment IS NULL AND database_name <> 'system'"
        )
        assert bare["n"].to_pylist() == []
    views = "('dead', 'dense', 'lexical', 'unexplained')"  # their columns are those of features
    columns = store.sql(
        "SELECT table_name || '.' || column_name AS n FROM duckdb_columns() "
        f"WHERE NOT internal AND comment IS NULL AND table_name NOT IN {views}"
    )
    assert columns["n"].to_pylist() == []
    macros = store.sql(
        "SELECT function_name AS n FROM duckdb_functions() "
        "WHERE function_type = 'table_macro' AND NOT internal AND comment IS NULL"
    )
    assert macros["n"].to_pylist() == []
