"""`saeql serve`: pages and API say what the store and the model say, to whom they may, and no more than asked for."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pytest
from browser_server import TOKEN, Browser, Page, assert_inert, served
from two_dictionaries import OTHER, two_dictionaries

from saeql.pipelines import Run
from saeql.pipelines.browser.comparison import comparison
from saeql.pipelines.browser.serve import ServeError, serve_store
from saeql.pipelines.cli import main
from saeql.pipelines.steering.edits import Edit
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.listing import Filters
from saeql.store.records import STABILITY

TEXT = " the river bank and the blue house"
PAGES = ("/", "/features", "/features?q=river", "/features/7", "/features/7?split=test", "/compare", "/sql", "/prompt",
         "/steer?features=3:0.5,7:-1")  # fmt: skip


@pytest.fixture(scope="module")
def run_copy(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of its own: one program cannot have a store open in two ways."""
    folder = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


@pytest.fixture(scope="module")
def browser(run_copy: Path) -> Iterator[Browser]:
    with served(run_copy / "features.duckdb", run_copy, new_tokens=120, prompt_tokens=60) as found:
        yield found


@pytest.fixture(scope="module")
def store(tiny_run: Path) -> Iterator[FeatureStore]:
    with Run.open(tiny_run).store() as opened:
        yield opened


