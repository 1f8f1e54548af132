"""Every page in Chromium: it works by mouse and by keyboard, in both themes, from 360 px on, for everybody."""

import re
from pathlib import Path
from typing import Any

import pytest
from browser_server import TOKEN, Browser
from tabs import looked_at

pytestmark = pytest.mark.browser

PAGES = {
    "overview": "/",
    "features": "/features?sort=density",
    "search": "/features?q=river",
    "feature": "/features/7",
    "prompt": "/prompt?text=the+river+bank+and+the+blue+house",
    "steer": "/steer?features=3:0.4,7:-0.2",
    "compare": "/compare",
    "sql": "/sql?q=SELECT+kind,+count(*)+AS+n+FROM+features+GROUP+BY+kind",
    "problem": "/features/99999",
}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(
    ("theme", "width"),
    [
        ("light", 1280),
        ("dark", 360),
        pytest.param("dark", 1280, marks=pytest.mark.full),
        pytest.param("light", 360, marks=pytest.mark.full),
    ],
)
def test_axe_finds_nothing_serious(chromium: Any, browser: Browser, name: str, theme: str, width: int) -> None:
    with looked_at(chromium, theme, width) as tab:
        tab.goto(f"{browser.url}/?token={TOKEN}")
        tab.goto(browser.url + PAGES[name])


