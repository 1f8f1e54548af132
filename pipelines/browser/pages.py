"""The pages that only read: overview, feature list, one feature, two dictionaries compared."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from saeql.store.feature_store import FeatureStore
from saeql.store.listing import Listing

from .comparison import comparison
from .feature_page import feature_page, snippets
from .overview import overview
from .questions import ListQuestion, whole_of
from .settings import Refused
from .site import Site

SPLITS = ("train", "test")


def page_routes(site: Site) -> APIRouter:
    """The routes of these pages."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def _overview(request: Request) -> Response:
        if (kept := site.take_token(request)) is not None:
            return kept
        with site.open.reading() as store:
            name = site.dictionary(store, request.query_params.get("dictionary"))
            found = site.open.once(("overview", name), lambda: overview(store, name, site.settings.run))
            return site.page(request, "overview.html", names=site.names(store), name=name, o=found)

    @routes.get("/features")
    def _features(request: Request) -> Response:
        question = ListQuestion.of(request.query_params, site.settings.limits)
        with site.open.reading() as store:
            name = site.dictionary(store, question.dictionary)
            listing, problem = None, ""
            if question.computes and not site.may_compute(request):
                problem = "This search computes: open the address that `saeql serve` printed, which holds the token."
            else:
                try:
                    listing = listed(site, store, question)
                except ValueError as error:  # of the store or the model: about what was typed
                    problem = str(error)
                except Refused as refused:
                    problem = refused.message
            kinds = site.open.once(("kinds", name), lambda: sorted(store.cards(name).kinds()))
            return site.page(
                request,
                "features.html",
                names=site.names(store),
                name=name,
                question=question,
                listing=listing,
                problem=problem,
                kinds=kinds,
                pages=0 if listing is None else -(-listing.total // question.rows),
            )

    @routes.get("/features/{feature}")
    def _feature(request: Request, feature: str) -> Response:
        number = whole_of("a feature", feature)
        split = request.query_params.get("split", "train")
        if split not in SPLITS:
            raise Refused(400, f"no examples of split {split[:40]!r}: there is {', '.join(SPLITS)}")
        with site.open.reading() as store:
            name = site.dictionary(store, request.query_params.get("dictionary"))
            whole = site.whole_receipts(store, name)
            shade = request.query_params.get("shade") == "all"
            found = feature_page(store, number, dictionary=name, split=split, whole=whole, shade=shade)
            return site.page(
                request,
                "feature.html",
                names=site.names(store),
                name=name,
                f=found,
                can_steer=site.can_ask_model(name),
                num_features=len(store.cards(name).features),
                snippets=snippets(found, site.settings.shown),
            )

    @routes.get("/compare")
    def _compare(request: Request) -> Response:
        with site.open.reading() as store:
            names = site.names(store)
            one = site.dictionary(store, request.query_params.get("one"))
            other = site.dictionary(
                store, request.query_params.get("other") or next((n for n in names if n != one), one)
            )
            found = site.open.once(("compare", one, other), lambda: comparison(store, one, other))
            return site.page(request, "compare.html", names=names, name=one, c=found)

    return routes


def listed(site: Site, store: FeatureStore, question: ListQuestion) -> Listing:
    """One page of the list. Raises Refused, StoreError and what the model raises."""
    more: dict[str, Any] = {}
    if question.q and question.by in ("meaning", "like"):
        with site.models.turn():
            more["found"] = site.models.found(store, question.by, question.q, question.dictionary)
    elif question.q:
        more["found"] = site.search(store, question)
    return store.listing(
        question.filters,
        where=question.where or None,
        sort=question.sort or None,
        descending=question.descending,
        offset=(question.page - 1) * question.rows,
        limit=question.rows,
        dictionary=question.dictionary,
        **more,
    )
