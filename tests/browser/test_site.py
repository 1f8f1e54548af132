"""A site of files in Chromium, in a folder of a plain web server and straight from the disk."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tabs import looked_at, watched
from two_dictionaries import OTHER, two_dictionaries

from saeql.pipelines.browser.feature_page import NUM_HELD_OUT
from saeql.pipelines.site.export import export_site
from saeql.store.feature_store import FeatureStore
from saeql.store.listing import Filters

pytestmark = pytest.mark.browser

PAGES = ("features.html?q=river&sort=density", "index.html", "features.html", "feature.html?id=7", "index.1.html",
         "compare.0.1.html", "feature.html?id=999", "features.html?q=xyzzy&by=token")  # fmt: skip


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def store(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    path = two_dictionaries(tiny_run / "evidence", tmp_path_factory.mktemp("two"))
    export_site(path, tmp_path_factory.getbasetemp() / "hosted" / "user" / "project", features_per_file=10)
    with FeatureStore.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "hosted" / "user" / "project"


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """Where the site is, two folders below the server's root."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder.parents[1]))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/user/project/"
        server.shutdown()


@pytest.fixture
def page(chromium: Any, url: str) -> Iterator[Any]:
    """A fresh tab; an error in its console or a request to anywhere else fails the test."""
    with watched(chromium, url) as tab:
        yield tab


def drawn(page: Any) -> None:
    page.locator("[aria-busy=true]").wait_for(state="detached")


def listed(page: Any) -> list[int]:
    drawn(page)
    return [int(text) for text in page.locator("#results tbody tr td:first-child a").all_inner_texts()]


QUESTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "page=2": {"offset": 50},
    "rows=20&page=3": {"offset": 40, "limit": 20},
    "sort=density": {"sort": "density"},
    "sort=auroc&order=asc": {"sort": "auroc", "descending": False},
    "sort=max_activation&kind=lexical": {"sort": "max_activation", "filters": Filters(kind="lexical")},
    "sort=label": {"sort": "label", "descending": False},
    "sort=label&order=desc": {"sort": "label"},
    "sort=feature&order=desc": {"sort": "feature"},
    "min_density=0.02&max_density=0.1": {"filters": Filters(min_density=0.02, max_density=0.1)},
    "min_auroc=0.9": {"filters": Filters(min_auroc=0.9)},
    "q=river": {"q": "river"},
    "q=walking+river": {"q": "walking river"},
    "q=river&sort=density&min_density=0.01": {"q": "river", "sort": "density", "filters": Filters(min_density=0.01)},
    "q=+river&by=token": {"q": " river", "by": "token"},
    "q=river&by=token": {"q": "river", "by": "token"},
    "q=+river&by=effect": {"q": " river", "by": "effect"},
}


@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.full)])
def test_lists_are_those_of_the_store(page: Any, url: str, store: FeatureStore, place: int) -> None:
    name = store.dictionaries()[place]["dictionary"]
    for query, asked in QUESTIONS.items():
        asked = {"limit": 50, **asked}
        text, by = asked.pop("q", None), asked.pop("by", "words")
        found = None if text is None else store.found(text, by=by, dictionary=name)
        wanted = store.listing(asked.pop("filters", None), found=found, dictionary=name, **asked)
        page.goto(f"{url}features{'.1' if place else ''}.html" + (f"?{query}" if query else ""))
        assert listed(page) == [hit.feature for hit in wanted.hits], query
        assert page.locator(".count b").inner_text() == str(wanted.total)
        if text is not None:
            why = page.locator("#results .why").all_inner_texts()
            said = [
                sorted(" ".join(f"{k} {', '.join(v[:4])}".split()) for k, v in h.matched.items()) for h in wanted.hits
            ]
            assert [sorted(" ".join(w.split()).split("; ")) for w in why] == said, query  # equal scores have no order


def test_examples_of_test_are_a_state_of_the_address(page: Any, url: str, store: FeatureStore) -> None:
    feature = next(f for f in range(96) if store.examples(f, split="test"))
    name = store.dictionaries()[0]["dictionary"]
    page.goto(f"{url}feature.html?id={feature}")
    drawn(page)
    assert page.locator(".of-train .example").count() and not page.locator(".of-test").is_visible()
    page.locator(".to-test").click()
    page.wait_for_url("**split=test")
    page.locator("article.tested").wait_for()
    assert not page.locator(".of-train").is_visible() and page.locator(".of-test").is_visible()
    held_out = store.examples(feature, dictionary=name, split="test", limit=NUM_HELD_OUT)
    assert page.locator(".of-test .example").count() == len(held_out)
    assert page.locator(".to-test").get_attribute("aria-current") == "true"


def test_search_as_you_type_begins_words(page: Any, url: str, store: FeatureStore) -> None:
    page.goto(f"{url}features.html")
    page.keyboard.press("/")
    page.keyboard.type("rive", delay=30)
    page.wait_for_url("**/features.html?q=rive")
    page.locator("#results .why").first.wait_for()
    found = listed(page)
    page.keyboard.type("r")
    page.wait_for_url("**/features.html?q=river")
    page.locator("#results .why").first.wait_for()
    assert listed(page) == found == [h.feature for h in store.search("river", limit=50)]
    page.reload()
    assert listed(page) == found and page.locator("#f-q").input_value() == "river"
    page.goto(f"{url}features.html?q=rivered")  # what is left without its ending
    assert listed(page) == found
    page.goto(f"{url}features.html?q=%E2%80%AE")
    assert "[U+202E]" in page.locator(".notice").inner_text()


