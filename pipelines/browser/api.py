"""The API under /api/v1: what the pages show, as JSON, described by OpenAPI."""

import math
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.security import HTTPBearer

from saeql.store.errors import FeatureNotFound
from saeql.store.feature_store import Example, FeatureStore
from saeql.store.listing import Listing

from ..receipts.card import text_of
from ..results import rows_of
from .api_models import (
    MAX_ID,
    Activation,
    DictionaryOut,
    Explanation,
    FeatureOut,
    Features,
    Hit,
    MetricOut,
    Problem,
    PromptIn,
    PromptOut,
    ReceiptOut,
    SqlIn,
    SqlOut,
)
from .feature_page import FeaturePage, ShownExample, feature_page
from .pages import listed
from .questions import ListQuestion
from .settings import Refused
from .site import Site

PREFIX = "/api/v1"
#: Answers that any route may give beside its own.
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "What was asked cannot be asked."},
    401: {"model": Problem, "description": "It computes, and the request has no token."},
    403: {"model": Problem, "description": "Another Host or Origin than this server's."},
    404: {"model": Problem, "description": "There is no such thing here."},
    409: {"model": Problem, "description": "It was cancelled."},
    413: {"model": Problem, "description": "More than one request may ask for."},
    422: {"model": Problem, "description": "A field is missing or of another kind."},
    429: {"model": Problem, "description": "Too much is being asked at once."},
    503: {"model": Problem, "description": "The store cannot be read."},
}
#: How OpenAPI says that a route needs the token; `Site.require_token` asks for it.
TOKEN_NEEDED = [Depends(HTTPBearer(auto_error=False, scheme_name="token"))]
Name = Annotated[str | None, Query(description="Dictionary; the store's first unless named.", max_length=400)]
Text = Annotated[str, Query(max_length=4000)]


def api_routes(site: Site) -> APIRouter:
    """The routes that only read, and those of SQL and prompts."""
    routes = APIRouter(prefix=PREFIX, responses=PROBLEMS)

    @routes.get("/dictionaries", summary="The dictionaries of the store")
    def dictionaries() -> list[DictionaryOut]:
        with site.open.reading() as store:
            return [DictionaryOut(**_finite(row)) for row in store.dictionaries()]

    @routes.get("/metrics", summary="What was measured of a dictionary, with intervals")
    def metrics(dictionary: Name = None) -> list[MetricOut]:
        with site.open.reading() as store:
            return [MetricOut(**_finite(row)) for row in store.metrics(site.dictionary(store, dictionary))]

    @routes.get("/features", summary="A page of the features, searched, filtered and sorted")
    def features(
        request: Request,
        q: Text = "",
        by: Literal["words", "token", "effect", "meaning", "like"] = "words",
        kind: Annotated[str, Query(max_length=100)] = "",
        min_density: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        max_density: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        min_auroc: Annotated[float | None, Query(allow_inf_nan=False)] = None,
        where: Annotated[Text, Query(description="A SQL condition on the view features; needs the token.")] = "",
        sort: Literal["", "feature", "label", "density", "auroc", "max_activation"] = "",
        order: Literal["", "asc", "desc"] = "",
        page: Annotated[int, Query(ge=1, le=MAX_ID)] = 1,
        rows: Annotated[int, Query(ge=1, le=MAX_ID)] = 50,
        dictionary: Name = None,
    ) -> Features:
        question = ListQuestion(
            q, by, kind, min_density, max_density, min_auroc, where, sort, order, page, rows, dictionary
        ).checked(site.settings.limits)
        if question.computes:
            site.require_token(request)
        with site.open.reading() as store:
            site.dictionary(store, dictionary)
            return features_out(listed(site, store, question))

    @routes.get("/features/{index}", summary="One feature, with examples, effects, neighbours and receipts")
    def feature(index: int, dictionary: Name = None, split: Literal["train", "test"] = "train") -> FeatureOut:
        with site.open.reading() as store:
            return _feature(site, store, index, site.dictionary(store, dictionary), split)

    @routes.post("/sql", summary="One SQL statement; needs the token", dependencies=TOKEN_NEEDED)
    def sql(request: Request, asked: SqlIn) -> SqlOut:
        site.require_token(request)
        limits = site.settings.limits
        if len(asked.query) > 4 * limits.text_chars or asked.max_rows > limits.sql_rows:
            raise Refused(413, f"a query has at most {4 * limits.text_chars} characters and {limits.sql_rows} rows")
        with site.open.console() as console:
            table = console.sql(
                asked.query, max_rows=asked.max_rows, timeout_seconds=limits.sql_seconds, max_bytes=32 << 20
            )
        truncated = (table.schema.metadata or {}).get(b"truncated") == b"true"
        rows = [[_plain(value) for value in row] for row in rows_of(table)]
        return SqlOut(columns=table.column_names, rows=rows, truncated=truncated)

    @routes.post("/prompt", summary="What fires on a text, token by token; needs the token", dependencies=TOKEN_NEEDED)
    def prompt(request: Request, asked: PromptIn) -> PromptOut:
        site.require_token(request)
        if len(asked.text) > site.settings.limits.text_chars:
            raise Refused(413, f"a prompt has at most {site.settings.limits.text_chars} characters")
        from ..search import prompt_hits

        with site.open.reading() as store:
            with site.models.turn():
                reading = site.models.read(store, asked.text)
            found = prompt_hits(store, site.models.dictionary(), reading, limit=asked.limit)
            values = [reading.of(hit.feature).tolist() for hit in found.hits]
        return PromptOut(tokens=reading.tokens, features=[hit_out(hit) for hit in found.hits], values=values)

    return routes


