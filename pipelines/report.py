"""The report of a run: one self-contained HTML page, drawn from plain data.

No external request, a strict Content-Security-Policy, charts as inline SVG. All text from models or documents
is escaped by Jinja2, and characters that do not show (control, bidi, line breaks inside tokens) are made visible.
"""

import base64
import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .atomic import write_whole
from .receipts.card import CardLine

HIGHLIGHT_LEVELS = 10
MAX_CHART_POINTS = 400


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


def visible(text: str) -> str:
    """`text` with characters that would not show, or would reorder others, as [U+XXXX]; line breaks and tabs stay."""

    def hidden(c: str) -> bool:
        return c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))

    return "".join(f"[U+{ord(c):04X}]" if hidden(c) else c for c in text)


def token_text(token: str, mark_spaces: bool = False) -> str:
    """One token on one line: line breaks and tabs as arrows; spaces as dots where alone or to be marked."""
    shown = visible(token.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥"))
    if mark_spaces or (token and not token.strip(" \u00a0")):
        shown = shown.replace(" ", "·").replace("\u00a0", "⍽")
    return shown


def number(value: object, digits: int = 3) -> str:
    """A number as people read it: thousands separated, `digits` significant digits; an en dash for None or NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\N{EN DASH}"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if not isinstance(value, (float, np.floating)):
        return str(value)
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def duration(seconds: float) -> str:
    """Seconds as '850 ms', '12.3 s' or '4 min 05 s'."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that cover low..high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class _Chart:
    """Geometry of one chart in a viewBox of `width` x `height`; the plot is `left`..`right` x `top`..`bottom`."""

    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]  # (pixel, text)
    y_ticks: list[tuple[float, str]]
    line: str = ""  # points of a polyline
    bars: list[tuple[float, float, float, float, str]] = field(default_factory=list)  # x, y, width, height, title
    width: int = 960
    height: int = 300
    left: int = 76
    top: int = 14

    @property
    def right(self) -> int:
        return self.width - 34

    @property
    def bottom(self) -> int:
        return self.height - 52

    def x(self, value: float, ticks: Sequence[float]) -> float:
        return round(self.left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (self.right - self.left), 1)

    def y(self, value: float, ticks: Sequence[float]) -> float:
        return round(self.bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (self.bottom - self.top), 1)


def line_chart(
    xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, width: int = 960, height: int = 300
) -> _Chart | None:
    """A curve through the finite points, thinned to `MAX_CHART_POINTS`; None where fewer than two are finite."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return None
    if len(points) > MAX_CHART_POINTS:
        points = [points[i] for i in np.linspace(0, len(points) - 1, MAX_CHART_POINTS).astype(int)]
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), 5 if width > 600 else 3)
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    chart = _Chart(x_label, y_label, [], [], width=width, height=height)
    return _Chart(
        x_label,
        y_label,
        [(chart.x(t, x_ticks), number(round(t) if float(t).is_integer() else t)) for t in x_ticks],
        [(chart.y(t, y_ticks), f"{t:.3g}") for t in y_ticks],
        line=" ".join(f"{chart.x(x, x_ticks)},{chart.y(y, y_ticks)}" for x, y in points),
        width=width,
        height=height,
    )


def density_chart(densities: np.ndarray, bins_per_decade: int = 4) -> _Chart | None:
    """Histogram of log10(density) over the features that fire at all; None where none does."""
    alive = densities[np.isfinite(densities) & (densities > 0)]
    if len(alive) == 0:
        return None
    logs = np.log10(alive)
    low = math.floor(logs.min())
    high = max(math.ceil(logs.max()), low + 1)
    edges = np.linspace(low, high, (high - low) * bins_per_decade + 1)
    counts, _ = np.histogram(logs, edges)
    x_ticks = [float(t) for t in range(low, high + 1)]
    y_ticks = _ticks(0, float(counts.max()))
    chart = _Chart("share of rows on which a feature is active (log scale)", "features", [], [])
    bars = []
    for count, start, end in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        x, top = chart.x(start, x_ticks), chart.y(count, y_ticks)
        title = f"{count:,} features between {number(10.0**start)} and {number(10.0**end)}"
        bars.append((x + 0.5, top, round(chart.x(end, x_ticks) - x - 1, 1), round(chart.bottom - top, 1), title))
    return _Chart(
        chart.x_label,
        chart.y_label,
        [(chart.x(t, x_ticks), "100 %" if t == 0 else f"{10.0 ** (t + 2):g} %") for t in x_ticks],
        [(chart.y(t, y_ticks), number(round(t) if float(t).is_integer() else t)) for t in y_ticks],
        bars=bars,
    )


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
