"""A label stage that is stopped or killed goes on to the same labels and receipts."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from saeql.pipelines import label, label_parts
from saeql.pipelines.block_sort import count_codes, order_by_code
from saeql.pipelines.context_candidates import _can_reach, _kept, _largest, _left_out
from saeql.pipelines.explainers.predicates import PredicateExplainer
from saeql.pipelines.label_config import LabelConfig
from saeql.pipelines.label_job import LabelOptions, label_run
from saeql.pipelines.label_parts import LABEL_WORK, LabelParts
from saeql.pipelines.run import Run
from saeql.pipelines.split_rows import read_feature_rows

#: `saeql label` of a run that gets a signal as soon as so many parts lie in its folder.
INTERRUPTED = """
import os, signal, sys
from saeql.pipelines import cli, label_parts

run, options, name, parts = sys.argv[1:]
label_parts.LEAST_SECONDS, written, write_whole = 0, [], label_parts.write_whole

def counted(path, content):
    write_whole(path, content)
    written.append(path.name)
    if len(written) == 1 + int(parts):  # the key is the first file
        os.kill(os.getpid(), getattr(signal, name))

label_parts.write_whole = counted
sys.argv[1:] = ["label", run, *options.split()]
cli.main()
"""


def unlabelled(run: Run, path: Path) -> Run:
    copy = Run(Path(shutil.copytree(run.path, path)), run.config)
    for table in ("labels", "receipts"):
        copy.evidence.path(table).unlink()
    return copy


def interrupted(run: Run, name: str, parts: int, options: str = "") -> list[str]:
    """The parts that are left of a label stage that got the signal after so many of them."""
    command = [sys.executable, "-c", INTERRUPTED, str(run.path), options, name, str(parts)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if name == "SIGTERM":
        assert done.returncode == 75, done.stderr
        assert "saeql: stopped by SIGTERM; it goes on from here when it is started again" in done.stderr
    else:
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert "label" not in run.finished()
    return sorted(f.name for f in (run.path / LABEL_WORK).iterdir())


def assert_same(run: Run, other: Run):
    for table in ("labels", "receipts"):
        assert run.evidence.read(table).equals(other.evidence.read(table)), table
    assert not (run.path / LABEL_WORK).exists() and not list(run.path.rglob("*.tmp.*"))


def test_a_stopped_label_stage_goes_on_behind_its_parts(planted: Run, tmp_path: Path, monkeypatch, capsys):
    run = unlabelled(planted, tmp_path / "run")
    left = interrupted(run, "SIGTERM", 4)
    assert [name.split(".")[0] for name in left] == ["candidates", "choices", "key", "receipts", "receipts"]
    assert not run.evidence.has("labels")

    def refuse(*_):
        raise AssertionError("proposed again")

    monkeypatch.setattr(PredicateExplainer, "propose", refuse)
    label_run(run)
    assert_same(run, planted)
    assert "label: going on with 4 parts" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_it_goes_on_after_any_part(name: str, planted: Run, tmp_path: Path):
    for parts in range(1, 10):
        run = unlabelled(planted, tmp_path / f"{parts}")
        assert len(interrupted(run, name, parts)) == 1 + parts
        label_run(run)
        assert_same(run, planted)


@pytest.mark.full
def test_features_asked_for_stay_those_of_the_labels_that_were_there(planted: Run, tmp_path: Path):
    run = Run(Path(shutil.copytree(planted.path, tmp_path / "run")), planted.config)
    whole = Run(Path(shutil.copytree(planted.path, tmp_path / "whole")), planted.config)
    assert "features.json" in interrupted(run, "SIGKILL", 3, "--only unexplained")
    for made in (run, whole):
        label_run(made, LabelOptions(only="unexplained"))
    assert_same(run, whole)


def test_parts_made_of_something_else_or_damaged_are_made_again(planted: Run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(label_parts, "LEAST_SECONDS", 0)
    table, folder, made = pa.table({"a": [1.5, 2.0]}), tmp_path / "parts", []

    def make() -> pa.Table:
        made.append(1)
        return table

    assert LabelParts(folder, "one").table("t", make).equals(table)
    assert LabelParts(folder, "one").table("t", make).equals(table) and len(made) == 1
    (folder / "t.parquet").write_bytes((folder / "t.parquet").read_bytes()[:40])
    assert LabelParts(folder, "one").table("t", make).equals(table) and len(made) == 2
    LabelParts(folder, "two")
    assert not folder.exists()
    keys = {LabelParts.of(planted, only).key for only in (None, "1", "unexplained")}
    copy = Run(Path(shutil.copytree(planted.path, tmp_path / "run")), planted.config)
    assert LabelParts.of(copy, None).key in keys
    windows = copy.evidence.path("windows")
    windows.write_bytes(windows.read_bytes() + b"x")
    assert len(keys) == 3 and LabelParts.of(copy, None).key not in keys


def test_blocks_of_features_have_the_candidates_of_all_at_once(planted: Run, monkeypatch):
    rows = read_feature_rows(planted.evidence, planted.spec.name, active_fraction=0.25)
    explainer = PredicateExplainer(LabelConfig())
    features = list(range(rows.num_features))
    whole = explainer.propose(rows, features, lambda done, total: None)
    monkeypatch.setattr(label, "ACTIVE_AT_ONCE", len(rows.train.active.rows) // 5)
    blocks = label._blocks(explainer, rows, features)
    assert len(blocks) >= 4 and [f for block in blocks for f in block] == features
    parts = [explainer.propose(rows, block, lambda done, total: None) for block in blocks]
    assert {f: own for part in parts for f, own in part.items()} == whole


def test_counts_and_orders_by_blocks_are_those_of_numpy(monkeypatch):
    rng = np.random.default_rng(0)
    for size, num_codes, block in ((0, 7, 4), (5000, 1, 64), (5000, 300, 64), (5000, 2**33, 1 << 15)):
        monkeypatch.setattr("saeql.pipelines.block_sort.BLOCK", block)
        features, codes = np.sort(rng.integers(3, 60, size)), rng.integers(0, num_codes, size)
        expected = np.unique(features * num_codes + codes, return_counts=True)
        assert all(map(np.array_equal, count_codes(features, codes, num_codes), expected))
        assert np.array_equal(order_by_code(features, codes, num_codes), np.lexsort((codes, features)))


def test_sets_that_are_not_looked_for_would_not_have_been_good_enough():
    rng, passed_over, found = np.random.default_rng(1), 0, 0
    for _ in range(400):
        support = rng.integers(1, 60, 40)
        hits = rng.binomial(support, rng.random(40) ** 3)
        positives, f1 = int(hits.sum() + rng.integers(1, 200)), float(rng.uniform(0.1, 0.9))
        whole = float(hits.sum()), float(support.sum())
        for asked, made in (
            (_can_reach(f1, hits, support, positives, (0.0, 0.0), 8), _kept(hits, support, positives, (1, 3, 8), 1)),
            (
                _can_reach(f1, -hits, -support, positives, whole, 8),
                _left_out(hits, support, positives, whole, (3, 8), 1),
            ),
        ):
            best = max((reached for _, reached in made), default=0.0)
            passed_over, found = passed_over + (not asked), found + (best >= f1)
            assert asked or best < f1
    assert passed_over > 100 and found > 100


def test_the_largest_are_the_first_of_equal_ones():
    rng = np.random.default_rng(2)
    for num in (1, 3, 8, 50):
        values = rng.integers(-3, 4, 40).astype(float)
        assert _largest(values, num).tolist() == sorted(np.argsort(-values, kind="stable")[:num].tolist())