def hit_out(hit: Any) -> Hit:
    """A search hit as the API has it."""
    return Hit(**_finite({name: getattr(hit, name) for name in Hit.model_fields}))


def features_out(listing: Listing) -> Features:
    """A page of a list as the API has it."""
    return Features(total=listing.total, offset=listing.offset, features=[hit_out(hit) for hit in listing.hits])


def _feature(site: Site, store: FeatureStore, index: int, name: str, split: str) -> FeatureOut:
    if not 0 <= index <= MAX_ID:
        raise FeatureNotFound(f"{name} has no feature {index}")
    page = feature_page(store, index, dictionary=name, split=split, whole=site.whole_receipts(store, name))
    about = site.open.once(
        ("dictionary", name), lambda: next(r for r in store.dictionaries() if r["dictionary"] == name)
    )
    row = page.row
    centres = (page.edges[:-1] + page.edges[1:]) / 2 if len(page.edges) else page.edges
    effects = {
        way: ([e["token"] or "" for e in found], [round(float(e["effect"]), 5) for e in found])
        for way, found in page.effects.items()
    }
    explained = row["kind"] != "none"
    scores = {key: _plain(row[key]) for key in ("auroc", "auroc_low", "auroc_high", "f1")}
    return FeatureOut(
        modelId=str(about["model_name"] or "").rsplit("/", 1)[-1].rsplit(":", 1)[-1],
        layer=name,
        index=str(index),
        hookName=about["hook_point"] or "",
        maxActApprox=row["max_activation"] or 0.0,
        frac_nonzero=row["density"] or 0.0,
        pos_str=effects["promoted"][0],
        pos_values=effects["promoted"][1],
        neg_str=effects["suppressed"][0],
        neg_values=effects["suppressed"][1],
        freq_hist_data_bar_values=[round(float(c), 5) for c in centres],
        freq_hist_data_bar_heights=[int(c) for c in page.counts],
        topkCosSimIndices=[n["neighbour"] for n in page.neighbours],
        topkCosSimValues=[round(float(n["cosine"]), 5) for n in page.neighbours],
        correlated_features_indices=[c["partner"] for c in page.cofirings],
        correlated_features_pmi=[round(float(c["pmi"]), 5) for c in page.cofirings],
        explanations=[Explanation(description=row["label"], typeName="saeql", scores=scores)] if explained else [],
        activations=_activations(page),
        receipts=[ReceiptOut(control=r["control"], verdict=r["verdict"], text=text_of(r)) for r in page.receipts],
        saeql={key: _plain(value) for key, value in row.items()},
    )


def _activations(page: FeaturePage) -> list[Activation]:
    made = [_activation(shown, None, (-1.0, -1.0, -1.0)) for shown in page.top]
    for decile, group in page.deciles:
        values = [shown.example.activation for shown in group]
        made += [_activation(shown, decile, (min(values), max(values), 0.1)) for shown in group]
    return made


def _activation(shown: ShownExample, decile: int | None, bin: tuple[float, float, float]) -> Activation:
    example: Example = shown.example
    largest = max(example.activations)
    return Activation(
        tokens=example.tokens,
        values=[round(float(a), 5) for a in example.activations],
        maxValue=largest,
        maxValueTokenIndex=example.activations.index(largest),
        minValue=min(example.activations),
        binMin=bin[0],
        binMax=bin[1],
        binContains=bin[2],
        qualifyingTokenIndex=example.focus - 1,
        decile=decile,
        documentId=example.document_id,
        title=example.title,
    )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """A value that JSON has a word for: what is not finite is null, other kinds are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value)
