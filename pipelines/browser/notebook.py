"""The card of a feature in Jupyter and marimo, from the same template as its page: what `store.feature(123)` shows.

It stands in a frame of its own that may run nothing: the notebook's style does not reach it, nor its text the notebook.
"""

from functools import cache

from jinja2 import Environment
from markupsafe import escape

from saeql.store.feature_store import FeatureStore

from .feature_page import feature_page
from .rendering import STATIC, environment

HEIGHT = 760


@cache
def _templates() -> Environment:
    return environment(lambda path, **fields: "#")


def feature_html(store: FeatureStore, feature: int, dictionary: str) -> str:
    """HTML of one feature. Raises FeatureNotFound."""
    page = (
        _templates()
        .get_template("notebook.html")
        .render(
            f=feature_page(store, feature, dictionary=dictionary),
            name=dictionary,
            names=[dictionary],
            css=(STATIC / "browser.css").read_text(encoding="utf-8"),
        )
    )
    return (
        f'<iframe sandbox="" srcdoc="{escape(page)}" title="feature {feature}" width="100%" height="{HEIGHT}" '
        'style="border: 0"></iframe>'
    )
