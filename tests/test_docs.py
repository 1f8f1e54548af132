"""README and docs hold: every query runs, every file is where the architecture says, every command is explained."""

import re
from pathlib import Path

import pytest

from saeql.pipelines import Run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"```sql\n(.*?)```", README, flags=re.DOTALL)
VIEWS = ("dictionaries", "features", "examples", "documents", "labels", "neighbours", "logit_effects")


def test_readme_shows_five_queries():
    assert len(QUERIES) >= 5


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.split("FROM")[0].strip()[:40])
def test_readme_query_runs(query: str, tiny_run: Path):
    # the tiny corpus has no word that the README asks for but this one
    with Run.open(tiny_run).store() as store:
        table = store.sql(query.replace("'none'", "'lexical'").replace("0.001", "0"))
    assert table.num_rows > 0


@pytest.mark.parametrize("view", VIEWS)
def test_documented_views_exist_and_have_rows(view: str, tiny_run: Path):
    assert f"`{view}`" in README
    with Run.open(tiny_run).store() as store:
        assert store.sql(f"SELECT count(*) AS n FROM {view}")["n"][0].as_py() > 0


def test_architecture_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = ("kernels", "sae", "store", "pipelines")
    files = [p.relative_to(ROOT).as_posix() for f in folders for p in (ROOT / f).rglob("*.py")]
    missing = [f for f in files if not f.endswith(("__init__.py", "__main__.py")) and f"`{f}`" not in text]
    assert missing == []
    named = set(re.findall(r"`((?:kernels|sae|store|pipelines)/[\w/]+\.\w+)`", text))
    assert [f for f in sorted(named) if not (ROOT / f).exists()] == []


def test_relative_links_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_python_names_of_the_readme_exist():
    import saeql.pipelines as face

    for names in re.findall(r"from saeql\.pipelines import ([\w, ]+)", README):
        for name in names.split(", "):
            assert hasattr(face, name)
    assert sorted(face.__all__) == sorted(face._HOMES)
