"""`saeql export --format site`: files that say what the store says, safe to share, whole or not at all."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from browser_server import Page
from test_browser_hostile import HIDDEN, TEXTS
from two_dictionaries import OTHER, two_dictionaries

from saeql.pipelines.browser.feature_page import NUM_HELD_OUT, feature_page
from saeql.pipelines.cli import main
from saeql.pipelines.shown import share, visible
from saeql.pipelines.site.export import export_site
from saeql.pipelines.site.files import SiteError, steps
from saeql.store.errors import FeatureNotFound, SQLError
from saeql.store.evidence import Evidence
from saeql.store.feature_store import FeatureStore
from saeql.store.token_features import MAX_FEATURES

TYPES = {"u1": "<u1", "u2": "<u2", "u4": "<u4", "i4": "<i4", "f4": "<f4", "f8": "<f8"}


@pytest.fixture(scope="module")
def store_path(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_dictionaries(tiny_run / "evidence", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def site(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites") / "site"
    export_site(store_path, folder, features_per_file=10)
    return folder


def read(site: Path, name: str) -> dict:
    """What a data file hands over."""
    path = site / "data" / f"{name}.js"
    said = re.fullmatch(r'saeqlData\("([\w/]+)","([A-Za-z0-9+/=]+)"\)\n', path.read_text())
    assert said is not None and said[1] == name
    line, _, rest = zlib.decompress(base64.b64decode(said[2])).partition(b"\n")
    found, at = json.loads(line), 0
    for column, kind, length in found["columns"]:
        found[column] = np.frombuffer(rest, TYPES[kind], length, at)
        at += found[column].nbytes
    assert at == len(rest)
    return found


def features_of(site: Path, place: int) -> list[str]:
    files = sorted((site / "data" / str(place)).glob("f*.js"), key=lambda f: int(f.stem[1:]))
    return ["".join(parts) for f in files for parts in zip(*read(site, f"{place}/{f.stem}")["parts"], strict=True)]


def files_of(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def assert_still(html: str, whole: bool = True) -> Page:
    """Nothing runs but scripts of the folder, nothing is fetched from elsewhere, and links are relative."""
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "style")
        if tag == "script":
            assert whole and re.match(r"static/[a-z]+\.js\?v=[0-9a-f]{12}$", attributes["src"] or "")
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, name)
            if name in ("href", "src", "action"):
                assert re.match(
                    r"(static/[\w.]+\?v=|(index|features|feature|compare)[\d.]*\.html|#|\?)", value or ""
                ), value
    return page


def test_pages_stand_alone(site: Path) -> None:
    names = {p.name for p in site.glob("*.html")}
    pages = ("index", "features", "feature")
    assert names == {f"{p}{n}.html" for p in pages for n in ("", ".1")} | {"compare.0.1.html", "compare.1.0.html"}
    for name in names:
        page = assert_still((site / name).read_text())
        policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
        assert policy and "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy
        for _, attributes in page.elements:
            for leads in (attributes.get("href"), attributes.get("src")):
                if leads and not leads.startswith(("#", "?")):
                    assert (site / leads.partition("?")[0]).is_file(), leads
        assert "saeql serve" in page.text and "Steer " not in page.text
    assert (site / ".nojekyll").exists()


def test_features_are_those_of_the_server(site: Path, store_path: Path) -> None:
    with FeatureStore.open(store_path) as store:
        num_marks = num_held_out = 0
        for place, row in enumerate(store.dictionaries()):
            drawn = features_of(site, place)
            assert len(drawn) == row["d_sae"]
            for feature in (0, 7, 55, 95):
                page = assert_still(drawn[feature], whole=False)
                wanted = feature_page(store, feature, dictionary=row["dictionary"])
                label = visible(wanted.row["label"])
                assert page.text.startswith(f"{feature} {' '.join(label.split())}")
                marks = [a for t, a in page.elements if t == "mark"]
                held_out = feature_page(store, feature, dictionary=row["dictionary"], split="test").top[:NUM_HELD_OUT]
                samples = [e for _, group in wanted.deciles for e in group]
                pieces = [p for e in [*wanted.top, *held_out, *samples] for p in e.pieces]
                num_held_out += len(held_out)
                num_marks += len(marks)
                assert [(a["class"] or "").split()[0] for a in marks] == [f"l{p.level}" for p in pieces if p.level]
                for near in wanted.neighbours:
                    suffix = f".{place}" if place else ""
                    assert f'href="feature{suffix}.html?id={near["neighbour"]}"' in drawn[feature]
                for control in wanted.card:
                    assert visible(control.title) in page.text
        assert num_marks > 100 and num_held_out > 10


def test_lists_are_those_of_the_store(site: Path, store_path: Path) -> None:
    with FeatureStore.open(store_path) as store:
        cards = store.cards(OTHER)
        found = read(site, "1/c0")
        assert found["label"] == [visible(label) for label in cards.column("label").to_pylist()]
        assert [found["kinds"][k] for k in found["kind"]] == cards.column("kind").to_pylist()
        for name in ("density", "auroc", "max_activation"):
            np.testing.assert_array_equal(found[name], cards.numbers(name))
        assert found["density_text"] == [share(x) for x in cards.numbers("density").tolist()]
        for way, descending in (("ascending", False), ("descending", True)):
            place = read(site, "1/labels")[way]
            assert cards.features[np.argsort(place)].tolist() == [
                h.feature for h in store.listing(sort="label", descending=descending, limit=1000, dictionary=OTHER).hits
            ]


def test_words_find_what_the_store_finds(site: Path, store_path: Path) -> None:
    index = read(site, "0/words")
    words, terms = index["words"].split("\n"), np.cumsum(index["term"])
    assert words == sorted(words) and len(words) == len(terms) > 20
    with FeatureStore.open(store_path) as store:
        for word in ("river", "walking", "12"):
            term = int(terms[words.index(word)])
            number = int(np.searchsorted(index["shards"], term, side="right")) - 1
            shard = read(site, f"0/p{number}")
            local = term - index["shards"][number]
            entries = slice(int(shard["ends"][local - 1]) if local else 0, int(shard["ends"][local]))
            scores: dict[int, float] = {}
            for feature, score in zip(np.cumsum(shard["position"])[entries], shard["score"][entries], strict=True):
                scores[int(feature)] = scores.get(int(feature), 0.0) + float(np.float32(score / 1000))
            hits = store.search(word, limit=1000)
            assert sorted(scores, key=lambda f: (-scores[f], f)) == [h.feature for h in hits]
            assert len(hits) == index["features"][term] > 0


@pytest.mark.parametrize("by", ["token", "effect"])
def test_tokens_find_what_the_store_finds(site: Path, store_path: Path, by: str) -> None:
    index = read(site, "0/tokens")
    ends, entries = {"token": ("fires_ends", "fires"), "effect": ("promotes_ends", "promotes")}[by]
    num_found = 0
    with FeatureStore.open(store_path) as store:
        for token in (" river", ".", "water", visible("\u202eriver")):
            if token not in index["tokens"]:
                continue
            place = index["tokens"].index(token)
            number = int(np.searchsorted(index["shards"], place, side="right")) - 1
            shard, local = read(site, f"0/s{number}"), place - index["shards"][number]
            found = slice(int(shard[ends][local - 1]) if local else 0, int(shard[ends][local]))
            hits = store.search(token, by=by, limit=MAX_FEATURES)
            assert shard[entries][found].tolist() == [h.feature for h in hits]
            num_found += len(hits)
            if by == "effect":
                why = [f"rank {n}" for n in shard["rank"][found].tolist()]
                assert why == [h.matched[f"promotes [{token}]"][0] for h in hits]
                continue
            for n, hit in enumerate(hits, found.start):
                said = [
                    f"{shard['count'][n]} times",
                    f"{shard['of_token'][n]}% of the token's",
                    f"{shard['of_feature'][n]}% of its own",
                ]
                assert hit.matched[f"fires on [{token}]"] == said
    assert num_found > 5


def test_the_same_store_gives_the_same_bytes_and_replaces_its_own_site(
    site: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(site, tmp_path / "again"))
    (out / "data" / "0" / "f0.js").write_text("of an older store")
    written = export_site(store_path, out, features_per_file=10, workers=2)
    assert files_of(out) == files_of(site)
    assert written.num_files == len(files_of(out)) and written.num_features == 192
    assert written.num_bytes == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert [p.name for p in tmp_path.iterdir()] == ["again"]
    monkeypatch.chdir(out)
    export_site(store_path, Path(), features_per_file=10)
    assert files_of(out) == files_of(site) and [p.name for p in tmp_path.iterdir()] == ["again"]


def test_part_of_a_store(store_path: Path, tmp_path: Path) -> None:
    export_site(store_path, tmp_path / "part", dictionary=[OTHER], only="feature % 7 = 3 AND feature < 60")
    drawn = features_of(tmp_path / "part", 0)
    numbers = np.cumsum(read(tmp_path / "part", "0/numbers")["steps"]).tolist()
    assert numbers == [f for f in range(60) if f % 7 == 3] and len(drawn) == len(numbers)
    assert [int(Page(html).text.split()[0]) for html in drawn] == numbers
    assert not list((tmp_path / "part").glob("compare*"))
    index, shard = read(tmp_path / "part", "0/words"), read(tmp_path / "part", "0/p0")
    assert np.cumsum(shard["position"]).max() < len(numbers) and index["features"].max() <= len(numbers)
    assert "9 of the 96 features" in (tmp_path / "part" / "features.html").read_text()
    export_site(store_path, tmp_path / "best", top=5, dictionary=[OTHER])
    with FeatureStore.open(store_path) as store:
        best = store.matching("true", limit=5, dictionary=OTHER)
    assert np.cumsum(read(tmp_path / "best", "0/numbers")["steps"]).tolist() == sorted(best)


def test_a_folder_in_use_is_left_alone(store_path: Path, site: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(SiteError, match=r"letter\.txt"):
        export_site(store_path, mine)
    published = Path(shutil.copytree(site, tmp_path / "published"))
    (published / "CNAME").write_text("example.org")
    with pytest.raises(SiteError, match="CNAME"):
        export_site(store_path, published)
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match="no folder"):
        export_site(store_path, tmp_path / "file")
    assert (mine / "letter.txt").read_text() == "dear"


def test_what_fails_leaves_nothing_and_is_one_line(store_path: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    with pytest.raises(SQLError):
        export_site(store_path, out, only="density >")
    with pytest.raises(SiteError, match="--only"):
        export_site(store_path, out, only="feature < 0")
    with pytest.raises(SiteError, match="--top"):
        export_site(store_path, out, top=0)
    with pytest.raises(FeatureNotFound, match="nothing"):
        export_site(store_path, out, dictionary=["nothing"])
    asked = ["export", str(store_path), str(out), "--format"]
    for more in (["site", "--only", "density >"], ["site", "--creator", "x"], ["parquet", "--top", "5"]):
        with pytest.raises(SystemExit) as ended:
            main([*asked, *more])
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(said) == 1 and said[0].startswith("saeql: "), said
    assert list(tmp_path.iterdir()) == []


def test_hostile_texts_stay_texts_and_no_path_leaves_the_machine(tiny_run: Path, tmp_path: Path, capsys) -> None:
    run = Path(
        shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("features.duckdb*", "checkpoints"))
    )
    import pyarrow as pa

    evidence = Evidence(run / "evidence")
    for table, column in (("vocabulary", "token"), ("documents", "title"), ("labels", "label"), ("labels", "kind")):
        rows = evidence.read(table)
        texts = [TEXTS[n % len(TEXTS)] for n in range(rows.num_rows)]
        evidence.write(table, rows.set_column(rows.column_names.index(column), column, pa.array(texts)))
    FeatureStore.build(run / "features.duckdb", [evidence])
    main(["export", str(run), str(tmp_path / "site"), "--format", "site"])
    assert "96 features" in capsys.readouterr().out
    drawn = [*features_of(tmp_path / "site", 0), *(p.read_text() for p in (tmp_path / "site").glob("*.html"))]
    for html in drawn:
        page = assert_still(html, whole="<html" in html)
        assert not set(page.text) & set(HIDDEN) and "1337" not in page.text
    for label in read(tmp_path / "site", "0/c0")["label"]:
        assert not set(label) & set(HIDDEN)
    everything = "".join([*drawn, *(p.read_text() for p in (tmp_path / "site").rglob("*.j*"))])
    assert str(tmp_path) not in everything and str(tiny_run.parent) not in everything


def test_steps_come_back() -> None:
    values = np.array([5, 7, 7, 3, 2**31 - 1, 0])
    np.testing.assert_array_equal(np.cumsum(steps(values), dtype=np.int64).astype(np.int32), values)


def test_exporting_a_site_needs_no_torch(store_path: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from saeql.pipelines.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    asked = ["export", str(store_path), str(tmp_path / "site"), "--format", "site", "--top", "3"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "6 features" in done.stdout, done.stderr
