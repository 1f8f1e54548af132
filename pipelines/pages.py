"""What pages share: templates, and figures as PNG."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

from saeql.sae.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(template: str, **values: Any) -> str:
    """A template of `templates/`; HTML escapes what it is given."""
    from jinja2 import Environment, PackageLoader

    is_html = template.endswith(".html")
    environment = Environment(
        loader=PackageLoader("saeql.pipelines", "templates"),
        autoescape=is_html,
        trim_blocks=not is_html,
        keep_trailing_newline=not is_html,
    )
    return environment.get_template(template).render(**values)


def new_figure(width: float, height: float, *, of: str) -> "Figure":
    """An empty figure of so many inches. Raises ConfigError, which says what it is `of`, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"the {of}'s plot needs matplotlib: pip install 'saeql[plots]'") from None
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def png(figure: "Figure") -> bytes:
    """The figure, with the legend of its first axes above all of them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(6, len(names)), fontsize=8, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
