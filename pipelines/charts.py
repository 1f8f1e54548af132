"""Charts of pages as plain geometry; `templates/chart.html` draws them as inline SVG, styled by classes alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from markupsafe import Markup, escape

from .shown import number, share, visible

MAX_CHART_POINTS = 400


Bar = tuple[float, float, float, float, str]  # x, y, width, height, title


@dataclass(frozen=True)
class Line:
    """A curve: its points as SVG wants them, its class and its name for the legend."""

    points: str
    css: str = "curve"
    name: str = ""


@dataclass(frozen=True)
class Point:
    """A dot in pixels; `low`..`high` an interval as a vertical stroke, `href` where it leads."""

    x: float
    y: float
    title: str
    css: str = "dot"
    low: float | None = None
    high: float | None = None
    href: str = ""


@dataclass(frozen=True)
class Chart:
    """Geometry of one chart in a viewBox of `width` x `height`; the plot is `left`..`right` x `top`..`bottom`."""

    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]  # (pixel, text)
    y_ticks: list[tuple[float, str]]
    line: str = ""  # points of a polyline
    bars: list[Bar] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    dots: list[Point] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)  # vertical strokes: (pixel, what stands there)
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

    @property
    def bars_svg(self) -> Markup:
        """The bars as SVG: a histogram has fifty, and a template takes five times as long for each."""
        return _drawn(tuple(self.bars))

    def x(self, value: float, ticks: Sequence[float]) -> float:
        return round(self.left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (self.right - self.left), 1)

    def y(self, value: float, ticks: Sequence[float]) -> float:
        return round(self.bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (self.bottom - self.top), 1)


@lru_cache(8)  # all features of a dictionary stand before the same density histogram
def _drawn(bars: tuple[Bar, ...]) -> Markup:
    drawn = [
        f'<rect class="bar" x="{x}" y="{y}" width="{width}" height="{height}"><title>{title}</title></rect>'
        for x, y, width, height, title in ((*place, escape(visible(title))) for *place, title in bars)
    ]
    return Markup("\n".join(drawn))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that cover low..high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _tick_text(value: float) -> str:
    return number(round(value)) if float(value).is_integer() else f"{value:.3g}"


def line_chart(
    xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, width: int = 960, height: int = 300
) -> Chart | None:
    """A curve through the finite points, thinned to `MAX_CHART_POINTS`; None where fewer than two are finite."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return None
    if len(points) > MAX_CHART_POINTS:
        points = [points[i] for i in np.linspace(0, len(points) - 1, MAX_CHART_POINTS).astype(int)]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 5 if width > 600 else 3)
    y_ticks = ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    chart = Chart(x_label, y_label, [], [], width=width, height=height)
    return replace(
        chart,
        x_ticks=[(chart.x(t, x_ticks), number(round(t) if float(t).is_integer() else t)) for t in x_ticks],
        y_ticks=[(chart.y(t, y_ticks), f"{t:.3g}") for t in y_ticks],
        line=" ".join(f"{chart.x(x, x_ticks)},{chart.y(y, y_ticks)}" for x, y in points),
    )


def density_bins(densities: np.ndarray, per_decade: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """(counts [n], edges [n + 1] of log10) of the features that fire at all, whole decades; empty where none does."""
    alive = densities[np.isfinite(densities) & (densities > 0)]
    if len(alive) == 0:
        return np.zeros(0, np.int64), np.zeros(0)
    logs = np.log10(alive)
    low = math.floor(logs.min())
    high = max(math.ceil(logs.max()), low + 1)
    return np.histogram(logs, (high - low) * per_decade, (low, high))


def density_chart(
    densities: np.ndarray, bins_per_decade: int = 4, mark: float | None = None, width: int = 960, height: int = 300
) -> Chart | None:
    """Histogram of log10(density) over the features that fire at all, with a stroke at `mark`; None where none does."""
    return bins_chart(density_bins(densities, bins_per_decade), mark, width, height)


def bins_chart(
    bins: tuple[np.ndarray, np.ndarray], mark: float | None = None, width: int = 960, height: int = 300
) -> Chart | None:
    """The chart of `density_bins`."""
    counts, edges = bins
    if len(counts) == 0:
        return None
    low, high = round(edges[0]), round(edges[-1])
    x_ticks = [float(t) for t in range(low, high + 1)]
    chart = Chart(
        "share of rows on which a feature is active (log scale)", "features", [], [], width=width, height=height
    )
    ends = [number(10.0**edge) for edge in edges.tolist()]
    titles = [
        f"{count:,} features between {start} and {end}"
        for count, start, end in zip(counts.tolist(), ends[:-1], ends[1:], strict=True)
    ]
    chart = _with_bars(chart, counts, edges, x_ticks, titles)
    shown = x_ticks[::-1][:: 2 if width < 600 and len(x_ticks) > 6 else 1]  # or they run into each other
    chart = replace(
        chart, x_ticks=[(chart.x(t, x_ticks), "100 %" if t == 0 else f"{10.0 ** (t + 2):g} %") for t in shown[::-1]]
    )
    return with_density(chart, edges, mark)


def with_density(chart: Chart, edges: np.ndarray, mark: float | None) -> Chart:
    """A chart of `bins_chart` with a stroke at a density."""
    ends = [float(round(edges[0])), float(round(edges[-1]))]
    return replace(chart, marks=[(chart.x(math.log10(mark), ends), f"this one: {share(mark)}")] if mark else [])


def histogram_chart(
    counts: np.ndarray,
    edges: np.ndarray,
    x_label: str,
    y_label: str,
    *,
    mark: float | None = None,
    width: int = 470,
    height: int = 240,
) -> Chart | None:
    """Counts [n] of bins between edges [n + 1]; None where nothing was counted."""
    if not len(counts) or not counts.sum():
        return None
    x_ticks = ticks(float(edges[0]), float(edges[-1]), 5 if width > 600 else 4)
    chart = Chart(x_label, y_label, [], [], width=width, height=height)
    ends = [number(edge) for edge in edges.tolist()]
    titles = [
        f"{count:,} {y_label} from {start} to {end}"
        for count, start, end in zip(counts.tolist(), ends[:-1], ends[1:], strict=True)
    ]
    chart = _with_bars(chart, counts, edges, x_ticks, titles)
    marks = [] if mark is None else [(chart.x(mark, x_ticks), number(mark))]
    return replace(chart, x_ticks=[(chart.x(t, x_ticks), _tick_text(t)) for t in x_ticks], marks=marks)


def _with_bars(
    chart: Chart, counts: np.ndarray, edges: np.ndarray, x_ticks: Sequence[float], titles: Sequence[str]
) -> Chart:
    y_ticks = ticks(0, float(counts.max()))
    bars = []
    for count, start, end, title in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), titles, strict=True):
        x, top = chart.x(start, x_ticks), chart.y(count, y_ticks)
        bars.append((x + 0.5, top, round(chart.x(end, x_ticks) - x - 1, 1), round(chart.bottom - top, 1), title))
    return replace(chart, bars=bars, y_ticks=[(chart.y(t, y_ticks), _tick_text(t)) for t in y_ticks])


