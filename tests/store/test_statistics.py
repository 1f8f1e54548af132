"""What the build derives, against numpy on the evidence itself."""

from typing import Any

import numpy as np
import pytest

from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore


@pytest.fixture(scope="module")
def rows(evidence: Evidence) -> dict[str, np.ndarray]:
    """Activations of dictionary topk, one array a column, with the document of each."""
    table = evidence.read("activations")
    columns = {n: np.array(table[n].to_pylist()) for n in table.column_names}
    mine = columns.pop("dictionary") == "topk"
    columns = {n: c[mine] for n, c in columns.items()}
    documents = np.array(evidence.read("windows")["document_ids"].to_pylist())
    columns["document_id"] = documents[columns["window_id"], columns["position"]]
    return columns


def test_statistics_equal_numpy(store: FeatureStore, evidence: Evidence, rows: dict[str, np.ndarray]) -> None:
    kept = {r["split"]: r["num_kept_rows"] for r in evidence.read("split_rows").to_pylist()}
    found = store.sql("SELECT * FROM feature_stats WHERE dictionary = 'topk'").to_pylist()
    assert len(found) == 40 * 3
    for got in found:
        mine = (rows["feature"] == got["feature"]) & (rows["split"] == got["split"])
        values, tokens = rows["activation"][mine].astype(np.float64), rows["token_id"][mine]
        assert got["num_activations"] == mine.sum()
        assert got["density"] == pytest.approx(mine.sum() / kept[got["split"]])
        if not mine.any():
            zeros = {k: v for k, v in got.items() if k not in ("dictionary", "corpus", "feature", "split")}
            assert set(zeros.values()) == {0}
            continue
        assert got["mean_activation"] == pytest.approx(values.mean())
        assert got["max_activation"] == pytest.approx(values.max())
        assert [got["p50"], got["p90"], got["p99"]] == pytest.approx(np.quantile(values, [0.5, 0.9, 0.99]), rel=1e-5)
        share = np.unique(tokens, return_counts=True)[1] / len(tokens)
        assert got["token_entropy"] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-5)
        assert got["num_distinct_tokens"] == len(share)
        assert got["num_documents"] == len(np.unique(rows["document_id"][mine]))


def test_a_feature_that_never_fires_has_a_row(store: FeatureStore) -> None:
    dead = store.feature(39)
    assert dead["density"] == dead["max_activation"] == dead["num_documents"] == 0
    assert dead["top_tokens"] == [] and store.examples(39) == []


def test_top_tokens_by_count_then_id(store: FeatureStore, evidence: Evidence, rows: dict[str, np.ndarray]) -> None:
    text = dict(zip(*evidence.read("vocabulary").to_pydict().values(), strict=True))
    for feature in range(39):
        mine = (rows["feature"] == feature) & (rows["split"] == "train")
        ids, counts = np.unique(rows["token_id"][mine], return_counts=True)
        order = np.lexsort((ids, -counts))[:10]
        assert store.feature(feature)["top_tokens"] == [text[int(i)] for i in ids[order]]


@pytest.mark.parametrize(("split", "most"), [("train", 20), ("test", 10)])
def test_top_examples_are_the_best_position_of_the_best_windows(
    store: FeatureStore, rows: dict[str, np.ndarray], split: str, most: int
) -> None:
    for feature in range(40):
        mine = (rows["feature"] == feature) & (rows["split"] == split)
        order = np.lexsort((rows["position"][mine], rows["window_id"][mine], -rows["activation"][mine]))
        expected: dict[int, tuple[int, float]] = {}
        for i in np.flatnonzero(mine)[order]:
            expected.setdefault(int(rows["window_id"][i]), (int(rows["position"][i]), float(rows["activation"][i])))
        wanted = [(w, *expected[w]) for w in list(expected)[:most]]
        got = store.examples(feature, split=split, limit=100)
        assert [(e.window_id, e.position, e.activation) for e in got] == wanted
        assert [e.rank for e in got] == list(range(1, len(wanted) + 1))


def test_context_is_the_window_with_this_features_activations(
    store: FeatureStore, evidence: Evidence, rows: dict[str, np.ndarray]
) -> None:
    text = dict(zip(*evidence.read("vocabulary").to_pydict().values(), strict=True))
    windows = evidence.read("windows").to_pydict()
    for feature in (0, 3, 17, 38):
        mine = rows["feature"] == feature
        where = zip(rows["window_id"][mine], rows["position"][mine], strict=True)
        value: dict[Any, float] = dict(zip(where, rows["activation"][mine], strict=True))
        for e in store.examples(feature, limit=20) + store.examples(feature, kind="decile", limit=20):
            first, last = max(e.position - 16, 0), min(e.position + 8, 31)
            assert e.tokens == [text[t] for t in windows["token_ids"][e.window_id][first : last + 1]]
            assert e.focus == e.position - first + 1
            assert e.activations == pytest.approx([value.get((e.window_id, p), 0) for p in range(first, last + 1)])
            assert e.activations[e.focus - 1] == e.activation
            assert e.document_id == windows["document_ids"][e.window_id][e.position]
            assert e.title == f"Title {e.document_id}"


