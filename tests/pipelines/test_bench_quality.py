"""The quality benchmark trains what `saeql train` trains and scores what `saeql evaluate` scores."""

import importlib.util
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from saeql.pipelines import Run

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_quality.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_quality", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_quality"] = module
    spec.loader.exec_module(module)
    return module


def test_trains_and_scores_as_the_run_itself_does(bench, tiny_run: Path, tmp_path: Path):
    run = Run.open(tiny_run)
    before = sorted((p, p.stat().st_mtime_ns) for p in tiny_run.rglob("*"))
    training = bench.our_training(run, "topk", run.config.seed, num_steps=None, lr=None, matmul_dtype="float32")
    result = bench.run_once(run, tmp_path, training)
    evaluated = {row["metric"]: row["value"] for row in run.evidence.read("metrics").to_pylist()}
    for metric in ("fvu", "l0", "dead_share"):
        assert result[metric] == pytest.approx(evaluated[metric], rel=1e-5)
    assert result["own_fvu"] == pytest.approx(evaluated["fvu"], rel=1e-5)
    assert sorted((p, p.stat().st_mtime_ns) for p in tiny_run.rglob("*")) == before


def test_a_training_that_is_there_is_not_repeated(bench, tiny_run: Path, tmp_path: Path):
    run = Run.open(tiny_run)
    training = bench.our_training(run, "batchtopk", 1, num_steps=3, lr=None, matmul_dtype="float32")
    assert bench.run_once(run, tmp_path, training) == bench.run_once(run, tmp_path, training)
    assert len(bench.load_results(tmp_path)) == 1


def test_saelens_is_given_the_rows_of_our_trainer_after_those_of_its_scale(bench, tiny_run: Path):
    run = Run.open(tiny_run)
    rows, num_for_scale = bench.rows_for_saelens(run, seed=3)
    assert num_for_scale == 4  # init_tokens 512 in batches of 128
    given = list(islice(rows, num_for_scale + 6))
    source = bench.kept_rows(run, "train", 128, shuffle_seed=3, block_rows=64, buffer_bytes=1_000_000_000)
    expected = [batch.acts.float() for batch in islice(source.batches(), 6)]
    for mine, theirs in zip(given, [*expected[:num_for_scale], *expected], strict=True):
        assert torch.equal(mine, theirs)


def test_means_are_taken_over_seeds_only(bench):
    def result(lr: float, seed: int, fvu: float) -> dict:
        return {"training": {"lr": lr, "seed": seed}, "fvu": fvu, "l0": 4.0, "dead_share": 0.0, "cpu_seconds": 1.0}

    rows = bench.summarise([result(1e-3, 1, 0.4), result(1e-3, 0, 0.2), result(2e-3, 0, 0.5)])
    assert [(row["lr"], row["seeds"], row["fvu_by_seed"]) for row in rows] == [
        (1e-3, [0, 1], [0.2, 0.4]),
        (2e-3, [0], [0.5]),
    ]
    assert [row["fvu"] for row in rows] == pytest.approx([0.3, 0.5])
