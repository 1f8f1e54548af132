"""Templates of the browser: everything is escaped, and characters that do not show are made visible."""

from pathlib import Path

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..shown import number, share, token_text, visible

HERE = Path(__file__).parent
STATIC = HERE / "static"


def _shown(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _code(text: str) -> Markup:
    """A line of ours with what stands between backticks as code."""
    parts = [escape(visible(part)) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts))


def _fixed(value: float | None) -> str:
    """A score between 0 and 1."""
    return number(value) if value is None else f"{value:.3f}"


def environment() -> Environment:
    """Pages, and what they include of `pipelines/templates/`."""
    made = Environment(
        loader=ChoiceLoader([FileSystemLoader(HERE / "templates"), FileSystemLoader(HERE.parent / "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {"number": number, "share": share, "token": token_text, "code": _code, "fixed": _fixed}
    return made