def test_from_the_list_to_features_and_back(page: Any, url: str) -> None:
    page.goto(f"{url}features.html?rows=20")
    drawn(page)
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    page.wait_for_url("**/feature.html?id=1")
    page.locator("article h1").wait_for()
    for n in range(2, 12):  # into the next file
        page.keyboard.press("j")
        page.wait_for_url(f"**/feature.html?id={n}")
        assert page.locator("article h1").inner_text().startswith(f"{n} ")
    page.keyboard.press("k")
    page.wait_for_url("**/feature.html?id=10")
    page.locator("#near-title ~ table a").first.click()
    page.locator("article h1").wait_for()
    page.keyboard.press("g")
    page.keyboard.press("f")
    page.wait_for_url("**/features.html")
    page.keyboard.press("n")
    page.locator(".paging", has_text="2 of").wait_for()
    assert listed(page)[0] == 50
    page.go_back()
    page.locator(".paging", has_text="1 of").wait_for()
    assert listed(page)[0] == 0


def test_a_feature_is_drawn_with_shades_and_hostile_texts_as_text(page: Any, url: str, store: FeatureStore) -> None:
    hostile = 0
    for number in (0, 1, 2, 7, 95):
        page.goto(f"{url}feature.html?id={number}")
        drawn(page)
        row = store.feature(number)
        said = page.locator("article h1").inner_text()
        assert said.startswith(f"{number} ") and ("\u202e" not in said) and page.title().startswith(f"{number} ")
        hostile += "<" in row["label"] and row["label"] in said
        assert page.locator("rect.bar").count() > 0 or not row["density"]
    assert hostile and page.locator("article img, article script").count() == 0
    mark = page.locator("mark.peak").first
    assert mark.get_attribute("title") in mark.text_content()
    page.goto(f"{url}feature.html?id=999")
    drawn(page)
    assert "no feature '999'" in page.locator(".notice").inner_text()


def test_theme_is_kept_and_code_is_copied(page: Any, url: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"{url}feature.html?id=7")
    drawn(page)
    page.locator("[data-copy=snippet-2]").click()
    page.locator("[data-copy=snippet-2]", has_text="Copied").wait_for()
    assert "store.feature(7" in page.evaluate("navigator.clipboard.readText()")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.keyboard.press("t")
    dark = page.evaluate(colour)
    page.goto(f"{url}index.html")
    assert light != dark == page.evaluate(colour)


def test_dictionaries_are_compared_and_changed(page: Any, url: str) -> None:
    page.goto(url)
    page.locator(".switch a", has_text=OTHER).click()
    page.wait_for_url("**/index.1.html")
    assert page.locator("h1").inner_text() == OTHER
    page.locator("nav a", has_text="Features").click()
    page.wait_for_url("**/features.1.html")
    page.locator("tbody tr a").first.click()
    page.wait_for_url("**/feature.1.html?id=0")
    page.keyboard.press("g")
    page.keyboard.press("c")
    page.wait_for_url("**/compare.0.1.html")
    assert "Shared features" in page.locator("main").inner_text()
    page.locator("td a", has_text="95").first.click()
    page.wait_for_url("**/feature*.html?id=95")


@pytest.mark.parametrize(
    ("name", "theme", "width"),
    [
        pytest.param(name, theme, width, marks=() if (n + (width > 360)) % 3 == 0 else pytest.mark.full)
        for n, name in enumerate(PAGES)
        for theme, width in (("light", 1280), ("dark", 360))
    ],
)
def test_axe_finds_nothing_serious(chromium: Any, url: str, name: str, theme: str, width: int) -> None:
    with looked_at(chromium, theme, width) as tab:
        tab.goto(url + name)
        drawn(tab)


def test_it_is_read_from_the_disk(chromium: Any, folder: Path) -> None:
    with watched(chromium, folder.as_uri()) as page:
        page.goto(f"{folder.as_uri()}/index.html")
        page.locator("nav a", has_text="Features").click()
        page.locator("#f-q").fill("river")
        page.locator("#results .why").first.wait_for()
        page.locator("tbody tr a").first.click()
        page.locator("article h1").wait_for()


def test_nothing_is_asked_of_anybody(chromium: Any, url: str) -> None:
    """Were there a script that tried, the page's own policy would stop it."""
    context = chromium.new_context()
    try:
        tab = context.new_page()
        tab.goto(f"{url}index.html")
        asked = f"fetch('{url}index.html').then(() => 'answered', () => 'stopped')"
        assert tab.evaluate(asked) == "stopped"
        assert tab.evaluate("new Promise(r => { const i = new Image(); i.onload = i.onerror = e => r(e.type); "
                            "i.src = 'http://elsewhere.test/x.png' })") == "error"  # fmt: skip
        tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.pwn=1\">x</b>')")
        tab.locator("b", has_text="x").last.click()
        assert tab.evaluate("window.pwn") is None
    finally:
        context.close()


def test_a_missing_file_is_said(chromium: Any, url: str, folder: Path) -> None:
    lost = folder / "data" / "0" / "f2.js"
    content = lost.read_bytes()
    context = chromium.new_context()
    try:
        lost.unlink()
        tab = context.new_page()
        tab.goto(f"{url}feature.html?id=25")
        drawn(tab)
        assert "data/0/f2.js cannot be loaded" in tab.locator(".notice").inner_text()
    finally:
        lost.write_bytes(content)
        context.close()
