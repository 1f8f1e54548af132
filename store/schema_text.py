"""The schema as Markdown, from the comments in the schema itself: what docs/schema.md is."""

import duckdb

from . import migrations

_HEAD = """# The feature store's schema

Version {version}. Written by `python scripts/write_schema.py` from the comments of the schema; a test compares.

What is asked are views and macros of schema `main`. They stand on tables in two schemas: `evidence` is what was found
(Parquet, loaded), `derived` is what the build computes of it. Dictionaries, corpora and segments (a dictionary on a
corpus) are small numbers there; window and document ids are unique in the store. Big tables are sorted as their comment
says, which is what makes a question read little.
"""


def schema_markdown() -> str:
    """Views, macros and tables with their columns, types and comments."""
    with duckdb.connect() as connection:
        migrations.apply(connection)
        parts = [_HEAD.format(version=migrations.schema_version()), "## Views\n"]
        parts += _relations(connection, "main", "duckdb_views()", "view_name", "NOT internal")
        parts += ["## Macros\n", _macros(connection)]
        for schema in ("evidence", "derived"):
            parts.append(f"## Tables of `{schema}`\n")
            parts += _relations(connection, schema, "duckdb_tables()", "table_name", "true")
        parts.append("## Bookkeeping\n")
        parts += _relations(connection, "main", "duckdb_tables()", "table_name", "true")
    return "\n".join(parts).rstrip() + "\n"


def _relations(connection: duckdb.DuckDBPyConnection, schema: str, source: str, name: str, where: str) -> list[str]:
    found = connection.execute(
        f"SELECT {name}, comment FROM {source} WHERE schema_name = ? AND {where} ORDER BY {name}", [schema]
    ).fetchall()
    parts = []
    for relation, comment in found:
        columns = connection.execute(
            "SELECT column_name, data_type, comment FROM duckdb_columns() WHERE schema_name = ? AND table_name = ? "
            "ORDER BY column_index",
            [schema, relation],
        ).fetchall()
        title = relation if schema == "main" else f"{schema}.{relation}"
        lines = [f"### {title}\n", f"{comment or ''}\n", "| column | type | |", "| --- | --- | --- |"]
        for column, kind, text in columns:
            kind = "split_name" if kind.startswith("ENUM") else kind
            lines.append(f"| `{column}` | {kind} | {(text or '').replace('|', chr(92) + '|')} |")
        parts.append("\n".join(lines) + "\n")
    return parts


def _macros(connection: duckdb.DuckDBPyConnection) -> str:
    rows = connection.execute(
        "SELECT function_name, parameters, comment FROM duckdb_functions() "
        "WHERE schema_name = 'main' AND NOT internal AND function_type = 'table_macro' ORDER BY function_name"
    ).fetchall()
    lines = ["| macro | |", "| --- | --- |"]
    lines += [f"| `{name}({', '.join(parameters)})` | {comment or ''} |" for name, parameters, comment in rows]
    return "\n".join(lines) + "\n"
