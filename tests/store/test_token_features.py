"""Which features fire on a token: what the build keeps of every one, against every activation; searches, upgrades."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from saeql.store import migrations, token_features
from saeql.store.errors import StoreError
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.listing import Filters
from saeql.store.token_features import TokenFeatures

SHARED = "feature, label, count, share_of_token, share_of_feature, f1"


@pytest.fixture(scope="module")
def few_path(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that keeps 5 features of a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_features, "MAX_FEATURES", 5)
        patch.setattr(token_features, "_PENDING", 20)
        return FeatureStore.build(tmp_path_factory.mktemp("few") / "features.duckdb", evidence)


def test_what_is_kept_of_a_token_is_the_best_of_all(few_path: Path) -> None:
    with FeatureStore.open(few_path) as store:
        tokens = store.sql("SELECT DISTINCT token FROM tokens ORDER BY token")["token"].to_pylist()
        cut = 0
        for token in tokens[::8]:
            for name in ("topk", "other"):
                macro = f"{SHARED} FROM %s($word, dict := $name)"
                asked = {"word": token, "name": name}
                everything = store.trusted_sql(f"SELECT {macro % 'fires_on_exact'}", asked).to_pylist()
                best = store.trusted_sql(f"SELECT {macro % 'fires_on'}", asked).to_pylist()
                assert best == everything[:5]
                there = store.trusted_sql("SELECT DISTINCT num_features FROM fires_on($word, dict := $name)", asked)
                assert there["num_features"].to_pylist() == ([len(everything)] if everything else [])
                cut += len(everything) > 5
        assert len(tokens) > 40 and cut > 8


def brute(features: np.ndarray, tokens: np.ndarray, most: int, vocabulary: int) -> dict[int, list[tuple[int, int]]]:
    """(feature, count) by token of the best, from one (feature, token) an activation."""
    rows, totals, found = np.bincount(tokens, minlength=vocabulary), np.bincount(features), {}
    for token in np.unique(tokens).tolist():
        count = np.bincount(features[tokens == token], minlength=len(totals))
        there = np.flatnonzero(count)
        f1 = 2 * count[there] / (totals[there] + rows[token])
        best = there[np.lexsort((there, -f1))][:most]
        found[token] = sorted((int(f), int(count[f])) for f in best)
    return found


@pytest.mark.parametrize("pending", [0, 100, 10**6])
def test_ties_and_chunks_in_any_order(monkeypatch: pytest.MonkeyPatch, pending: int) -> None:
    monkeypatch.setattr(token_features, "MAX_FEATURES", 4)
    monkeypatch.setattr(token_features, "_PENDING", pending)
    random = np.random.default_rng(0)
    tokens, features = random.integers(0, 30, 1500), random.integers(0, 90, 1500)
    features[:300] = 90 + np.arange(300) // 2  # many that fire twice: even with one another

    class Text:
        token_ids, vocabulary = tokens, np.full(33, "", object)

    made = TokenFeatures(7, Text(), np.bincount(features))  # pyright: ignore[reportArgumentType]
    for part in random.permutation(8):
        mine = features % 8 == part
        pairs, count = np.unique(np.stack([features[mine], tokens[mine]]), axis=1, return_counts=True)
        made.add(made.candidates(pairs[0], pairs[1], count))
    tables = made.tables()
    got: dict[int, list[tuple[int, int]]] = {}
    for row in tables["derived.token_features"].to_pylist():
        assert row["segment_id"] == 7
        got.setdefault(row["token_id"], []).append((row["feature"], row["count"]))
    assert got == brute(features, tokens, 4, 33)
    counted = {r["token_id"]: r for r in tables["derived.token_counts"].to_pylist()}
    assert sorted(counted) == sorted(got)
    for token, row in counted.items():
        assert row["num_rows"] == (tokens == token).sum()
        assert row["num_features"] == len(np.unique(features[tokens == token]))


def test_a_search_takes_what_was_kept_only_where_that_is_enough(
    few_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeql.store.search.MAX_FEATURES", 5)
    with FeatureStore.open(few_path) as store:
        asked: list[str] = []
        ask = store.memory.columns
        monkeypatch.setattr(store.memory, "columns", lambda query, *rest: asked.append(query) or ask(query, *rest))
        whole = store.search(" river", by="token", limit=50)
        assert len(whole) > 5 and any("fires_on_exact" in query for query in asked)
        asked.clear()
        assert store.search(" river", by="token", limit=5) == whole[:5]
        assert not any("fires_on_exact" in query for query in asked)
        narrow = store.search(" river", by="token", limit=3, where="kind = 'none'")
        assert narrow == [hit for hit in whole if hit.kind == "none"][:3]

        best, every = store.found(" river", by="token", limit=5), store.found(" river", by="token")
        assert not best.is_whole and every.is_whole and best.total == len(every.features) == len(whole)
        first, all_of_it = (store.listing(found=found, limit=5) for found in (best, every))
        assert first == all_of_it and first.total == len(whole)
        more: dict[str, Any]
        for more in ({"offset": 5}, {"sort": "label"}, {"where": "true"}, {"filters": Filters(kind="none")}):
            with pytest.raises(StoreError, match="only the best"):
                store.listing(found=best, limit=5, **more)


def test_a_dictionary_on_two_corpora_is_counted_over_both(evidence: Evidence, tmp_path: Path, synthetic) -> None:
    wider = synthetic.write(tmp_path / "more", synthetic.Size(dictionaries=("topk", "other"), windows=30), seed=5)
    with FeatureStore.open(FeatureStore.build(tmp_path / "s.duckdb", [evidence, wider])) as store:
        if len(store.sql("FROM corpora")) < 2:
            pytest.fail("the evidence is one corpus")
        both = {r["feature"]: r["count"] for r in store.sql("FROM fires_on_exact(' river')").to_pylist()}
        each = store.sql("FROM fires_on(' river')").to_pylist()
        assert len({r["corpus"] for r in each}) == 2
        assert both == {f: sum(r["count"] for r in each if r["feature"] == f) for f in both}
        hit = store.search(" river", by="token", limit=1)[0]
        assert f"{both[hit.feature]} times" in hit.matched["fires on [ river]"]


def test_a_store_without_them_gets_them_when_it_is_opened(few_path: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(token_features, "MAX_FEATURES", 5)
    old = tmp_path / "features.duckdb"
    old.write_bytes(few_path.read_bytes())
    tables = ("derived.token_features", "derived.token_counts")
    with duckdb.connect(str(old)) as connection:
        before = {table: connection.execute(f"FROM {table}").fetchall() for table in tables}
        assert all(before.values())
        for table in tables:
            connection.execute(f"DROP TABLE {table}")
        connection.execute("DROP MACRO TABLE fires_on_exact")
        connection.execute("DELETE FROM migrations WHERE version > 13")
        connection.execute("UPDATE meta SET schema_version = 13")
    with FeatureStore.open(old) as store:
        assert store.sql("SELECT schema_version AS v FROM meta")["v"].to_pylist() == [migrations.schema_version()]
        for table, rows in before.items():
            assert [tuple(row.values()) for row in store.trusted_sql(f"FROM {table}").to_pylist()] == rows
        assert store.sql("FROM fires_on(' river') LIMIT 1")["feature"].to_pylist() == [3]