@pytest.mark.parametrize("path", PAGES)
def test_pages_stand_alone(browser: Browser, path: str) -> None:
    answer = browser.ask(path)
    assert answer.status == 200, answer.text
    assert_inert(answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers


def test_list_is_what_sql_says(browser: Browser, store: FeatureStore) -> None:
    rows = store.trusted_sql("SELECT feature, label, kind, auroc, density, max_activation FROM features").to_pylist()
    for sort, order in (("density", ""), ("density", "asc"), ("auroc", "desc"), ("max_activation", ""), ("label", "")):
        found = browser.ask("/api/v1/features", sort=sort, order=order, rows=200).json
        descending = order == "desc" or (not order and sort != "label")

        def key(row: dict, sort: str = sort, descending: bool = descending) -> tuple:
            if sort == "label":
                return row["kind"] == "none", row["label"].lower(), row["feature"]
            return row[sort] is None, (row[sort] or 0) * (-1 if descending else 1), row["feature"]

        assert [f["feature"] for f in found["features"]] == [r["feature"] for r in sorted(rows, key=key)], sort
    bounds = sorted(r["density"] for r in rows)[20], sorted(r["density"] for r in rows)[60]
    filters = {"kind": rows[0]["kind"], "min_density": bounds[0], "max_density": bounds[1]}
    wanted = [r["feature"] for r in rows if r["kind"] == filters["kind"] and bounds[0] <= r["density"] <= bounds[1]]
    pages = [
        browser.ask("/api/v1/features", rows=4, page=n, **filters).json for n in range(1, -(-len(wanted) // 4) + 2)
    ]
    assert [f["feature"] for page in pages for f in page["features"]] == wanted and len(wanted) > 4
    assert all(page["total"] == len(wanted) for page in pages)
    links = Page(browser.ask("/features", rows=4, page=1, **filters).text).elements
    assert [a["href"] for t, a in links if t == "a" and re.fullmatch(r"/features/\d+", a.get("href") or "")] == [
        f"/features/{f}" for f in wanted[:4]
    ]


@pytest.mark.parametrize(("by", "text"), [("words", "river bank"), ("token", " river"), ("effect", " river")])
def test_searches_are_the_stores(browser: Browser, store: FeatureStore, by: str, text: str) -> None:
    hits = store.search(text, by=by, limit=100)
    found = browser.ask("/api/v1/features", q=text, by=by, rows=100).json["features"]
    assert hits and [(h.feature, h.matched) for h in hits] == [(f["feature"], f["matched"]) for f in found]
    narrow = [h.feature for h in hits if h.density >= hits[0].density]
    bound = browser.ask("/api/v1/features", q=text, by=by, rows=100, min_density=hits[0].density).json["features"]
    assert [f["feature"] for f in bound] == narrow


def test_listing_meets_sql_conditions_and_found_features(store: FeatureStore) -> None:
    condition = "density > 0.01 AND feature % 2 = 0"
    wanted = store.sql(f"SELECT feature FROM features WHERE {condition} ORDER BY feature")["feature"].to_pylist()
    found = store.listing(where=condition, limit=1000)
    assert [h.feature for h in found.hits] == wanted and found.total == len(wanted) > 1
    assert store.listing(Filters(kind="none such")).total == 0
    assert store.listing(offset=10_000).hits == []


def test_feature_has_what_the_store_has(browser: Browser, store: FeatureStore) -> None:
    row = store.feature(7)
    found = browser.ask("/api/v1/features/7").json
    examples = store.examples(7, limit=20)
    top = [a for a in found["activations"] if a["decile"] is None]
    assert [a["tokens"] for a in top] == [e.tokens for e in examples]
    assert all(a["values"][a["qualifyingTokenIndex"]] == pytest.approx(a["maxValue"], abs=1e-4) for a in top)
    effects = store.logit_effects(7, limit=10)
    assert found["pos_str"] == [e["token"] for e in effects if e["direction"] == "promoted"]
    assert found["neg_values"] == pytest.approx(
        [e["effect"] for e in effects if e["direction"] == "suppressed"], abs=1e-4
    )
    assert found["topkCosSimIndices"] == [n["neighbour"] for n in store.neighbours(7)]
    assert found["frac_nonzero"] == row["density"] and found["maxActApprox"] == row["max_activation"]
    num = store.trusted_sql("SELECT num_activations FROM feature_stats WHERE feature = 7 AND split = 'train'")
    assert sum(found["freq_hist_data_bar_heights"]) == num["num_activations"][0].as_py()
    page = Page(browser.ask("/features/7").text)
    for token in examples[0].tokens:
        assert token.strip() in page.text
    shades = [a["class"] for t, a in page.elements if t == "mark"]
    assert any("l10" in (c or "") for c in shades) and len(shades) >= len(top)
    assert f"store.feature(7, '{row['dictionary']}')" in page.text


def test_snippets_run(browser: Browser, store: FeatureStore) -> None:
    page = browser.ask("/features/7").text
    code = Page(page.partition('id="snippet-1"')[2].partition("</pre>")[0].partition(">")[2]).text
    for statement in code.split(";"):
        if statement.strip():
            assert store.sql(statement).num_rows > 0, statement


def test_overview_has_the_metrics(browser: Browser, store: FeatureStore) -> None:
    text = Page(browser.ask("/").text).text
    for metric in ("fvu", "l0", "ce_increase"):
        assert f" {metric} " in text
    assert "no control has run" in text or "random" in text
    compared = Page(browser.ask("/compare").text).text
    assert "This store has one dictionary" in compared and "fvu" in compared


def test_overview_draws_the_sweep_and_the_layers(run_copy: Path, tmp_path: Path) -> None:
    from saeql.pipelines.token_identity import PlaceIdentity, TokenIdentity
    from saeql.sae.metrics import Estimate

    run = Path(shutil.copytree(run_copy, tmp_path / "run", ignore=shutil.ignore_patterns("activations", "evidence")))
    rows = [
        {"dictionary": f"topk_{k}", "architecture": "topk", "hook_point": "resid_post.0", "l0": k, "fvu": 1 / k,
         "fvu_low": 0.9 / k, "fvu_high": 1.1 / k}
        for k in (4, 8, 16)
    ]  # fmt: skip
    advice = [{"hook_point": "resid_post.0", "dictionary": "topk_8", "reason": "it is <b>enough</b>"}]
    (run / "sweep").mkdir()
    (run / "sweep" / "sweep.json").write_text(json.dumps({"dictionaries": rows, "advice": advice}))
    places = [
        PlaceIdentity(f"resid_post.{n}", n, {t: Estimate(0.9 - n / 10, 50, 0.1, 0.95) for t in ("own", "previous")})
        for n in range(3)
    ]
    (run / "token_identity").mkdir()
    found = TokenIdentity("tiny", 100, 50, 20, 0.1, places).to_dict()
    (run / "token_identity" / "token_identity.json").write_text(json.dumps(found))
    with served(run / "features.duckdb", run) as browser:
        page = browser.ask("/").text
        assert_inert(page)
        sweep, layers = (
            page.partition(f"<h2>{title}</h2>")[2].partition("<h2>")[0] for title in ("Sweep", "Tokens over the layers")
        )
        assert sweep.count("<circle") == 3 and "topk_8: l0 8, fvu 0.125, on the front" in sweep
        assert "take <b>topk_8</b>: it is &lt;b&gt;enough&lt;/b&gt;" in sweep
        assert layers.count("<circle") == 6 and "resid_post.2: 0.700 of test positions" in layers
        (run / "sweep" / "sweep.json").write_text("[")
    with served(run / "features.duckdb", run) as browser:
        assert "<h2>Sweep</h2>" not in browser.ask("/").text


def test_pairs_are_found_by_the_names_that_a_comparison_used(tiny_run: Path, tmp_path: Path) -> None:
    two_dictionaries(tiny_run / "evidence", tmp_path, hostile=False)
    one, other = Evidence(tmp_path / "one"), Evidence(tmp_path / "other")
    pairs = one.read("matches")
    place = pairs.column_names.index("other_dictionary")
    one.write("matches", pairs.set_column(place, "other_dictionary", pa.array(["as told"] * pairs.num_rows)))
    told = {"dictionary": OTHER, "feature": 0, "num_compared": 1, "num_shared": 1, "stability": 1.0,
            "mean_cosine": 1.0, "first_seen": None, "compared_as": "as told", "compared": ["x", "as told"]}  # fmt: skip
    other.write("stability", pa.Table.from_pylist([told], STABILITY))
    path = FeatureStore.build(tmp_path / "features.duckdb", [one, other])
    with FeatureStore.open(path) as store:
        first = next(row["dictionary"] for row in store.dictionaries() if row["dictionary"] != OTHER)
        there, back = comparison(store, first, OTHER), comparison(store, OTHER, first)
    assert there.num_matches == back.num_matches == 96
    assert all(m["feature"] + m["other_feature"] == 95 for m in there.matches + back.matches)
    assert [m["feature"] for m in there.matches] == list(range(50)) == [m["feature"] for m in back.matches]
    titles = [title for title, *_ in there.controls]
    assert titles == sorted(titles) and all(any(lines) for _, *lines in there.controls)


# --- what computes ---------------------------------------------------------------------------------------------------


def test_what_computes_needs_the_token(browser: Browser) -> None:
    edit = {"prompt": "The river", "edits": [{"feature": 3}]}
    for path, body in (
        ("/api/v1/sql", {"query": "SELECT 1"}),
        ("/api/v1/prompt", {"text": "x"}),
        ("/api/v1/steer", edit),
        ("/api/v1/doses", edit),
        ("/steer/doses", edit),
    ):
        assert browser.ask(path, body).status == 401, path
        wrong = browser.ask(path, body, headers={"Authorization": f"Bearer {TOKEN}x"})
        assert wrong.status == 401 and TOKEN not in wrong.text
    for path in ("/api/v1/features?where=true", "/api/v1/features?q=x&by=meaning", "/sql.csv?q=SELECT+1"):
        assert browser.ask(path).status == 401, path
    assert "needs the token" in browser.ask("/sql?q=SELECT+41%2B1").text
    assert "needs the token" in browser.ask("/prompt?text=hello").text
    assert browser.site.models._run is None  # nothing was loaded


def test_token_becomes_a_cookie(browser: Browser) -> None:
    answer = browser.ask(f"/?token={TOKEN}&dictionary=")
    assert answer.status == 303 and TOKEN not in answer.headers["location"]
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    page = browser.ask("/sql?q=SELECT+41%2B1+AS+n", headers={"Cookie": cookie.partition(";")[0]})
    assert re.search(r"<td class=n>42</td>", page.text)
    assert browser.ask("/?token=wrong-wrong-wrong").status == 401


def test_prompt_is_what_search_finds(browser: Browser, tiny_run: Path, store: FeatureStore) -> None:
    from saeql.pipelines.search import search_prompt

    wanted = search_prompt(Run.open(tiny_run), store, TEXT, limit=20)
    found = browser.ask("/api/v1/prompt", {"text": TEXT}, token=True).json
    assert found["tokens"] == wanted.tokens
    assert [f["feature"] for f in found["features"]] == [h.feature for h in wanted.hits]
    for hit, values in zip(found["features"], found["values"], strict=True):
        assert len(values) == len(wanted.tokens) and max(values) > 0, hit
    page = browser.ask(f"/prompt?text={quote(TEXT)}", token=True)
    assert_inert(page.text)
    assert f"/features/{wanted.hits[0].feature}" in page.text


def test_a_text_is_read_for_one_feature(browser: Browser, store: FeatureStore) -> None:
    hits = browser.ask("/api/v1/prompt", {"text": TEXT}, token=True).json
    feature, values = hits["features"][0]["feature"], hits["values"][0]
    page = browser.ask("/prompt", text=TEXT, feature=feature, token=True).text
    assert_inert(page)
    own = Page(page.partition('id="own-title"')[2].partition("</section>")[0])
    num = sum(value > 0 for value in values)
    assert f"Active on {num} of {len(values)} tokens" in own.text
    assert len([t for t, _ in own.elements if t == "mark"]) == num
    silent = next(f for f in range(96) if f not in {h["feature"] for h in hits["features"]})
    said = browser.ask("/prompt", text=" the", feature=silent, token=True).text
    assert "It is not active here" in said or "Active on 1 of 1" in said
    assert browser.ask("/prompt", text=TEXT, feature=96, token=True).status == 404
    assert browser.ask("/prompt", feature="x").status == 400
    assert 'action="/prompt"' in browser.ask("/features/7").text


def test_faults_while_writing_are_logged_and_not_told(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*given: object) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr("saeql.pipelines.browser.computing.write_both", fails)
    answer = browser.ask("/api/v1/steer", {"prompt": "x", "edits": [{"feature": 3}]}, token=True)
    assert events(answer.body) == [{"error": "the server could not do this (KeyError)"}]
    assert "KeyError: 'a secret'" in caplog.text and "Traceback" in caplog.text
    assert not browser.site.models.is_busy


def events(body: bytes) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n") if line]


def test_steering_streams_what_the_steerer_writes(browser: Browser, tiny_run: Path) -> None:
    asked = {"prompt": "The river bank", "edits": [{"feature": 3, "strength": 2.0}, {"feature": 5}], "new_tokens": 12}
    answer = browser.ask("/api/v1/steer", asked, token=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.body)
    written = {
        side: "".join(e.get("text", "") for e in found if e.get("side") == side) for side in ("baseline", "steered")
    }
    steerer = Run.open(tiny_run).steerer()
    edits = [Edit(3, "add", 2.0), Edit(5)]
    assert written["baseline"].strip() == steerer.generate(asked["prompt"], max_new_tokens=12).strip()
    assert written["steered"].strip() == steerer.generate(asked["prompt"], edits, max_new_tokens=12).strip()
    assert found[-1] == {"done": True} and written["baseline"] != written["steered"]
    sides = [e["side"] for e in found if e.get("text")]
    assert len(sides) > 12  # in pieces, and both as they are written
    assert sides.index("steered") < len(sides) - 1 - sides[::-1].index("baseline")
    assert [e["side"] for e in found if e.get("end")] in (["baseline", "steered"], ["steered", "baseline"])


def test_no_edit_changes_what_is_drawn_for_the_baseline(browser: Browser) -> None:
    def drawn(strength: float, seed: int) -> dict[str, str]:
        asked = {"prompt": "The river", "edits": [{"feature": 3, "strength": strength}], "new_tokens": 12}
        found = events(browser.ask("/api/v1/steer", {**asked, "temperature": 1.0, "seed": seed}, token=True).body)
        return {s: "".join(e.get("text", "") for e in found if e.get("side") == s) for s in ("baseline", "steered")}

    strong, weak, again, other = drawn(2.0, 5), drawn(-2.0, 5), drawn(2.0, 5), drawn(2.0, 6)
    assert strong == again and strong["baseline"] == weak["baseline"] != other["baseline"]
    assert strong["steered"] != weak["steered"]


def test_a_feature_page_steers_only_with_the_model_of_its_dictionary(browser: Browser) -> None:
    page = browser.ask("/features/3", token=True).text
    assert 'id="steer-box"' in page and 'data-feature="3"' in page
    without = browser.ask("/features/3").text  # leads to /steer, which says that it needs the token
    assert 'id="steer-box"' in without and "data-feature" not in without and "steer-texts" not in without
    filled = browser.ask("/steer?features=3&strength=-0.5&prompt=a+river", token=True).text
    assert 'data-feature="3"' in filled and 'value="-0.5"' in filled and ">a river</textarea>" in filled
    assert browser.ask("/steer?features=3&strength=x").status == 400


def test_doses_start_from_nothing(browser: Browser) -> None:
    asked = {"prompt": "The river bank", "edits": [{"feature": 3, "strength": 1.0}]}
    found = {d["factor"]: d for d in browser.ask("/api/v1/doses", asked, token=True).json}
    assert found[0.0]["kl"] == 0 and found[2.0]["kl"] > found[0.5]["kl"] > 0
    assert browser.ask("/steer/doses", asked, token=True).text.count("<circle") == 2 * len(found)


def test_cancelled_writing_frees_the_model(browser: Browser) -> None:
    """A client that hangs up ends its job: the model is free long before the text could be written."""
    import http.client

    # long enough that it is cut off
    asked = {"prompt": "The river bank", "edits": [{"feature": 3}], "new_tokens": 120, "temperature": 1.0, "seed": 5}
    connection = http.client.HTTPConnection("127.0.0.1", browser.port, timeout=60)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", "/api/v1/steer", json.dumps(asked), headers)
    answer = connection.getresponse()
    answer.read(8)
    assert answer.status == 200 and browser.site.models.is_busy
    connection.sock.close() if connection.sock else None
    answer.close()
    connection.close()
    deadline = time.monotonic() + 10
    while browser.site.models.is_busy and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not browser.site.models.is_busy
    again = events(browser.ask("/api/v1/steer", {**asked, "new_tokens": 3}, token=True).body)
    assert again[-1] == {"done": True}


def test_jobs_beyond_the_queue_are_refused(browser: Browser) -> None:
    models = browser.site.models
    release = threading.Event()
    waiting = []

    def hold() -> None:
        with models.turn():
            release.wait(20)

    for _ in range(models.settings.limits.jobs):
        waiting.append(threading.Thread(target=hold))
        waiting[-1].start()
    while models.free_place() is None:
        time.sleep(0.01)
    try:
        for path, body in (
            ("/api/v1/prompt", {"text": "x"}),
            ("/api/v1/steer", {"prompt": "x", "edits": [{"feature": 3}]}),
            ("/api/v1/doses", {"prompt": "x", "edits": [{"feature": 3}]}),
        ):
            answer = browser.ask(path, body, token=True)
            assert answer.status == 429 and answer.headers["retry-after"] == "1", path
        assert browser.ask("/features").status == 200  # reading goes on
    finally:
        release.set()
        for thread in waiting:
            thread.join()


def test_sql_page_table_chart_and_csv(browser: Browser, store: FeatureStore) -> None:
    query = "SELECT kind, count(*) AS n FROM features GROUP BY kind ORDER BY kind"
    wanted = store.sql(query).to_pylist()
    page = browser.ask("/sql", q=query, token=True).text
    assert_inert(page)
    assert page.count("<td class=n>") == len(wanted) and "features.n_active" not in page
    rows = list(csv.DictReader(io.StringIO(browser.ask("/sql.csv", q=query, token=True).text)))
    assert [{"kind": r["kind"], "n": int(r["n"])} for r in rows] == wanted
    dots = browser.ask("/sql", q="SELECT density, feature FROM features", token=True).text
    assert dots.count("<circle") == store.trusted_sql("SELECT feature FROM features").num_rows
    refused = browser.ask("/sql", q="DROP TABLE x", token=True)
    assert refused.status == 200 and 'role="alert"' in refused.text
    api = browser.ask("/api/v1/sql", {"query": "SELECT * FROM range(5)", "max_rows": 2}, token=True).json
    assert api == {"columns": ["range"], "rows": [[0], [1]], "truncated": True}
    assert browser.ask("/api/v1/sql", {"query": "SELECT 'nan'::FLOAT AS a"}, token=True).json["rows"] == [[None]]
    refused = browser.ask("/api/v1/sql", {"query": "SELECT * FROM read_text('/etc/passwd')"}, token=True)
    assert refused.status == 400 and "root:" not in refused.text


# --- limits ----------------------------------------------------------------------------------------------------------


def edits(num: int, **more: object) -> dict:
    return {"prompt": "x", "edits": [{"feature": n, **more} for n in range(num)]}


TOO_MUCH: dict[str, tuple[str, object]] = {
    "body": ("/api/v1/prompt", b'{"text": "' + b"a" * 70_000 + b'"}'),
    "prompt characters": ("/api/v1/prompt", {"text": "a" * 5000}),
    "prompt tokens": ("/api/v1/prompt", {"text": "the river bank " * 60}),
    "steered features": ("/api/v1/steer", edits(9)),
    "strength": ("/api/v1/steer", edits(1, strength=4.5)),
    "negative strength": ("/api/v1/doses", edits(1, strength=-1e30)),
    "goal": ("/api/v1/steer", edits(1, mode="clamp", to=1e6)),
    "share": ("/api/v1/doses", edits(1, mode="scale", strength=3.0)),
    "tokens to write": ("/api/v1/steer", {**edits(1), "new_tokens": 121}),
    "sql rows": ("/api/v1/sql", {"query": "SELECT 1", "max_rows": 5000}),
    "sql characters": ("/api/v1/sql", {"query": "SELECT 1 --" + "a" * 17_000}),
    "page": ("/features?page=99999999", None),
    "rows of a page": ("/api/v1/features?rows=201", None),
    "search": ("/features?q=" + "a" * 4001, None),
    "address": ("/features?q=" + "a" * 20_000, None),
    "text of a page": ("/prompt?text=" + "a" * 5000, None),
    "features in an address": ("/steer?features=1,2,3,4,5,6,7,8,9", None),
    "query of a page": ("/sql?q=" + "a" * 16_100, None),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_too_much_is_413(browser: Browser, what: str) -> None:
    path, body = TOO_MUCH[what]
    answer = browser.ask(path, body, token=True)
    assert answer.status == 413, answer.text
    if path.startswith("/api"):
        assert set(answer.json) == {"error"} and "\n" not in answer.json["error"]


def test_a_body_that_does_not_say_its_size_is_counted(browser: Browser) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", browser.port), timeout=20) as connection:
        connection.sendall(
            b"POST /api/v1/prompt HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + TOKEN.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"4000\r\n" + b"a" * 0x4000 + b"\r\n"
        try:
            for _ in range(6):
                connection.sendall(chunk)
        except OSError:
            pass  # it hung up before all was sent
        assert connection.recv(4096).split(b" ")[1] == b"413"


def test_requests_beyond_the_limit_are_refused(run_copy: Path) -> None:
    with served(run_copy / "features.duckdb", requests=0) as found:
        answer = found.ask("/features")
        assert answer.status == 429 and answer.headers["retry-after"] == "1"


# --- the store and the process ---------------------------------------------------------------------------------------


def test_a_published_store_is_opened_anew(run_copy: Path, tmp_path: Path) -> None:
    path = tmp_path / "features.duckdb"
    shutil.copy(run_copy / "features.duckdb", path)
    with served(path) as found:
        assert found.ask("/features/7").status == 200
        old = found.site.open._identity
        shutil.copy(run_copy / "features.duckdb", tmp_path / "new")
        (tmp_path / "new").replace(path)
        assert found.ask("/features/7").status == 200 and found.site.open._identity != old
        (tmp_path / "broken").write_bytes(b"not a store" * 1000)
        (tmp_path / "broken").replace(path)
        answer = found.ask("/api/v1/features/7")
        assert answer.status == 503 and str(tmp_path) not in answer.text
        shutil.copy(run_copy / "features.duckdb", tmp_path / "new")
        (tmp_path / "new").replace(path)
        assert found.ask("/features/7").status == 200
        path.unlink()  # an unlinked file can still be read
        assert found.ask("/features/7").status == 200


def test_reading_needs_no_torch(run_copy: Path) -> None:
    code = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from browser_server import served\n"
        "run = Path(sys.argv[1])\n"
        "with served(run / 'features.duckdb', run) as browser:\n"
        "    for path in ('/', '/features?q=river', '/features/7', '/compare', '/sql', '/steer'):\n"
        "        assert browser.ask(path).status == 200, path\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(run_copy), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_store_alone_is_served_without_models(run_copy: Path) -> None:
    with served(run_copy / "features.duckdb") as found:
        assert "/prompt" not in found.ask("/").text
        assert "store alone" in found.ask("/prompt").text
        assert found.ask("/api/v1/prompt", {"text": "x"}, token=True).status == 404


def serving_fails(**changed: object) -> str:
    options = {"port": 0, "host": "127.0.0.1", "hosts": (), "token": None, "open_browser": False, **changed}
    path = options.pop("path")
    with pytest.raises(ServeError) as caught:
        serve_store(path, **options)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def test_what_serving_lacks_is_one_line(
    run_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    browser: Browser,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert f"{browser.port}" in serving_fails(path=run_copy, port=browser.port)
    assert "--token" in serving_fails(path=run_copy, token="short")
    with pytest.raises(SystemExit) as caught:
        main(["serve", str(tmp_path), "--port", "0"])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'saeql[serve]'" in serving_fails(path=run_copy)


def test_notebooks_show_the_card(store: FeatureStore) -> None:
    feature = store.feature(7)
    html = feature._repr_html_()
    assert html is not None and html.startswith('<iframe sandbox="" srcdoc="')
    inside = dict(Page(html).elements[0][1])["srcdoc"] or ""
    shown = Page(inside)
    assert "script" not in [tag for tag, _ in shown.elements] and "Strongest examples" in shown.text
    assert feature["label"] in shown.text and json.loads(json.dumps(feature))["feature"] == 7