def test_deciles_are_equal_parts_of_the_train_activations(store: FeatureStore, rows: dict[str, np.ndarray]) -> None:
    for feature in (0, 10, 38):
        mine = (rows["feature"] == feature) & (rows["split"] == "train")
        values = np.sort(rows["activation"][mine])[::-1]
        got = store.examples(feature, kind="decile", limit=100)
        assert [e.decile for e in got] == sorted([*range(1, 11)] * 2, reverse=True)
        for e in got:
            assert e.decile is not None
            lowest, highest = (10 - e.decile) * len(values) / 10, (11 - e.decile) * len(values) / 10
            assert values[max(int(np.ceil(highest)) - 1, 0)] <= e.activation <= values[int(lowest)]


def test_build_is_deterministic(store: FeatureStore, evidence: Evidence, tmp_path: Any) -> None:
    again = FeatureStore.build(tmp_path / "again.duckdb", evidence, threads=1)
    query = "SELECT * FROM examples ORDER BY ALL"
    with FeatureStore.open(again) as other:
        assert other.sql(query).equals(store.sql(query))


def test_many_chunks_give_what_one_gives(
    store: FeatureStore, evidence: Evidence, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeql.store.segment.CHUNK_ROWS", 500)
    again = FeatureStore.build(tmp_path / "again.duckdb", evidence)
    with FeatureStore.open(again) as other:
        for view in ("examples", "activations", "document_activations", "cofirings"):
            query = f"SELECT * FROM {view} ORDER BY ALL"
            assert other.sql(query).equals(store.sql(query))
        for view in ("feature_stats", "features"):
            query = f"SELECT * FROM {view} ORDER BY dictionary, feature{', split' if view == 'feature_stats' else ''}"
            for got, wanted in zip(other.sql(query).to_pylist(), store.sql(query).to_pylist(), strict=True):
                for name, value in wanted.items():  # means and entropies are sums, whose order threads decide
                    assert got[name] == (pytest.approx(value, abs=1e-12) if isinstance(value, float) else value)


def test_both_orders_hold_the_evidence(store: FeatureStore, rows: dict[str, np.ndarray]) -> None:
    keys = list(zip(rows["window_id"], rows["position"], rows["feature"], rows["activation"], strict=True))
    by_feature = "SELECT window_id, position, feature, activation, split FROM activations WHERE dictionary = 'topk'"
    got = store.sql(by_feature).to_pylist()
    assert sorted(tuple(r.values())[:4] for r in got) == sorted(keys)
    assert {(r["window_id"], r["split"]) for r in got} == set(zip(rows["window_id"], rows["split"], strict=True))
    order = [(r["feature"], ("train", "calibration", "test").index(r["split"]), -r["activation"]) for r in got]
    assert order == sorted(order)
    query = "SELECT window_id, position, feature, activation FROM document_activations WHERE dictionary = 'topk'"
    got = [tuple(r.values()) for r in store.sql(query).to_pylist()]
    assert [g[:3] for g in got] == sorted(g[:3] for g in got) and sorted(got) == sorted(keys)


def test_cofirings_of_rare_features_are_exact(tmp_path: Any, synthetic: Any) -> None:
    evidence = synthetic.write(tmp_path / "evidence", synthetic.Size(features=60, windows=20, activations=3_000))
    with FeatureStore.open(FeatureStore.build(tmp_path / "s.duckdb", evidence)) as store:
        got = store.sql("SELECT * FROM cofirings ORDER BY feature, rank").to_pylist()
    table = evidence.read("activations").to_pydict()
    of: dict[int, set[tuple[int, int]]] = {f: set() for f in range(60)}
    for place in zip(table["feature"], table["window_id"], table["position"], strict=True):
        of[place[0]].add(place[1:])
    num_rows = len(set().union(*of.values()))
    rare = [f for f in of if 1 < len(of[f]) <= 64]
    assert len(rare) > 20
    for feature in rare:
        wanted = {}
        for partner in of:
            both = len(of[feature] & of[partner])
            if partner != feature and both > 1:
                pmi = np.log2(both * num_rows / len(of[feature]) / len(of[partner]))
                if pmi > 0:
                    wanted[partner] = (both, pmi)
        mine = [r for r in got if r["feature"] == feature]
        assert {r["partner"]: r["count"] for r in mine} == {p: c for p, (c, _) in wanted.items()}
        for r in mine:
            assert r["pmi"] == pytest.approx(wanted[r["partner"]][1], abs=0.006) and r["num_sampled"] == len(
                of[feature]
            )
        scores = [wanted[r["partner"]][0] * wanted[r["partner"]][1] for r in mine]
        assert scores == pytest.approx(sorted(scores, reverse=True))
        assert [r["rank"] for r in mine] == list(range(1, len(mine) + 1))


def test_cofirings_of_frequent_features_are_near(store: FeatureStore, rows: dict[str, np.ndarray]) -> None:
    place = rows["window_id"].astype(np.int64) * 32 + rows["position"]
    of = {f: set(place[rows["feature"] == f].tolist()) for f in range(40)}
    got = store.sql("SELECT * FROM cofirings WHERE dictionary = 'topk' AND num_sampled = 64").to_pylist()
    assert len(got) > 20
    for r in got:
        share = len(of[r["feature"]] & of[r["partner"]]) / len(of[r["feature"]])
        assert r["count"] / len(of[r["feature"]]) == pytest.approx(share, abs=5 * np.sqrt(share / 64) + 0.02)
