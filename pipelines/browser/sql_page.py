"""The SQL page: a statement of the reader's own, run where it can do no harm; schema, table, chart, CSV."""

import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from fastapi import APIRouter, Request
from starlette.responses import Response

from saeql.store.errors import StoreError
from saeql.store.feature_store import FeatureStore

from ..charts import Chart, Series, bar_rows, series_chart
from ..output import cell, csv_text
from ..results import rows_of
from .settings import Refused
from .site import Site

EXAMPLES = {
    "best supported labels": "SELECT feature, label, kind, auroc, auroc_low, n_active\nFROM features "
    "WHERE kind != 'none' ORDER BY auroc_low DESC, n_active DESC LIMIT 20",
    "features of each kind": "SELECT kind, count(*) AS features, median(auroc) AS median_auroc\nFROM features "
    "GROUP BY kind ORDER BY features DESC",
    "density against AUROC": "SELECT log10(density) AS log_density, auroc\nFROM features WHERE auroc IS NOT NULL "
    "AND density > 0 LIMIT 1000",
    "fire on a token": "FROM fires_on(' the') LIMIT 20",
    "failed checks": "SELECT control, count(*) AS failed\nFROM receipts WHERE verdict = 'failed' GROUP BY control "
    "ORDER BY failed DESC",
}
MAX_CELL = 400
MAX_BARS = 40


@dataclass(frozen=True)
class Answer:
    """Rows of a statement as the page shows them."""

    columns: list[str]
    numeric: list[bool]
    rows: list[list[str]]
    truncated: bool
    seconds: float
    chart: Chart | None
    feature_column: int | None  # whose cells lead to features
    dictionary_column: int | None  # which of them, where the rows say


def sql_routes(site: Site) -> APIRouter:
    """The page, and its result as CSV."""
    routes = APIRouter(include_in_schema=False)

    def asked(request: Request) -> str:
        query = request.query_params.get("q", "")
        if len(query) > 4 * site.settings.limits.text_chars:
            raise Refused(413, f"a query has at most {4 * site.settings.limits.text_chars} characters")
        return query

    def run(query: str, max_rows: int) -> pa.Table:
        with site.open.console() as console:
            seconds = site.settings.limits.sql_seconds
            return console.sql(query, max_rows=max_rows, timeout_seconds=seconds, max_bytes=32 << 20)

    @routes.get("/sql")
    def _page(request: Request) -> Response:
        query, answer, problem = asked(request), None, ""
        if query.strip() and site.may_compute(request):
            began = time.perf_counter()
            try:
                table = run(query, site.settings.limits.sql_rows)
                answer = _answer(table, time.perf_counter() - began)
            except StoreError as error:
                problem = str(error)
        elif query.strip():
            problem = "Your own SQL needs the token: open the address that `saeql serve` printed."
        with site.open.reading() as store:
            names = site.names(store)
            views = site.open.once("schema", lambda: schema(store))
            return site.page(
                request,
                "sql.html",
                names=names,
                name=names[0] if names else "",
                query=query,
                answer=answer,
                problem=problem,
                views=views,
                examples=EXAMPLES,
            )

    @routes.get("/sql.csv")
    def _csv(request: Request) -> Response:
        site.require_token(request)
        table = run(asked(request), site.settings.limits.csv_rows)
        text = csv_text(table.column_names, rows_of(table))
        headers = {"content-disposition": 'attachment; filename="saeql.csv"'}
        if (table.schema.metadata or {}).get(b"truncated") == b"true":
            headers["x-truncated"] = "true"
        return Response(text.encode("utf-8", "replace"), media_type="text/csv; charset=utf-8", headers=headers)

    return routes


def schema(store: FeatureStore) -> list[dict[str, Any]]:
    """Views with their columns, types and comments, in the order of the alphabet."""
    columns = store.trusted_sql(
        "SELECT table_name, column_name, data_type, comment FROM duckdb_columns() "
        "WHERE schema_name = 'main' AND NOT internal ORDER BY table_name, column_index"
    ).to_pylist()
    comments = store.trusted_sql(
        "SELECT view_name, comment FROM duckdb_views() WHERE schema_name = 'main' AND NOT internal"
    )
    about = dict(zip(comments["view_name"].to_pylist(), comments["comment"].to_pylist(), strict=True))
    views: dict[str, list[dict[str, Any]]] = {}
    for column in columns:
        views.setdefault(column["table_name"], []).append(column)
    return [{"name": name, "comment": about.get(name) or "", "columns": found} for name, found in views.items()]


def _answer(table: pa.Table, seconds: float) -> Answer:
    rows = rows_of(table)
    numeric = [pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in table.schema]
    names = table.column_names
    return Answer(
        columns=names,
        numeric=numeric,
        rows=[[cell(value)[:MAX_CELL] for value in row] for row in rows],
        truncated=(table.schema.metadata or {}).get(b"truncated") == b"true",
        seconds=seconds,
        chart=_chart(names, numeric, rows),
        feature_column=names.index("feature") if "feature" in names else None,
        dictionary_column=names.index("dictionary") if "dictionary" in names else None,
    )


def _chart(names: list[str], numeric: list[bool], rows: list[list[Any]]) -> Chart | None:
    """The first column against the next that holds numbers: dots of two numbers, bars of a name and a number."""
    value = next((n for n in range(1, len(names)) if numeric[n]), None)
    if value is None or len(rows) < 2:
        return None
    pairs = [(row[0], float(row[value])) for row in rows if row[0] is not None and row[value] is not None]
    if numeric[0]:
        points = [(float(x), y, None, None, f"{names[0]} {x}, {names[value]} {y:g}") for x, y in pairs]
        return series_chart([Series(names[value], points, joined=False)], names[0], names[value], y_from=None)
    if len(pairs) > MAX_BARS:
        return None
    return bar_rows([(str(x), y) for x, y in pairs], names[value])
