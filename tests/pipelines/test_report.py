"""The report: every section with its numbers, hostile text inert, nothing fetched from anywhere."""

import base64
import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from saeql.pipelines.report import (
    Example,
    FeatureDetail,
    LabelledFeature,
    Metric,
    ReportData,
    SqlExample,
    SteeringExample,
    TrainingPoint,
    density_chart,
    duration,
    highlight_levels,
    line_chart,
    number,
    render,
    token_text,
    visible,
    write_report,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "<img onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "</style><b>",
    "{{ 7*7 }}",
    "\u202eevil",
    "\x00\x1b[31m",
    "</div>",
    "\ud800",
]


def _curve(step: int) -> tuple[float, float, float]:
    """(fvu, dead, lr) that look like a training."""
    return 0.24 + 0.76 * math.exp(-step / 300), 0.05 * (1 - math.exp(-step / 900)), 4e-4 * min(1, step / 100)


def sample() -> ReportData:
    rng = np.random.default_rng(0)
    tokens = ["The", " river", " bank", " rose", " by", " 40", " cm", ".", "\n", "Boats", " left", " the", " bank", "."]
    acts = [0, 1.5, 9.25, 0.5, 0, 0, 0, 0, 0, 0, 0, 0, 6.75, 0]
    return ReportData(
        title="SmolLM2-135M, layer 15, demo run",
        facts=[
            ("model", "SmolLM2-135M"),
            ("hook point", "layers.15"),
            ("dictionary", "topk, 4,608 x 576, k = 32"),
            ("tokens trained on", "1,474,560"),
            ("device", "cpu"),
            ("seed", "0"),
        ],
        metrics=[
            Metric(
                "fvu",
                0.2471,
                "Share of the variance that is not rebuilt.",
                "Below 0.3 is good here.",
                36123,
                0.2411,
                0.2533,
            ),
            Metric("l0", 32.0, "Active features a token, on average.", "Equals k.", 36123),
            Metric("ce_recovered", 0.9534, "Share kept after replacing.", "", 8192, 0.948, 0.959, 0.6081, 0.585, 0.636),
            Metric("dead", 0.0174, "Share of features that never fire.", "", 4608),
        ],
        training=[TrainingPoint(s, *_curve(s)) for s in range(0, 3001, 20)],
        densities=np.concatenate([10 ** rng.normal(-2.6, 0.55, 4528).clip(-5, 0), np.zeros(80)]),
        label_counts={"lexical": 1711, "structural": 612, "none": 2285},
        labels=[
            LabelledFeature(17, 'token " bank"', "lexical", 0.9731, 0.951, 0.988, 211, 0.0031),
            LabelledFeature(905, "a number", "structural", 0.8842, 0.861, 0.905, 1304, 0.021),
            LabelledFeature(2044, 'words with stem "walk"', "lexical", 0.9127, None, None, 23, 0.0006),
            LabelledFeature(4001, "unexplained", "none", None, None, None, 57, 0.0016),
        ],
        features=[
            FeatureDetail(
                17,
                'token " bank"',
                [" bank", " banks", "\n"],
                [" quickly", " she"],
                [Example("Thames", tokens, acts), Example("Rhine", tokens, acts)],
            ),
        ],
        rows_left_out=[("first position of a window", 1441), ("norm above 10 x the median", 23)],
        sql=SqlExample(
            "SELECT feature, label, auroc\nFROM labels\nORDER BY auroc DESC LIMIT 2;",
            ["feature", "label", "auroc"],
            [(17, 'token " bank"', 0.9731), (2044, 'words with stem "walk"', 0.9127)],
        ),
        steering=[
            SteeringExample(
                "My favourite place is",
                " a small town in the hills.",
                " the bank of the river,\nwhere boats rest.",
                17,
                'token " bank"',
                6.0,
            )
        ],
        timings=[("harvest", 171.4), ("train", 512.0), ("index", 44.1), ("label", 9.8), ("report", 0.35)],
    )