def test_search_as_you_type(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/features")
    before = page.locator("#results").inner_text()
    page.keyboard.press("/")
    page.keyboard.type("river", delay=30)
    page.wait_for_url("**/features?q=river")
    page.locator("#results .why").first.wait_for()
    assert page.locator("#results").inner_text() != before
    found = page.locator("#results tbody tr").count()
    page.reload()  # the address is the whole state
    assert page.locator("#results tbody tr").count() == found and page.locator("#f-q").input_value() == "river"


def test_rows_by_keyboard(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/features?rows=20")
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    chosen = page.locator("tr.chosen a").inner_text()
    assert chosen == page.locator("tbody tr a").nth(1).inner_text()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/features/{chosen}")
    page.keyboard.press("j")  # here the next feature
    page.wait_for_url(f"**/features/{int(chosen) + 1}")
    page.keyboard.press("g")
    page.keyboard.press("f")
    page.wait_for_url("**/features")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


def test_paging_and_back(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/features?rows=20")
    first = page.locator("tbody tr a").first.inner_text()
    page.keyboard.press("n")
    page.wait_for_url("**page=2**")
    page.locator(".paging", has_text="2 of").wait_for()
    assert page.locator("tbody tr a").first.inner_text() != first
    page.go_back()
    page.locator(".paging", has_text="1 of").wait_for()
    assert page.locator("tbody tr a").first.inner_text() == first


def test_theme_is_kept(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/features/7")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.locator("#theme").click()
    dark = page.evaluate(colour)
    page.goto(f"{browser.url}/features")
    assert light != dark == page.evaluate(colour)


def test_tokens_say_their_value(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/features/7")
    mark = page.locator("mark.peak").first
    assert re.fullmatch(r"[\d.,]+", mark.get_attribute("title"))
    assert mark.get_attribute("title") in mark.text_content()  # for who does not see the shade
    assert page.locator("article h1").inner_text().startswith("7 ")


def test_snippets_are_copied(page: Any, browser: Browser) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"{browser.url}/features/7")
    page.locator("[data-copy=snippet-2]").click()
    page.locator("[data-copy=snippet-2]", has_text="Copied").wait_for()
    assert "store.feature(7" in page.evaluate("navigator.clipboard.readText()")


def test_prompt_shows_what_fires(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/prompt")
    page.locator("#text").fill("the river bank")
    page.keyboard.press("Control+Enter")
    page.wait_for_url("**/prompt?text=the+river+bank")
    assert page.locator(".pick a").count() == 3 and page.locator(".hit mark").count() > 0
    page.locator(".pick a").nth(1).click()
    assert page.locator(".by-token").is_visible()


def test_steering_streams_plots_and_stops(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/steer?features=3:1.5&prompt=the+river&tokens=20")
    page.locator("#go").click()
    page.locator("#state", has_text="done").wait_for()
    page.locator("#doses svg").wait_for()
    baseline, steered = (page.locator(f"#{side}").inner_text() for side in ("baseline", "steered"))
    assert baseline and steered and baseline != steered
    page.locator("#s3").fill("-1")
    page.locator("#s3").dispatch_event("change")
    assert "features=3%3A-1" in page.url and page.locator(".edit output").inner_text() == "-1"
    page.locator("#add").fill("5")
    page.locator("#add-button").click()
    page.wait_for_url("**features=3%3A-1%2C5%3A0.4**")
    assert page.locator(".edit").count() == 2
    page.locator("#tokens").fill("200")
    page.locator("#temperature").fill("1")
    page.locator("#go").click()
    page.locator("#stop").click()
    page.locator("#state", has_text="stopped").wait_for()
    for _ in range(100):
        if not browser.site.models.is_busy:
            break
        page.wait_for_timeout(50)
    assert not browser.site.models.is_busy


def test_features_to_steer_are_found_by_words(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/steer?features=3:1.5&prompt=the+river")
    page.locator("#add").press_sequentially("river", delay=20)
    page.locator("#add-found option").first.wait_for(state="attached")
    first = page.locator("#add-found option").first.get_attribute("value")
    page.locator("#add").press("Enter")
    page.wait_for_url(f"**features=3%3A1.5%2C{first}%3A0.4**")
    assert page.locator(".edit").count() == 2
    page.locator("#add").fill("nosuchwordatall")
    page.locator("#add-button").click()
    page.locator("#state", has_text="no feature is found").wait_for()


def test_a_text_is_tried_from_the_page_of_a_feature(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/features/7")
    page.locator(".jumps a", has_text="Try a text").click()
    assert page.url.endswith("#try-title")
    page.locator("#try-text").fill("the river bank")
    page.locator("#try-text").press("Enter")
    page.wait_for_url("**/prompt?feature=7&text=the+river+bank")
    assert "Feature 7" in page.locator("#own-title").inner_text() and page.locator(".pick a").count() == 3


def test_a_feature_is_steered_on_its_own_page(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/features/3")
    both = page.locator("#box-baseline"), page.locator("#box-steered")
    assert not page.locator("#steer-texts").is_visible()
    page.locator("#steer-prompt").fill("the river")
    page.locator("#steer-strength").fill("1.5")
    assert page.locator("#steer-box output").inner_text() == "1.5"
    assert "features=3%3A1.5" in page.locator("#steer-more").get_attribute("href")
    page.evaluate(
        """() => {
            window.order = [];
            for (const side of ["baseline", "steered"])
                new MutationObserver(() => window.order.push(side)).observe(
                    document.getElementById("box-" + side), {childList: true, characterData: true, subtree: true});
        }"""
    )
    page.locator("#steer-go").click()
    page.locator("#steer-state", has_text="done").wait_for()
    baseline, steered = (side.inner_text() for side in both)
    assert baseline and steered and baseline != steered
    order = page.evaluate("window.order")
    assert order.index("steered") < len(order) - 1 - order[::-1].index("baseline")  # neither waits for the other
    assert "/features/3" in page.url
    page.evaluate("for (const button of ['steer-go', 'steer-stop']) document.getElementById(button).click()")
    page.locator("#steer-state", has_text="stopped").wait_for()
    for _ in range(100):
        if not browser.site.models.is_busy:
            break
        page.wait_for_timeout(50)
    assert not browser.site.models.is_busy and page.locator("#steer-stop").is_disabled()


def test_without_a_script_the_box_leads_to_steering(chromium: Any, browser: Browser) -> None:
    context = chromium.new_context(java_script_enabled=False)
    try:
        tab = context.new_page()
        tab.goto(f"{browser.url}/?token={TOKEN}")
        tab.goto(f"{browser.url}/features/3")
        tab.locator("#steer-prompt").fill("a house")
        tab.locator("#steer-go").click()
        assert "/steer?" in tab.url and tab.locator("#prompt").input_value() == "a house"
        assert tab.locator(".edit a").inner_text() == "3" and tab.locator(".edit output").inner_text() == "0.4"
    finally:
        context.close()


def test_sql_runs_and_is_downloaded(page: Any, browser: Browser) -> None:
    page.goto(f"{browser.url}/sql")
    page.locator("#query").fill("SELECT kind, count(*) AS n FROM features GROUP BY kind")
    page.keyboard.press("Control+Enter")
    page.locator(".result").wait_for()
    with page.expect_download() as download:
        page.locator("a", has_text="CSV").click()
    assert Path(download.value.path()).read_text().startswith("kind,n\n")
    page.locator("details", has_text="features").first.locator("summary").click()
    page.goto(f"{browser.url}/sql?q=SELEC")
    assert "syntax error" in page.locator("[role=alert]").inner_text().lower()


def test_without_the_token_pages_say_so(chromium: Any, browser: Browser) -> None:
    context = chromium.new_context()
    try:
        tab = context.new_page()
        tab.goto(f"{browser.url}/steer?features=3:1")
        assert tab.locator("#go").is_disabled() and "token" in tab.locator(".notice").inner_text()
        tab.goto(f"{browser.url}/prompt?text=hello")
        assert tab.locator(".hit").count() == 0 and "token" in tab.locator(".notice").inner_text()
    finally:
        context.close()


def test_another_page_reads_and_sends_nothing(chromium: Any, browser: Browser) -> None:
    """A page of another origin in the same browser, with the cookie there."""
    context = chromium.new_context()
    try:
        tab = context.new_page()
        tab.goto(f"{browser.url}/?token={TOKEN}")
        tab.route("http://evil.test/", lambda route: route.fulfill(body="<p>hello</p>", content_type="text/html"))
        tab.goto("http://evil.test/")
        for options in ("{}", "{mode: 'no-cors', credentials: 'include'}", "{method: 'POST', body: '{}'}"):
            read = tab.evaluate(
                f"fetch('{browser.url}/api/v1/features', {options}).then(a => a.text()).catch(() => '')"
            )
            assert read == ""
    finally:
        context.close()
