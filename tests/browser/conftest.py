"""A run that is served, and Chromium to look at it. Where either is missing, the tests say so and are skipped."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "pipelines"))
sys.path.insert(0, str(Path(__file__).parent))
from browser_server import TOKEN, Browser, served
from tabs import watched

CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="NO BROWSER TESTS: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("NO BROWSER TESTS: no chromium on the PATH (apt-get install chromium, or set CHROMIUM)")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def browser(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A copy of the tiny run with labels and titles that would run, were they more than text."""
    folder = tmp_path_factory.mktemp("looked-at") / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("checkpoints", "features.duckdb*"))
    hostile(folder)
    with served(folder / "features.duckdb", folder) as found:
        found.ask("/api/v1/prompt", {"text": "the river"}, token=True)  # what is loaded once takes its time
        yield found


def hostile(folder: Path) -> None:
    import pyarrow as pa

    from saeql.store.evidence import Evidence
    from saeql.store.feature_store import FeatureStore

    texts = ["<img src=x onerror=window.pwn=1>", "<script>window.pwn=1</script>", "\u202eriver", "a river bank"]
    evidence = Evidence(folder / "evidence")
    for table, column in (("labels", "label"), ("documents", "title")):
        rows = evidence.read(table)
        written = pa.array([texts[n % len(texts)] for n in range(rows.num_rows)])
        evidence.write(table, rows.set_column(rows.column_names.index(column), column, written))
    FeatureStore.build(folder / "features.duckdb", [evidence])


@pytest.fixture
def page(chromium: Any, browser: Browser) -> Iterator[Any]:
    """A fresh tab that has the token; an error in its console fails the test."""
    with watched(chromium, browser.url) as tab:
        tab.goto(f"{browser.url}/?token={TOKEN}")
        yield tab
