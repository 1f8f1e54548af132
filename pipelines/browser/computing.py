"""Pages and API of what the model is asked: what fires on a text, and texts written with features changed."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from saeql.store.errors import FeatureNotFound
from saeql.store.feature_store import FeatureStore

from ..charts import Chart, Series, series_chart
from .api import PREFIX, PROBLEMS, TOKEN_NEEDED
from .api_models import DoseIn, DoseOut, SteerIn
from .dose import Dose, doses
from .generation import Writing, write_both
from .questions import number_of, whole_of
from .settings import Refused
from .shading import pieces
from .site import Site

if TYPE_CHECKING:
    from ..steering.edits import Edit

NUM_SHOWN = 24
_log = logging.getLogger(__name__)
MODES = ("add", "clamp", "scale", "ablate", "ablate_mean", "replace", "cap", "ablate_direction")
UNITS = ("norm", "p99", "raw")


def computing_routes(site: Site) -> APIRouter:
    """Prompt page, steering page, and the API behind the latter."""
    pages, api = APIRouter(include_in_schema=False), APIRouter(prefix=PREFIX, responses=PROBLEMS)

    @pages.get("/prompt")
    def _prompt(request: Request) -> Response:
        text, problem, read = request.query_params.get("text", ""), "", None
        _check_text(site, text)
        asked = request.query_params.get("feature")
        with site.open.reading() as store:
            names = site.names(store)
            name = _own(site, names)
            feature = None if not asked else whole_of("a feature", asked)
            if feature is not None and not 0 <= feature < len(store.cards(name).features):
                raise FeatureNotFound(f"{name} has no feature {feature}")
            if text.strip() and not site.may_compute(request):
                problem = "Reading a text needs the token: open the address that `saeql serve` printed."
            elif text.strip():
                try:
                    read = _read(site, store, text, feature)
                except Refused as refused:
                    problem = refused.message
                except ValueError as error:
                    problem = str(error)
            return site.page(
                request,
                "prompt.html",
                names=names,
                name=name,
                text=text,
                problem=problem,
                read=read,
                asked=None if feature is None else {"feature": feature, "label": store.cards(name).label(feature)},
            )

    @pages.get("/steer")
    def _steer(request: Request) -> Response:
        given = request.query_params
        _check_text(site, given.get("prompt", ""))
        with site.open.reading() as store:
            names = site.names(store)
            name = _own(site, names)
            cards = store.cards(name)
            chosen = [
                {"feature": number, "strength": strength, "label": cards.label(number)}
                for number, strength in _chosen(site, given.get("features", ""), given.get("strength") or "0.4")
                if 0 <= number < len(cards.features)
            ]
            return site.page(
                request,
                "steer.html",
                names=names,
                name=name,
                prompt=given.get("prompt") or "I think that",
                chosen=chosen,
                mode=given.get("mode") if given.get("mode") in MODES else "add",
                modes=MODES,
                tokens=min(max(whole_of("tokens", given.get("tokens") or "40"), 1), site.settings.limits.new_tokens),
                temperature=number_of("temperature", given.get("temperature") or "0"),
                seed=whole_of("seed", given.get("seed") or "0"),
            )

    @pages.post("/steer/doses")
    def _dose_plot(request: Request, asked: DoseIn) -> Response:
        found = _doses(site, request, asked)
        return site.page(request, "doses.html", plot=_dose_chart(found), doses=found)

    @api.post(
        "/doses", summary="Dose and response of edits on the next word; needs the token", dependencies=TOKEN_NEEDED
    )
    def _dose(request: Request, asked: DoseIn) -> list[DoseOut]:
        return [DoseOut(**vars(dose)) for dose in _doses(site, request, asked)]

    @api.post(
        "/steer",
        summary="A prompt continued with and without edits, as server-sent events; needs the token",
        description='Events hold JSON: {"side": "baseline" or "steered", "text": ...}, {"side": ..., "end": true}, '
        '{"error": ...}, {"done": true}. Closing the connection cancels the writing and frees the model.',
        response_class=StreamingResponse,
        dependencies=TOKEN_NEEDED,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def _stream(request: Request, asked: SteerIn) -> Response:
        site.require_token(request)
        limits = site.settings.limits
        if asked.new_tokens > limits.new_tokens:
            raise Refused(413, f"at most {limits.new_tokens} tokens are written, not {asked.new_tokens}")
        edits = edits_of(site, asked)
        writing = Writing(asked.new_tokens, asked.temperature, asked.seed)

        def work(cancelled: threading.Event, emit: Callable[[dict[str, Any]], None]) -> None:
            with site.open.reading() as store, site.models.turn(cancelled):
                steerer = site.models.steerer(store)
                site.models.check_prompt(steerer, asked.prompt)
                write_both(steerer, asked.prompt, edits, writing, cancelled, emit)

        first = site.models.free_place()  # refused before anything is sent
        if first is not None:
            raise first
        return StreamingResponse(_events(work), media_type="text/event-stream")

    routes = APIRouter()
    routes.include_router(pages)
    routes.include_router(api)
    return routes


async def _events(work: Callable[[threading.Event, Callable[[dict[str, Any]], None]], None]) -> AsyncIterator[bytes]:
    """Events of `work`, which runs on a thread of its own; it is cancelled when nobody listens any more."""
    loop, queue, cancelled = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None](), threading.Event()

    def put(event: dict[str, Any] | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, event)

    def run() -> None:
        try:
            work(cancelled, put)
            put({"done": True})
        except Refused as refused:
            put({"error": refused.message})
        except Exception as error:
            if not _is_ours(error):
                _log.exception("a text could not be written")
            put({"error": one_line(error)})
        finally:
            put(None)

    threading.Thread(target=run, daemon=True, name="saeql-steer").start()
    try:
        while (event := await queue.get()) is not None:
            yield b"data: " + json.dumps(event).encode() + b"\n\n"
    finally:
        cancelled.set()


def _is_ours(error: Exception) -> bool:
    return isinstance(error, ValueError) and type(error).__module__.startswith("saeql.")


def one_line(error: Exception) -> str:
    """What is told of an error: its own words where saeql says them, else its kind."""
    if _is_ours(error):
        return " ".join(str(error).split())
    return f"the server could not do this ({type(error).__name__})"


def edits_of(site: Site, asked: DoseIn) -> "list[Edit]":
    """Edits that were asked for. Raises Refused: 413 for too many or too strong ones, 400 for impossible ones."""
    from ..steering.edits import MAX_STRENGTH, MAX_TO, Edit, SteerError

    limits = site.settings.limits
    _check_text(site, asked.prompt)
    if len(asked.edits) > limits.steered_features:
        raise Refused(413, f"at most {limits.steered_features} features are steered at once, not {len(asked.edits)}")
    edits = [Edit(e.feature, e.mode, e.strength, e.to, e.unit) for e in asked.edits]
    for edit in edits:
        most = MAX_STRENGTH[edit.unit if edit.mode == "add" else "share"]
        if abs(edit.amount) > most or abs(edit.goal) > MAX_TO:
            raise Refused(413, f"{edit.describe()} is stronger than {most:g}, where a model only breaks")
        try:
            edit.check()
        except SteerError as error:
            raise Refused(400, str(error)) from None
    return edits


def _doses(site: Site, request: Request, asked: DoseIn) -> list[Dose]:
    site.require_token(request)
    edits = edits_of(site, asked)
    with site.open.reading() as store, site.models.turn():
        steerer = site.models.steerer(store)
        site.models.check_prompt(steerer, asked.prompt)
        name, promoted = site.models.dictionary(), []
        for edit in edits:
            rows = store.logit_effects(edit.feature, dictionary=name, direction="promoted")  # pyright: ignore[reportArgumentType]
            promoted += [row["token"] for row in rows if row["token"]]
        return doses(steerer, asked.prompt, edits, promoted)


def _dose_chart(found: list[Dose]) -> Chart | None:
    kl = [(d.factor, d.kl, None, None, f"{d.factor:g} x: {d.kl:.3g} nats, likeliest {d.likeliest!r}") for d in found]
    shifts = [
        (d.factor, d.promoted, None, None, f"{d.factor:g} x: {d.promoted:+.3g} nats")
        for d in found
        if d.promoted is not None
    ]
    series = [Series("divergence of the next word", kl), Series("promoted tokens, log probability", shifts)]
    return series_chart(series, "multiple of the strengths set", "nats", marks=[(1.0, "as set")])


def _read(site: Site, store: FeatureStore, text: str, feature: int | None) -> dict[str, Any]:
    """What the prompt page shows: features by their share of their largest, each with the text in its shades, and of
    `feature` the text in shades of the largest activation that it has anywhere on train.
    """
    from ..search import prompt_hits

    with site.models.turn():
        reading = site.models.read(store, text)
    found = prompt_hits(store, site.models.dictionary(), reading, limit=NUM_SHOWN)
    shown = []
    for hit in found.hits:
        values = reading.of(hit.feature)
        shown.append(
            {
                "hit": hit,
                "largest": float(values.max()),
                "pieces": pieces(reading.tokens, values.tolist(), float(values.max())),
            }
        )
    own = None
    if feature is not None:
        values, cards = reading.of(feature), store.cards(site.models.dictionary())
        most = float(cards.max_activation[cards.rows([feature])[0]])
        own = {
            "largest": float(values.max()),
            "share": float(values.max()) / most if most > 0 else None,
            "num_active": int((values > 0).sum()),
            "pieces": pieces(reading.tokens, values.tolist(), most),
        }
    strongest = reading.shares.max(1)
    return {
        "features": shown,
        "own": own,
        "tokens": list(zip(pieces_each(reading.tokens, strongest.tolist()), found.by_token, strict=True)),
        "num_features": len({int(i) for i in reading.indices[reading.shares > 0]}),
    }


def pieces_each(tokens: list[str], shares: list[float]) -> list[Any]:
    """One piece a token, silent ones too, shaded by the share of a largest activation."""
    return [pieces([token], [share], 1.0)[0] for token, share in zip(tokens, shares, strict=True)]


def _own(site: Site, names: list[str]) -> str:
    """The dictionary that the model belongs to; without a run the store's first."""
    return site.own_dictionary() or (names[0] if names else "")


def _check_text(site: Site, text: str) -> None:
    if len(text) > site.settings.limits.text_chars:
        raise Refused(413, f"a prompt has at most {site.settings.limits.text_chars} characters")


def _chosen(site: Site, text: str, usual: str) -> list[tuple[int, float]]:
    """(feature, strength) of "12:0.4,45", of the `usual` strength where there is none. Raises Refused."""
    parts = [part for part in text.split(",") if part.strip()]
    most = site.settings.limits.steered_features
    if len(parts) > most:
        raise Refused(413, f"at most {most} features are steered at once, not {len(parts)}")
    found = []
    for part in parts:
        number, _, strength = part.strip().partition(":")
        found.append((whole_of("a feature", number), number_of("a strength", strength or usual)))
    return found
