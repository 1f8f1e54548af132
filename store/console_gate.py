"""What a statement of a stranger may name: decided on DuckDB's own syntax tree, by what is allowed.

The type of a statement cannot decide it: `WITH x AS (INSERT ...) SELECT ...` and `EXPLAIN ANALYZE COPY ...` are a
SELECT and an EXPLAIN, and read-only mode lets the second one write a file beside the store. So the tree itself must be
a query all the way down, over relations of the store and the few functions below that make rows of their arguments.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from .errors import SQLError

_QUERIES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_RELATIONS = {
    "BASE_TABLE",
    "TABLE_FUNCTION",
    "SUBQUERY",
    "JOIN",
    "EXPRESSION_LIST",
    "EMPTY",
    "PIVOT",
    "SHOW_REF",
    "COLUMN_DATA",
}
_ROW_MAKERS = {"range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"}
#: What may be asked of the engine's own catalogue: none of it knows where the store lies or what surrounds it.
_CATALOGUE = {"duckdb_tables", "duckdb_columns", "duckdb_views", "duckdb_functions"}
_INFORMATION_SCHEMA = {"tables", "columns"}
_SHOWN = {"tables", "__show_tables_expanded"}
_REFUSED_FUNCTIONS = {"current_setting", "getenv", "write_log"}

#: The engine opens such a name as a file where no relation has it.
_LOOKS_LIKE_A_FILE = re.compile(r"[./\\:*?]")
_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(ANALYZE\s+)?(\(\s*(ANALYZE|FORMAT\s+\w+)(\s*,\s*\w+)*\s*\)\s*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Catalogue:
    """Names, in lower case: relations of the engine and of the store, and the store's own table macros."""

    engine: frozenset[str]
    store: frozenset[str]
    macros: frozenset[str]

    @classmethod
    def of(cls, connection: duckdb.DuckDBPyConnection) -> "Catalogue":
        """The names of an open store."""

        def names(query: str) -> frozenset[str]:
            return frozenset(str(row[0]).lower() for row in connection.execute(query).fetchall())

        relations = (
            "SELECT view_name FROM duckdb_views() WHERE {0} UNION ALL SELECT table_name FROM duckdb_tables() WHERE {0}"
        )
        return cls(
            names(relations.format("internal")),
            names(relations.format("NOT internal")),
            names("SELECT function_name FROM duckdb_functions() WHERE NOT internal AND function_type = 'table_macro'"),
        )


def check_statement(cursor: duckdb.DuckDBPyConnection, catalogue: Catalogue, query: str) -> duckdb.Statement:
    """The one statement of `query`, if it only reads the store. Raises SQLError, and duckdb.Error for bad syntax."""
    statements = cursor.extract_statements(query)
    if len(statements) != 1:
        raise SQLError(f"give one SQL statement, not {len(statements)}")
    kind = statements[0].type.name
    if kind == "MULTI":
        raise SQLError("PIVOT needs its values named: PIVOT ... ON split IN ('train', 'test') USING ...")
    if kind not in ("SELECT", "EXPLAIN"):
        raise SQLError(f"this store is read-only: {kind} statements are refused, SELECT, DESCRIBE and EXPLAIN are not")
    text = statements[0].query
    tree = _tree(cursor, _EXPLAIN.sub("", text, count=1) if kind == "EXPLAIN" else text)
    if tree is None or len(tree) != 1:
        raise SQLError("this store is read-only: only a SELECT can be explained, with EXPLAIN at the very start")
    for node in _nodes(tree):
        _check_node(node, catalogue)
    return statements[0]


def check_condition(cursor: duckdb.DuckDBPyConnection, condition: str) -> None:
    """Raise SQLError where `condition` is not one SQL expression: `1 = 1) UNION SELECT ...; --` is none.

    It must parse both bare, so that it closes no bracket that it did not open, and within brackets, so that no clause
    follows it.
    """
    for form in (f"SELECT\n{condition}\n", f"SELECT (\n{condition}\n)"):
        tree = _tree(cursor, form)
        if tree is None or len(tree) != 1 or tree[0]["node"]["type"] != "SELECT_NODE":
            raise SQLError(
                f"not a condition: {' '.join(condition.split())!r}: give one SQL expression, like density < 0.01"
            )


def _tree(cursor: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]] | None:
    """DuckDB's syntax tree of every statement, None for what is no query."""
    rows = cursor.execute("SELECT json_serialize_sql($query)", {"query": query}).fetchall()
    told = json.loads(rows[0][0])
    return None if told["error"] else told["statements"]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of the tree; a loop, because a tree may be deeper than Python's stack."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _check_node(node: dict[str, Any], catalogue: Catalogue) -> None:
    kind = node.get("type")
    if not isinstance(kind, str):
        return
    if kind.endswith("_NODE"):
        if kind not in _QUERIES:
            raise SQLError(f"this store is read-only: {kind.split('_')[0]} is refused, SELECT is not")
    elif "sample" in node and "class" not in node and kind not in _RELATIONS:  # a relation, of whatever kind
        raise SQLError(f"the console does not know {kind} in FROM")
    elif kind == "BASE_TABLE":
        _check_table(node["catalog_name"], node["schema_name"].lower(), node["table_name"], catalogue)
    elif kind == "TABLE_FUNCTION":
        name = str(node["function"].get("function_name", "")).lower()
        if name not in _ROW_MAKERS | _CATALOGUE | catalogue.macros:
            raise SQLError(_outside(f"{name}()"))
    elif kind == "SHOW_REF":  # DESCRIBE and SUMMARIZE have a query here and no name
        if node["table_name"] and node["table_name"].strip('"').lower() not in _SHOWN:
            raise SQLError(_outside(f"SHOW {node['table_name']}"))
    elif node.get("class") == "FUNCTION" and str(node.get("function_name", "")).lower() in _REFUSED_FUNCTIONS:
        raise SQLError(_outside(f"{node['function_name']}()"))


def _check_table(database: str, schema: str, table: str, catalogue: Catalogue) -> None:
    name = table.lower()
    of_store = name in catalogue.store and schema not in ("pg_catalog", "information_schema") and database != "system"
    allowed = _INFORMATION_SCHEMA if schema == "information_schema" else _CATALOGUE
    of_engine = name in catalogue.engine or schema == "pg_catalog"
    if not of_store and ((of_engine and name not in allowed) or _LOOKS_LIKE_A_FILE.search(name)):
        raise SQLError(_outside(f"{schema}.{table}" if schema else table))


def _outside(name: str) -> str:
    return (
        f"{name} is refused: a query reads the relations of the store (SHOW TABLES), not files, settings or the machine"
    )