class _Page(HTMLParser):
    """Tags, attributes and text as a browser would parse them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def hostile() -> ReportData:
    data, h = sample(), HOSTILE
    detail = FeatureDetail(3, h[0], h, h, [Example(h[1], h, [float(i + 1) for i in range(len(h))])])
    return replace(
        data,
        title=h[0],
        facts=[(h[0], x) for x in h],
        metrics=[Metric(h[0], 1.0, h[1], h[2], 3, 0.0, 1.0)],
        label_counts={h[2]: 3},
        labels=[LabelledFeature(i, x, h[2], 0.5, 0.4, 0.6, 3, 0.1) for i, x in enumerate(h)],
        features=[detail],
        rows_left_out=[(h[0], 3)],
        sql=SqlExample(h[0], h, [h]),
        steering=[SteeringExample(h[0], h[1], h[2], 3, h[3], 1.0)],
        timings=[(h[0], 1.0)],
    )


def test_hostile_text_is_inert(tmp_path):
    html = write_report(tmp_path / "report.html", hostile()).read_text(encoding="utf-8")
    page, plain = _Page(html), _Page(render(sample()))
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1
    assert set(page.tags) <= set(plain.tags)  # no tag that the page does not have anyway
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] in ("style", "srcdoc", "action")]
    assert "<script>alert" not in html and "<img" not in html and "49" not in page.text.split("{{")[1][:9]
    assert not re.search("[\x00-\x08\x0b-\x1f\u200e\u200f\u202a-\u202e\u2066-\u2069]", html)
    assert "[U+202E]evil" in page.text and "[U+0000][U+001B][31m" in page.text and "[U+D800]" in page.text
    assert page.text.count("<script>alert(1)</script>") > 8  # shown as text


def test_nothing_is_fetched():
    html = render(sample())
    assert "http:" not in html and "https:" not in html and "//" not in html.replace("://", "")
    page = _Page(html)
    assert not [a for a in page.attributes if a[1] in ("src", "srcset", "data", "poster", "xlink:href")]
    assert all(value.startswith("#") or value == "data:," for _, name, value in page.attributes if name == "href")
    assert "@import" not in html and "url(" not in html


def test_the_policy_allows_this_style_and_this_script_only():
    html = render(sample())
    policy = next(v for tag, name, v in _Page(html).attributes if tag == "meta" and name == "content")
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("style", "script"):
        inner = re.search(f"<{tag}>(.*?)</{tag}>", html, re.S)
        assert inner is not None
        digest = base64.b64encode(hashlib.sha256(inner.group(1).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_all_sections_show_their_numbers():
    text = _Page(render(sample())).text
    for wanted in (
        "SmolLM2-135M, layer 15, demo run",
        "layers.15",
        "0.247", "0.241 to 0.253", "36,123", "Below 0.3 is good here.", "Share of the variance that is not rebuilt.",
        "151 logged steps", "variance unexplained (FVU)", "training step", "share of dead features", "learning rate",
        "80 of 4,608 features never fire", "share of rows on which a feature is active (log scale)",
        "lexical: 1,711 (37.1 %)", "none: 2,285",
        'token " bank"', "0.973", "0.951 to 0.988", "1,304", "unexplained",
        "·banks", "·quickly", "Thames", "Rhine", "↵",
        "ORDER BY auroc DESC LIMIT 2;",
        "2044",
        "My favourite place is", " a small town in the hills.", "where boats rest.", "strength 6.00",
        "1,441", "norm above 10 x the median",
        "8 min 32 s", "350 ms", "12 min 18 s",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_an_empty_run_says_so():
    empty = ReportData("Empty", [], [], [], np.zeros(0), {}, [], [], [])
    text = _Page(render(empty)).text
    for wanted in ("No metrics", "No training curve", "No feature is listed", "No query", "No steering", "No timings"):
        assert wanted in text


def test_tokens_are_coloured_by_their_share_of_the_peak():
    examples = [Example("a", ["x", "y", "z"], [0.0, 5.0, 10.0]), Example("b", ["x"], [float("nan")])]
    assert highlight_levels(examples) == [[0, 5, 10], [0]]
    page = _Page(render(sample()))
    assert ("span", "title", "9.25") in page.attributes and ("span", "class", "t a10") in page.attributes


def test_an_example_needs_one_activation_a_token():
    wrong = replace(sample(), features=[FeatureDetail(5, "x", [], [], [Example("t", ["a", "b"], [1.0])])])
    with pytest.raises(ValueError, match="feature 5"):
        render(wrong)


def test_charts_count_every_feature_and_skip_what_is_not_finite():
    chart = density_chart(np.array([0.0, 1e-4, 1e-3, 0.02, 1.0]))
    assert chart is not None
    assert sum(int(bar[4].split()[0]) for bar in chart.bars) == 4
    assert [text for _, text in chart.x_ticks] == ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"]
    assert density_chart(np.zeros(3)) is None
    line = line_chart([0, 1, 2], [1.0, float("nan"), 0.5], "x", "y")
    assert line is not None and len(line.line.split()) == 2
    assert line_chart([0], [1.0], "x", "y") is None
    constant = line_chart([0, 10], [0.0, 0.0], "x", "y")
    assert constant is not None and "nan" not in constant.line


def test_text_and_numbers():
    assert token_text("\n\t") == "↵⇥" and token_text("  ") == "··" and token_text(" a") == " a"
    assert token_text(" a", True) == "·a"
    assert visible("a\u2066b\u200bc\n") == "a[U+2066]b[U+200B]c\n"
    assert [number(v) for v in (0.25, 1234, 12345.6, 0.00012, 0)] == ["0.250", "1,234", "12,346", "1.20e-04", "0"]
    assert number(None) == number(float("nan")) == "\N{EN DASH}"
    assert [duration(s) for s in (0.2, 12.34, 245)] == ["200 ms", "12.3 s", "4 min 05 s"]


def test_a_failed_write_leaves_the_old_page(tmp_path: Path):
    path = write_report(tmp_path / "deep" / "report.html", sample())
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ValueError):
        write_report(path, replace(sample(), features=[FeatureDetail(1, "", [], [], [Example("", ["a"], [])])]))
    assert path.read_text(encoding="utf-8") == before and len(list(path.parent.iterdir())) == 1
