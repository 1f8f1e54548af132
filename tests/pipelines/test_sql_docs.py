"""docs/sql.md holds: every query of it runs in the console and finds rows, and every view it names is there."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saeql.pipelines import Run
from saeql.pipelines.cli import main
from saeql.sae.files import save_dictionary
from saeql.store.feature_store import FeatureStore

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sql.md").read_text(encoding="utf-8")
BEFORE, COOKBOOK = DOCUMENT.split("## Cookbook\n")
#: A question is the line or lines before its query.
RECIPES = re.findall(r"(\S[^`]*?)\n\n```sql\n(.*?)```", COOKBOOK.split("\n\n", 1)[1], flags=re.DOTALL)


@pytest.fixture(scope="module")
def store(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """Of a run that was compared with a dictionary of which it shares the first half."""
    folder = tmp_path_factory.mktemp("asked")
    run = Run.open(shutil.copytree(tiny_run, folder / "late"))
    early = run.dictionary()
    with torch.no_grad():
        for weights in (early.W_dec, early.W_enc):
            weights[early.d_sae // 2 :] = weights[early.d_sae // 2 :].flip(1)
    save_dictionary(early, folder / "early")
    main(["compare", str(folder / "early"), str(run.path), "--save"])
    with run.store() as opened:
        yield opened


def test_there_are_twenty_questions() -> None:
    assert len(RECIPES) >= 20 and len(RECIPES) == COOKBOOK.count("```sql")
    assert len({question for question, _ in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize(("question", "query"), RECIPES, ids=lambda text: " ".join(text.split())[:50])
def test_recipe(store: FeatureStore, question: str, query: str) -> None:
    found = store.sql(query)
    assert found.num_rows > 0, question
    assert all(column.null_count < len(column) for column in found.columns), question


def test_views_and_their_comments_are_there(store: FeatureStore) -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", BEFORE, flags=re.MULTILINE)
    named = {name.strip("`") for row in rows for name in row.split(", `") if "--" not in name}
    macros = {name.split("(")[0] for name in named if "(" in name}
    named -= {name for name in named if "(" in name}
    functions = "SELECT function_name FROM duckdb_functions() WHERE NOT internal AND function_type = 'table_macro'"
    assert macros == set(store.sql(functions)["function_name"].to_pylist())
    views = set(
        store.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'")[
            "view_name"
        ].to_pylist()
    )
    assert named == views
    for query in re.findall(r"```sql\n(.*?)```", BEFORE, flags=re.DOTALL):
        assert store.sql(query).num_rows > 10


def test_what_is_said_to_be_tried_is_tried() -> None:
    hostile = Path(__file__).parents[1] / "store" / "hostile.toml"
    assert "tests/store/hostile.toml" in DOCUMENT and hostile.read_text().count("[[statement]]") > 100
