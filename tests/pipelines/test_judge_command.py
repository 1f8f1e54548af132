"""`saeql judge`: labels of a finished run through a judge, what it would cost, and errors of one line."""

import json
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from saeql.pipelines.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from endpoint_server import EndpointServer, Reply, said


def always_yes(body: dict, n: int) -> Reply:
    if "response_format" in body:
        return said('{"word": "k7qz"}')
    return said("Yes" if body["max_tokens"] < 10 else "some words", likeliest=[("Yes", -0.1)], tokens=(100, 2))


@pytest.fixture(scope="module")
def server():
    with EndpointServer(always_yes) as running:
        yield running


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def judge(run: Path, *argv: object) -> None:
    main(["judge", str(run), "--label.num_examples", "4", "--label.min_active_rows", "2", *map(str, argv)])


def test_estimate_asks_nothing_but_what_the_endpoint_can(tiny_run, server, capsys):
    before = len(server.questions)
    prices = ["--judge.price_per_million_in", "2.5", "--judge.price_per_million_out", "10.0"]
    judge(tiny_run, "--judge.base_url", server.url, "--sample", 2, "--estimate", *prices)
    out = capsys.readouterr().out
    assert len(server.questions) == before + 2
    assert re.search(r"judge +m at http://127", out) and "probabilities: yes, JSON schema: yes" in out
    assert re.search(r"tokens +about [\d,]+ in \(a token for 4 bytes\), at most [\d,]+ out", out)
    judge(tiny_run, "--judge.base_url", server.url, "--sample", 2, "--estimate", "--json", *prices)
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] > 0 == found["known"] and found["cap"] == 2_000_000
    sent, received = found["prompt_tokens"], found["completion_tokens"]
    assert found["price"] == pytest.approx((2.5 * sent + 10 * received) / 1e6)


def test_labels_and_proposals_are_scored_and_the_run_stays_as_it_is(tiny_run, server, capsys):
    files = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file()}
    asked = ["--judge.base_url", server.url, "--sample", 2, "--scorers", "fuzzing", "--explainers", "word_list"]
    before = len(server.questions)
    judge(tiny_run, *asked, "--json")
    output = capsys.readouterr()
    rows = json.loads(output.out)
    assert {row["explainer"] for row in rows} == {"predicates", "word_list m"} and len(rows) == 4
    for row in rows:
        score = row["scores"]["fuzzing"]
        assert (
            score["auroc"] == 0.5 and score["failed"] == 0 and score["n_active"] > 0
        )  # who always says yes knows nothing
    assert re.search(r"saeql: [\d,]+ questions asked, \d+ known from before, 0 failed; [\d,]+ tokens in", output.err)
    num = len(server.questions) - before
    judge(tiny_run, *asked)
    assert len(server.questions) == before + num  # all of it is known by now
    assert "some words" in capsys.readouterr().out
    judge(tiny_run, *asked, "--estimate", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt_tokens"], found["price"]) != (0, 0)
    assert {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file()} == files


def test_labels_in_words_are_written_by_the_label_stage(tiny_run, server, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = pq.read_table(run / "evidence" / "labels.parquet").to_pylist()
    active = [row["feature"] for row in before if row["n_active"] > 20][:2]
    words = ["--explainer", "word_list", "--label.scorer", "fuzzing", "--label.min_auroc", "0.4"]
    main(["label", str(run), "--receipts", "none", "--only", ",".join(map(str, active)), *words,
          "--judge.base_url", server.url, "--label.min_active_rows", "2", "--label.num_examples", "4"])  # fmt: skip
    after = pq.read_table(run / "evidence" / "labels.parquet").to_pylist()
    for feature, row in enumerate(after):
        if feature in active:
            assert (row["label"], row["kind"], row["explainer"]) == ("some words", "semantic", "word_list m")
            assert row["auroc"] == 0.5  # an honest score of a judge that always says yes
        else:
            assert row["label"] == before[feature]["label"]


def test_a_local_judge_whose_context_is_too_short_fails_every_question(tiny_run, capsys):
    from saeql.pipelines import Run

    model = Run.open(tiny_run).config.model.name
    judge(tiny_run, "--judge.local", model, "--sample", 1, "--scorers", "detection", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    score = row["scores"]["detection"]
    assert score["failed"] == score["n_active"] + score["n_inactive"] and score["auroc"] == 0  # wrong, not left out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "this needs a language model: set judge.base_url"),
        (["--judge.base_url", "nowhere"], 'judge.base_url must look like "http'),
        (["--judge.base_url", "http://127.0.0.1:9/v1"], "no connection"),
        (["--judge.base_url", "http://127.0.0.1:9/v1", "--judge.api_key_env", "NO_SUCH_KEY"], "NO_SUCH_KEY, which is"),
        (["--judge.local", "embedded:other"], "no embedded model 'embedded:other'"),
        (["--judge.base_url", "SERVER", "--scorers", "detektion"], "no scorer 'detektion'"),
        (["--judge.base_url", "SERVER", "--explainers", "words"], "no explainer 'words'"),
        (["--judge.base_url", "SERVER", "--features", "9999"], "no feature 9999: the dictionary has 0 to 95"),
        (["--judge.base_url", "SERVER", "--model.name", "other"], "--model.name cannot be set here"),
        (["--judge.base_url", "SERVER", "--judge.max_total_tokens", "30"], "judge.max_total_tokens = 30 is too small"),
    ],
)
def test_what_a_user_can_mend_is_one_line(argv, line, tiny_run, server, capsys):
    with pytest.raises(SystemExit) as caught:
        judge(tiny_run, "--sample", 1, *[server.url if a == "SERVER" else a for a in argv])
    error = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and line in error and len(error.splitlines()) == 1, error
