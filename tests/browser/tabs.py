"""Tabs of Chromium that are watched, and what every page must pass."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def watched(chromium: Any, base: str) -> Iterator[Any]:
    """A fresh tab; an error in its console, a script that ran or a request to anywhere but `base` fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(30_000)
    errors: list[str] = []
    tab.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda asked: None if asked.url.startswith(base) else errors.append(f"asked {asked.url}"))
    yield tab
    pwned = tab.evaluate("window.pwn")
    context.close()
    assert errors == [] and pwned is None


@contextmanager
def looked_at(chromium: Any, theme: str, width: int) -> Iterator[Any]:
    """A tab in a theme and width; what it shows at the end has no serious violation of axe and does not overflow."""
    package = pytest.importorskip("axe_playwright_python", reason="NO ACCESSIBILITY TESTS: axe-playwright-python")
    axe = (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, bypass_csp=True)
    try:
        tab = context.new_page()
        yield tab
        tab.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        tab.evaluate(axe + "; undefined")
        found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")
        bad = [
            (v["id"], v["help"], [n["html"][:200] + n["failureSummary"][:300] for n in v["nodes"][:3]])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert bad == [], json.dumps(bad, indent=1)
        assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    finally:
        context.close()
