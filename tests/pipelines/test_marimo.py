"""A marimo notebook shows the card of a feature. Skipped where marimo is not installed (it is in no extra)."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("marimo")

NOTEBOOK = """
import marimo
app = marimo.App()

@app.cell
def _():
    from pathlib import Path
    from saeql.pipelines.stores import open_store
    store, _run = open_store(Path({store!r}))
    store.feature(7)
    return

if __name__ == "__main__":
    app.run()
"""


def test_a_notebook_shows_the_card(tiny_run: Path, tmp_path: Path) -> None:
    notebook = tmp_path / "notebook.py"
    notebook.write_text(NOTEBOOK.format(store=str(tiny_run / "features.duckdb")))
    command = [sys.executable, "-m", "marimo", "-q", "export", "html", str(notebook), "-o", str(tmp_path / "out.html")]
    subprocess.run([*command, "--no-include-code"], check=True, capture_output=True, text=True, timeout=120)
    shown = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "text/html" in shown and "sandbox=" in shown and "srcdoc=" in shown
    assert "Strongest examples" in shown and "feature-title" in shown
