"""Templates of the browser: everything is escaped, and characters that do not show are made visible."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..shown import number, share, token_text, visible
from .shading import shaded

HERE = Path(__file__).parent
STATIC = HERE / "static"


def _shown(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _code(text: str) -> Markup:
    """A line of ours with what stands between backticks as code."""
    parts = [escape(visible(part)) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts))


def fixed(value: float | None) -> str:
    """A score between 0 and 1."""
    return number(value) if value is None else f"{value:.3f}"


def address(path: str, **fields: object) -> str:
    """An address of the server with the fields that say something."""
    kept = {name: value for name, value in fields.items() if value not in (None, "", [])}
    return path + (f"?{urlencode(kept, errors='replace')}" if kept else "")


def environment(
    link: Callable[..., str] = address, *, assets: str = "/static/", site_templates: Path | None = None
) -> Environment:
    """Pages, and what they include of `pipelines/templates/`.

    `link` makes what stands in an href of a page and its fields, `assets` is where style and scripts are. With
    `site_templates`, a folder, pages are those of a site that no server draws.
    """
    folders = [HERE / "templates", HERE.parent / "templates", *([site_templates] if site_templates else [])]
    made = Environment(
        loader=ChoiceLoader([FileSystemLoader(folder) for folder in folders]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {
        "number": number,
        "share": share,
        "token": token_text,
        "code": _code,
        "fixed": fixed,
        "shaded": shaded,
    }
    made.globals |= {"link": link, "assets": assets, "is_site": site_templates is not None}
    return made
