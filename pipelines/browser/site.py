"""What all pages and the API share: the settings, the open store, the models, and templates rendered with both."""

import hashlib
from functools import cached_property
from typing import Any

from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from saeql.store.errors import FeatureNotFound
from saeql.store.feature_store import FeatureStore
from saeql.store.listing import Found

from .access import may_compute, require_token, take_token
from .models import Models
from .open_store import OpenStore
from .questions import WAYS, ListQuestion
from .rendering import STATIC, environment
from .settings import Settings

#: Searches that are kept.
NUM_SEARCHES = 16
PAGES = ("overview", "features", "prompt", "steer", "compare", "sql")
READING_PAGES = tuple(page for page in PAGES if page not in ("prompt", "steer"))


class Site:
    """One browser while it serves."""

    def __init__(self, settings: Settings):
        """Opens and loads nothing yet."""
        self.settings = settings
        self.open = OpenStore(settings)
        self.models = Models(settings)

    @cached_property
    def templates(self) -> Environment:
        """Templates, compiled once."""
        return environment()

    @cached_property
    def version(self) -> str:
        """Changes with the style sheet and the script, so that neither is taken from an old cache."""
        files = sorted(STATIC.iterdir())
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]

    def names(self, store: FeatureStore) -> list[str]:
        """Dictionaries of the store."""
        return self.open.once("names", lambda: [row["dictionary"] for row in store.dictionaries()])

    def dictionary(self, store: FeatureStore, asked: str | None) -> str:
        """The dictionary asked for, else the store's first. Raises FeatureNotFound."""
        names = self.names(store)
        if not names or (asked and asked not in names):
            raise FeatureNotFound(f"no dictionary {asked!r}: there is {', '.join(names) or 'none'}")
        return asked or names[0]

    @cached_property
    def _own_dictionary(self) -> str:
        """Read from the configuration: the module that knows it all imports torch."""
        if self.settings.run is None:
            return ""
        folder = self.settings.run / "dictionaries"
        made = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        return made[0] if len(made) == 1 else ""

    def own_dictionary(self) -> str:
        """Name of the dictionary that the run's model belongs to; "" where it cannot be told."""
        return self._own_dictionary

    def whole_receipts(self, store: FeatureStore, name: str) -> list[dict[str, Any]]:
        """Receipts about a dictionary as a whole."""
        return self.open.once(("receipts", name), lambda: store.receipts(None, dictionary=name))

    def can_ask_model(self, name: str | None = None) -> bool:
        """Whether there is a run whose model can be asked, of dictionary `name` where one is named."""
        return self.settings.run is not None and (name is None or self.own_dictionary() in ("", name))

    def search(self, store: FeatureStore, question: ListQuestion) -> Found:
        """What the store finds, the last few kept: pages and filters of a search do not search again."""
        kept: dict[tuple[Any, ...], Found] = self.open.once("searches", dict)
        key = (question.dictionary, question.by, question.q)
        found, needed = kept.get(key), question.best_needed
        if found is None or not (found.is_whole or (needed is not None and needed <= len(found.features))):
            found = store.found(question.q, by=question.by, dictionary=question.dictionary, limit=needed)
            if len(kept) >= NUM_SEARCHES:
                kept.clear()
            kept[key] = found
        return found

    def may_compute(self, request: Request) -> bool:
        """Whether this browser brought the token."""
        return may_compute(request, self.settings)

    def require_token(self, request: Request) -> None:
        """Raise Refused (401) without it."""
        require_token(request, self.settings)

    def take_token(self, request: Request) -> Response | None:
        """See `access.take_token`."""
        return take_token(request, self.settings)

    def page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """A page; `here` is its name in the navigation."""
        given = {
            "here": template.removesuffix(".html"),
            "names": [],
            "name": "",
            "run": self.settings.shown,
            "computes": self.may_compute(request),
            "has_model": self.can_ask_model(),
            "pages_there": PAGES if self.can_ask_model() else READING_PAGES,
            "ways_there": WAYS if self.can_ask_model() else [way for way in WAYS if way != "like"],
            "version": self.version,
            "limits": self.settings.limits,
            **values,
        }
        given["d"] = given["name"] if len(given["names"]) > 1 else ""  # named in addresses where there are several
        text = self.templates.get_template(template).render(**given)
        # a lone surrogate is shown as [U+D800] by then; in attributes of forms it may still stand
        return HTMLResponse(text.encode("utf-8", "replace"), status_code=status)
