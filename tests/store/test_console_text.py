"""Splitting text into statements, held against DuckDB's own parser, whole and letter by letter."""

import duckdb
import pytest

from saeql.store.console_text import split, split_all

TEXTS = [
    "SELECT 1; SELECT 2",
    "SELECT 1;;; ;SELECT 2;",
    'SELECT \';\' AS a; SELECT ";" FROM (SELECT 1 AS ";")',
    "SELECT 'it''s; fine'; SELECT 3 -- end",
    "SELECT 1 -- ; no\n; SELECT 2",
    "SELECT /* ; /* ; */ ; */ 1; SELECT 2",
    "SELECT $$ ; ' $$; SELECT $a$ ; $$ ; $a$",
    r"SELECT e'\';' ; SELECT 2",
    r"SELECT 'a\'; SELECT 2",
    "SELECT 1 AS e;SELECT 'x;'",
    "SELECT $1; SELECT 3",
    "-- only a comment\n",
    "/* nothing */ ;",
    "",
    "SELECT 1 /* ; */",
    "SELECT 'Ärger; ☃' AS \"ü;\";\n\n  SELECT 2;\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_statements_are_those_of_the_engine(text: str) -> None:
    with duckdb.connect() as connection:
        expected = [s.query for s in connection.extract_statements(text)]
    found = [s.text for s in split_all(text)]
    assert [t.rstrip("; \n") for t in expected] == [t.rstrip("; \n") for t in found]


@pytest.mark.parametrize("text", TEXTS)
def test_statements_typed_letter_by_letter_are_the_same(text: str) -> None:
    found, waiting = [], ""
    for letter in text:
        done, waiting = split(waiting + letter)
        found += done
    assert [s.text for s in [*found, *split_all(waiting)]] == [s.text for s in split_all(text)]


def test_lines_are_counted_where_statements_begin() -> None:
    text = "\n-- first\nSELECT 1;\n\nSELECT\n 2;  SELECT 3;\n\n SELECT 4"
    assert [s.line for s in split_all(text)] == [2, 5, 6, 8]


def test_what_is_not_finished_waits() -> None:
    for text in ("SELECT 'a;", 'SELECT "a;', "SELECT $$ a;", "SELECT /* a;", "SELECT 1"):
        found, waiting = split(text)
        assert not found and waiting == text
    assert split("SELECT 1; -- done\n") == (split("SELECT 1;")[0], "")