@dataclass(frozen=True)
class Series:
    """Points of one name, (x, y, low, high, title); joined by a line unless told otherwise."""

    name: str
    points: Sequence[tuple[float, float, float | None, float | None, str]]
    joined: bool = True


def series_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log2_x: bool = False,
    y_from: float | None = 0.0,
    marks: Sequence[tuple[float, str]] = (),
    width: int = 960,
    height: int = 320,
) -> Chart | None:
    """Several named curves with their points and intervals, classes `s0`, `s1`, ...; None where there is no point."""
    scale = math.log2 if log2_x else float
    kept = [
        replace(s, points=[p for p in s.points if math.isfinite(p[1]) and (p[0] > 0 or not log2_x)]) for s in series
    ]
    every = [p for s in kept for p in s.points]
    if not every:
        return None
    ys = [v for p in every for v in p[1:4] if v is not None and math.isfinite(v)]
    xs = [scale(p[0]) for p in every]
    x_ticks = [float(t) for t in range(math.floor(min(xs)), max(math.ceil(max(xs)), math.floor(min(xs)) + 1) + 1)]
    x_ticks = x_ticks if log2_x else ticks(min(xs), max(xs))
    y_ticks = ticks(min(ys) if y_from is None else min(y_from, *ys), max(ys))
    chart = Chart(x_label, y_label, [], [], width=width, height=height)

    def y(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else chart.y(value, y_ticks)

    lines, dots = [], []
    for n, one in enumerate(kept):
        points = [(chart.x(scale(p[0]), x_ticks), chart.y(p[1], y_ticks)) for p in one.points]
        if one.joined and len(points) > 1:
            lines.append(Line(" ".join(f"{px},{py}" for px, py in points), f"curve s{n % 6}", one.name))
        else:
            lines.append(Line("", f"curve s{n % 6}", one.name))
        dots += [
            Point(px, py, p[4], f"dot s{n % 6}", y(p[2]), y(p[3]))
            for (px, py), p in zip(points, one.points, strict=True)
        ]
    return replace(
        chart,
        x_ticks=[(chart.x(t, x_ticks), f"{2.0**t:g}" if log2_x else _tick_text(t)) for t in x_ticks],
        y_ticks=[(chart.y(t, y_ticks), f"{t:.3g}") for t in y_ticks],
        lines=lines,
        dots=dots,
        marks=[(chart.x(scale(at), x_ticks), text) for at, text in marks],
    )


def bar_rows(rows: Sequence[tuple[str, float]], x_label: str, width: int = 960) -> Chart | None:
    """A horizontal bar for every (name, value), from 0; None where there is nothing finite."""
    kept = [(name, value) for name, value in rows if math.isfinite(value)]
    if not kept:
        return None
    values = [value for _, value in kept]
    x_ticks = ticks(min(0.0, *values), max(0.0, *values))
    left = 40 + min(round(7.2 * max(len(name) for name, _ in kept)), 250)
    chart = Chart(x_label, "", [], [], width=width, height=66 + 24 * len(kept), left=left)
    zero, bars, names = chart.x(0.0, x_ticks), [], []
    for n, (name, value) in enumerate(kept):
        end, top = chart.x(value, x_ticks), chart.top + 24.0 * n
        bars.append((min(zero, end), top + 4, max(abs(end - zero), 1.0), 16.0, f"{name}: {number(value)}"))
        names.append((top + 12.0, name if len(name) <= 34 else f"{name[:33]}…"))
    return replace(chart, bars=bars, y_ticks=names, x_ticks=[(chart.x(t, x_ticks), _tick_text(t)) for t in x_ticks])
