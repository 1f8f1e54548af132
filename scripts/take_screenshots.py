"""Pictures of every page of the feature browser, in both themes, as they are under docs/img.

    python scripts/take_screenshots.py RUN [--out docs/img] [--feature 123]

RUN needs labels, and `compare` a store with a second dictionary whose matches are known (`saeql compare A B --save`,
`saeql store A --add B`). Needs playwright and Chromium. What is on the pictures is what the model and the text gave.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
from bench_about import ROOT

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
THEMES = ("light", "dark")
SQL = "SELECT kind, count(*) AS features, avg(auroc) AS auroc FROM features GROUP BY kind"
_WAIT_MS = 300_000


def pages(feature: int, others: list[int]) -> dict[str, str]:
    """Addresses by the name of the picture."""
    steered = ",".join([f"{feature}:0.3", *(f"{other}:0.2" for other in others[:1])])
    return {
        "overview": "/",
        "features": "/features?" + urlencode({"q": "music"}),
        "feature": f"/features/{feature}",
        "prompt": "/prompt?" + urlencode({"text": "The band played music in the old town hall until the police came."}),
        "steer": "/steer?" + urlencode({"features": steered, "prompt": "I think that"}),
        "compare": "/compare",
        "sql": "/sql?" + urlencode({"q": SQL}),
    }


def act(tab: Any, name: str) -> None:
    """What a page shows only after something was pressed."""
    if name == "steer":
        tab.locator("#go").click()
        tab.locator("#stop:enabled").wait_for()
        tab.locator("#stop:disabled").wait_for()
        tab.locator("#doses svg").wait_for()


def main() -> None:
    """Serve, look, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--feature", type=int, default=1308)
    parser.add_argument("--only", nargs="*", help="Names of pictures, such as steer; all unless named.")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "saeql.pipelines", "serve", str(arguments.run), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
        root = address.split("/?")[0]
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for theme in THEMES:
                context = chromium.new_context(viewport={"width": 1200, "height": 900}, color_scheme=theme)
                tab = context.new_page()
                tab.set_default_timeout(_WAIT_MS)
                tab.goto(address)
                for name, path in pages(arguments.feature, [arguments.feature + 1]).items():
                    if arguments.only and name not in arguments.only:
                        continue
                    tab.goto(root + path)
                    tab.wait_for_load_state("networkidle")
                    act(tab, name)
                    tab.screenshot(path=arguments.out / f"{name}-{theme}.png", full_page=name == "steer")
                    print(f"{name}-{theme}.png", flush=True)
                context.close()
            chromium.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
