"""The pages of a site: those of the server, drawn once, and the frames that a script fills."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from saeql.store.feature_store import FeatureStore
from saeql.store.listing import Listing
from saeql.store.search import Scored

from ..browser.comparison import comparison
from ..browser.overview import overview
from ..browser.questions import ListQuestion
from ..browser.rendering import STATIC, environment
from ..browser.settings import Limits
from ..share import without_paths
from .addresses import Addresses
from .files import SiteFiles

HERE = Path(__file__).parent
#: Nothing but the site's own files, and those as scripts, styles and images alone; a meta element cannot say who may
#: frame a page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'none'; base-uri 'none'; "
    "form-action 'self'"
)
ASSETS = "static/"
#: Ways to search that need no model.
WAYS = ("words", "token", "effect")


@dataclass(frozen=True)
class Shown:
    """A dictionary of the site: the features that are shown of it, ascending, and the kinds of their labels."""

    name: str
    features: np.ndarray
    num_all: int
    kinds: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether the places of the features are their numbers."""
        return bool((self.features == np.arange(len(self.features))).all())

    @property
    def part(self) -> str:
        """What is said where not all features are there; "" where they are."""
        if len(self.features) == self.num_all:
            return ""
        return f"They hold {len(self.features):,} of the {self.num_all:,} features of {self.name}."


class SitePages:
    """Draws pages and features of one store; `shown_run` is how the run is called in what is there to copy."""

    def __init__(self, store: FeatureStore, dictionaries: Sequence[Shown], shown_run: str, features_per_file: int):
        self.store, self.dictionaries, self.shown_run = store, list(dictionaries), shown_run
        self.features_per_file = features_per_file
        self.names = [shown.name for shown in dictionaries]
        self.link = Addresses(self.names)
        self.templates = environment(self.link, assets=ASSETS, site_templates=HERE / "templates")
        self._card = self.templates.get_template("site_card.html")

    def card(self, page: Any, name: str, snippets: dict[str, str]) -> str:
        """HTML of one feature, for the frame."""
        return self._card.render(f=page, name=name, names=self.names, snippets=snippets)

    def write_static(self, files: SiteFiles) -> None:
        """Style, scripts and icon."""
        for path in sorted([*STATIC.iterdir(), *(HERE / "static").iterdir()], key=lambda path: path.name):
            files.write(ASSETS + path.name, path.read_bytes())

    def write(self, files: SiteFiles, run: Path | None) -> None:
        """All pages, after all else: their addresses carry what `files.version` is by then."""
        version = files.version
        for number, shown in enumerate(self.dictionaries):
            found = overview(self.store, shown.name, run)
            found = replace(found, row=_without_paths(found.row))
            self._page(files, version, "/", "overview.html", number, {"dictionary": shown.name}, o=found)
            self._page(
                files, version, "/features", "features.html", number, {"dictionary": shown.name}, **self._list(shown)
            )
            path = self.link("/features/0", dictionary=shown.name).partition("?")[0]
            self._write(files, version, path, "site_feature.html", number, here="feature")
        for one in range(len(self.names)):
            for other in range(len(self.names)):
                if one != other:
                    pair = {"one": self.names[one], "other": self.names[other]}
                    both = comparison(self.store, *pair.values())
                    both = replace(both, rows=tuple(map(_without_paths, both.rows)))
                    self._page(files, version, "/compare", "compare.html", one, pair, c=both)

    def _list(self, shown: Shown) -> dict[str, Any]:
        """The first page of a list, as the server has it."""
        question = ListQuestion()
        first = [Scored(int(f), 0.0, {}) for f in shown.features[: question.rows]]
        hits = self.store.hits(first, limit=question.rows, dictionary=shown.name)
        return {
            "question": question,
            "listing": Listing(len(shown.features), 0, hits),
            "problem": "",
            "kinds": shown.kinds,
            "pages": -(-len(shown.features) // question.rows),
        }

    def _page(
        self,
        files: SiteFiles,
        version: str,
        place: str,
        template: str,
        number: int,
        fields: dict[str, str],
        **values: Any,
    ) -> None:
        self._write(files, version, self.link(place, **fields), template, number, **values)

    def _write(self, files: SiteFiles, version: str, path: str, template: str, number: int, **values: Any) -> None:
        shown = self.dictionaries[number]
        text = self.templates.get_template(template).render(
            **{
                "here": template.removesuffix(".html"),
                "names": self.names,
                "name": shown.name,
                "d": shown.name if len(self.names) > 1 else "",
                "run": self.shown_run,
                "part": shown.part,
                "has_model": False,
                "pages_there": ("overview", "features", *(["compare"] if len(self.names) > 1 else [])),
                "ways_there": WAYS,
                "version": version,
                "limits": Limits(),
                "policy": POLICY,
                "about": self._about(version, number),
                **values,
            }
        )
        files.write(path, text.encode("utf-8", "replace"))

    def _about(self, version: str, number: int) -> str:
        """What scripts are told, in ASCII."""
        shown = self.dictionaries[number]
        about = {
            "version": version,
            "place": str(number),
            "count": len(shown.features),
            "features": shown.num_all,
            "all": shown.is_whole,
            "per_file": self.features_per_file,
            "feature": self.link("/features/0", dictionary=shown.name).partition("?")[0],
        }
        return json.dumps(about)


def _without_paths(row: dict[str, Any]) -> dict[str, Any]:
    return {name: without_paths(value) if isinstance(value, str) else value for name, value in row.items()}
