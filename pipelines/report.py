"""The report of a run: one self-contained HTML page, drawn from plain data.

No external request, a strict Content-Security-Policy, charts as inline SVG. All text from models or documents
is escaped by Jinja2, and characters that do not show (control, bidi, line breaks inside tokens) are made visible.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .atomic import write_whole
from .charts import density_chart, line_chart
from .receipts.card import CardLine
from .shown import number, token_text, visible

HIGHLIGHT_LEVELS = 10


@dataclass(frozen=True)
class Metric:
    """One number of the run with what it means, and the same over all rows, those counted in that are else left out.

    `low`..`high` are 95 % intervals; None where there is none.
    """

    name: str
    value: float | None
    definition: str
    hint: str = ""
    n: int | None = None
    low: float | None = None
    high: float | None = None
    all_rows: float | None = None
    all_rows_low: float | None = None
    all_rows_high: float | None = None


@dataclass(frozen=True)
class TrainingPoint:
    """One logged step. `fvu`: fraction of variance unexplained; `dead`: share of the features, in [0, 1]."""

    step: int
    fvu: float
    dead: float
    lr: float


@dataclass(frozen=True)
class LabelledFeature:
    """One row of the label table. `density`: share of the rows on which the feature is active."""

    feature: int
    label: str
    kind: str
    auroc: float | None
    low: float | None
    high: float | None
    n_active: int
    density: float


@dataclass(frozen=True)
class Example:
    """A stretch of text. `activations` has one value a token, 0 where the feature is silent."""

    title: str
    tokens: Sequence[str]
    activations: Sequence[float]


@dataclass(frozen=True)
class FeatureDetail:
    """A feature shown in full. `promoted`, `suppressed`: tokens it makes more and less likely, strongest first."""

    feature: int
    label: str
    promoted: Sequence[str]
    suppressed: Sequence[str]
    examples: Sequence[Example]
    card: Sequence[CardLine] = ()
    """What its receipts say."""
    by_token: bool = True
    """Whether a single token may be highlighted: not where its activation does not hang on the token."""


@dataclass(frozen=True)
class SqlExample:
    """A query that was run on the store and what it returned."""

    query: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class SteeringExample:
    """One prompt continued twice: as the model is, and with `strength` of the feature's direction added."""

    prompt: str
    baseline: str
    steered: str
    feature: int
    label: str
    strength: float


@dataclass(frozen=True)
class ReportData:
    """All that the page shows. Empty parts say so on the page; nothing is left out silently."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Run facts: (name, value)."""
    metrics: Sequence[Metric]
    training: Sequence[TrainingPoint]
    densities: np.ndarray
    """[F] share of the rows on which each feature is active; 0 = never."""
    label_counts: Mapping[str, int]
    """Features by label kind, 'none' included."""
    labels: Sequence[LabelledFeature]
    features: Sequence[FeatureDetail]
    rows_left_out: Sequence[tuple[str, int]]
    """(reason, rows)."""
    sql: SqlExample | None = None
    steering: Sequence[SteeringExample] = field(default_factory=tuple)
    timings: Sequence[tuple[str, float]] = field(default_factory=tuple)
    """(stage, seconds)."""
    headline: str = ""
    """What the controls allow to say of the labels."""
    controls: Sequence[CardLine] = ()
    """Controls of the dictionary as a whole."""


def duration(seconds: float) -> str:
    """Seconds as '850 ms', '12.3 s' or '4 min 05 s'."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def highlight_levels(examples: Sequence[Example]) -> list[list[int]]:
    """Per example and token 0 (silent) .. `HIGHLIGHT_LEVELS`, as a share of the largest activation in `examples`."""
    finite = [[a if math.isfinite(a) and a > 0 else 0.0 for a in e.activations] for e in examples]
    peak = max((a for row in finite for a in row), default=0.0)
    return [[math.ceil(a / peak * HIGHLIGHT_LEVELS) if peak else 0 for a in row] for row in finite]


def _csp_hash(content: str) -> Markup:
    digest = hashlib.sha256(str(content).encode()).digest()
    return Markup("'sha256-{}'").format(Markup(base64.b64encode(digest).decode()))


def _finalize(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def render(data: ReportData) -> str:
    """The page as text. Raises ValueError where an example has not one activation a token."""
    for detail in data.features:
        for example in detail.examples:
            if len(example.tokens) != len(example.activations):
                raise ValueError(
                    f"feature {detail.feature}: an example of {len(example.tokens)} tokens "
                    f"has {len(example.activations)} activations"
                )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "token": token_text, "duration": duration, "csp_hash": _csp_hash}
    steps = [p.step for p in data.training]
    charts = {
        "fvu": line_chart(steps, [p.fvu for p in data.training], "training step", "variance unexplained (FVU)"),
        "dead": line_chart(steps, [p.dead for p in data.training], "training step", "share of dead features", 470, 240),
        "lr": line_chart(steps, [p.lr for p in data.training], "training step", "learning rate", 470, 240),
        "density": density_chart(np.asarray(data.densities, np.float64)),
    }
    return environment.get_template("report.html").render(
        data=data,
        charts=charts,
        num_features=len(data.densities),
        num_dead=int(np.count_nonzero(np.asarray(data.densities) <= 0)),
        levels=[highlight_levels(detail.examples) for detail in data.features],
        highlight_levels=HIGHLIGHT_LEVELS,
    )


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the page, whole or not at all, and return its path. Raises ValueError as `render` does."""
    path = Path(path)
    text = render(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, text)
