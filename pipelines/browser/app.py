"""The application: guards, pages, API and static files around one `Site`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response

from saeql.store.errors import FeatureNotFound, StoreError

from .api import PREFIX, api_routes
from .computing import computing_routes, one_line
from .guards import Guard
from .pages import page_routes
from .rendering import STATIC
from .settings import Refused, Settings
from .site import Site
from .sql_page import sql_routes

_KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def create_app(settings: Settings) -> FastAPI:
    """The browser of one store as an ASGI application; the store is opened by the first request."""
    site = Site(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        site.models.forget()
        site.open.close()

    app = FastAPI(
        title="saeql",
        version=version("saeql"),
        description="Features of one store. Keys of features are Neuronpedia's where it has them.",
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.site = site
    for routes in (page_routes(site), sql_routes(site), computing_routes(site), api_routes(site)):
        app.include_router(routes)
    files = {file.name: file for file in STATIC.iterdir()}

    @app.get("/static/{name}", include_in_schema=False)
    def _static(request: Request, name: str) -> Response:
        if name not in files:
            raise Refused(404, "there is no such file")
        # the address has the version of the files in it
        age = "public, max-age=31536000, immutable" if "v" in request.query_params else "no-cache"
        return FileResponse(files[name], media_type=_KINDS.get(files[name].suffix), headers={"cache-control": age})

    _handle_errors(app, site)
    app.add_middleware(Guard, settings=settings)
    return app


def _handle_errors(app: FastAPI, site: Site) -> None:
    def told(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        message = " ".join(message.split())[:500].encode("utf-8", "replace").decode()
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": message}, status, headers)
        answer = site.page(request, "problem.html", status=status, message=message, code=status)
        answer.headers.update(headers or {})
        return answer

    @app.exception_handler(Refused)
    def _refused(request: Request, error: Refused) -> Response:
        headers = {"retry-after": "1"} if error.status == 429 else {}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return told(request, error.status, error.message, headers)

    @app.exception_handler(FeatureNotFound)
    def _not_found(request: Request, error: FeatureNotFound) -> Response:
        return told(request, 404, _without_folder(str(error), site))

    @app.exception_handler(StoreError)
    def _store(request: Request, error: StoreError) -> Response:
        lost = any(word in str(error) for word in ("is damaged", "cannot open", "does not exist", "has been closed"))
        return told(request, 503 if lost else 400, _without_folder(str(error), site))

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return told(request, 422, f"{place or 'the body'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Response:
        words: dict[int, str] = {404: "there is no such page", 405: "this address does not take that method"}
        return told(
            request, error.status_code, words.get(error.status_code, str(error.detail)), dict(error.headers or {})
        )

    @app.exception_handler(ValueError)
    def _value(request: Request, error: ValueError) -> Response:
        return told(request, 400 if _is_ours(error) else 500, one_line(error))

    @app.exception_handler(Exception)
    def _fault(request: Request, error: Exception) -> Response:
        return told(request, 500, one_line(error))


def _is_ours(error: Any) -> bool:
    return type(error).__module__.startswith("saeql.")


def _without_folder(message: str, site: Site) -> str:
    """A message that names the store by its file alone."""
    return message.replace(str(site.settings.store), site.settings.store.name)
