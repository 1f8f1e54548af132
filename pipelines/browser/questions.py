"""What an address asks for, as plain values: the query string of a page or of the API, checked field by field."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from saeql.store.listing import SORTS, Filters

from .settings import Limits, Refused

#: Ways to search a list: of the store, and those that need the model or the dictionary.
STORE_WAYS = ("words", "token", "effect")
MODEL_WAYS = ("meaning", "like")
WAYS = (*STORE_WAYS, *MODEL_WAYS)


@dataclass(frozen=True)
class ListQuestion:
    """A list of features: what is looked for, filters, order, place."""

    q: str = ""
    by: str = "words"
    kind: str = ""
    min_density: float | None = None
    max_density: float | None = None
    min_auroc: float | None = None
    where: str = ""
    sort: str = ""
    order: str = ""
    page: int = 1
    rows: int = 50
    dictionary: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, str], limits: Limits) -> "ListQuestion":
        """Of a query string, empty fields as if they were not there. Raises Refused."""
        known = {name: given[name] for name in cls.__dataclass_fields__ if given.get(name)}
        numbers = {n: number_of(n, known[n]) for n in ("min_density", "max_density", "min_auroc") if n in known}
        whole = {n: whole_of(n, known[n]) for n in ("page", "rows") if n in known}
        return cls(**{**known, **numbers, **whole}).checked(limits)  # pyright: ignore[reportArgumentType]

    def checked(self, limits: Limits) -> "ListQuestion":
        """Itself. Raises Refused for what no list is asked by, and for more than one page may hold."""
        if self.by not in WAYS:
            raise Refused(400, f"no search by {self.by!r}: there is {', '.join(WAYS)}")
        if self.sort and self.sort not in SORTS:
            raise Refused(400, f"no list is sorted by {self.sort!r}: there is {', '.join(SORTS)}")
        if self.order not in ("", "asc", "desc"):
            raise Refused(400, f"order is asc or desc, not {self.order!r}")
        if max(len(self.q), len(self.where)) > limits.text_chars:
            raise Refused(413, f"a search is at most {limits.text_chars} characters long")
        if self.rows > limits.page_rows or self.page > limits.last_page:
            raise Refused(413, f"a page has at most {limits.page_rows} rows, the last page is {limits.last_page}")
        if self.rows < 1 or self.page < 1:
            raise Refused(400, "pages and rows count from 1")
        for name in ("min_density", "max_density", "min_auroc"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise Refused(400, f"{name} must be a finite number")
        return self

    @property
    def filters(self) -> Filters:
        """What the store is asked to leave out."""
        return Filters(self.kind or None, self.min_density, self.max_density, self.min_auroc)

    @property
    def best_needed(self) -> int | None:
        """How many of the best a search must find to draw this page; None where it must find all."""
        return None if self.filters.asks or self.where or self.sort else self.page * self.rows

    @property
    def narrowed(self) -> bool:
        """Whether a filter is set that a page need not always show."""
        bounds = (self.min_density, self.max_density, self.min_auroc)
        return bool(self.where or self.order) or any(bound is not None for bound in bounds)

    @property
    def descending(self) -> bool:
        """Largest first, but names and numbers from the start, unless told."""
        return self.order == "desc" if self.order else self.sort not in ("feature", "label")

    @property
    def computes(self) -> bool:
        """Whether more than the store is asked."""
        return bool(self.where) or (bool(self.q) and self.by in MODEL_WAYS)

    def address(self, **changes: object) -> str:
        """The query string of this question with some fields changed, defaults left out."""
        asked, default = replace(self, **changes), ListQuestion()  # pyright: ignore[reportArgumentType]
        fields = {name: getattr(asked, name) for name in self.__dataclass_fields__}
        kept = {name: value for name, value in fields.items() if value != getattr(default, name)}
        return "?" + urlencode({name: f"{v:g}" if isinstance(v, float) else v for name, v in kept.items()})


def number_of(name: str, text: str) -> float:
    """A finite number. Raises Refused."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Refused(400, f"{name} is a number, not {text[:40]!r}")
    return value


def whole_of(name: str, text: str) -> int:
    """A whole number of at most 12 digits. Raises Refused."""
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) <= 12):
        raise Refused(400, f"{name} is a whole number, not {text[:40]!r}")
    return int(text)
