"""The benchmark's own kernel checks and its floor: what a card runs first, run here under Triton's interpreter."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import bench_cases
import bench_ceilings
import bench_kernels
import bench_train
import pytest
import torch
from bench_clock import Deadline
from bench_shapes import Shape, parse_shape

from saeql.kernels import sparse_matmul

ROOT = Path(__file__).parent.parent.parent
Main: TypeAlias = Callable[[list[str]], int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    """The script's main function; here without the interpreter, which would take minutes to time."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(bench_kernels, "INTERPRETED", False)
        monkeypatch.setitem(bench_ceilings.SQUARE, "cpu", 64)
        monkeypatch.setitem(bench_ceilings.COPY_BYTES, "cpu", 2**20)
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    yield bench_train.main
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)


def test_every_kernel_passes_its_check_on_every_backend(device: str) -> None:
    shape = Shape(5, 33, 70, 3, 0.0, device)
    lines = list(bench_kernels.check_lines(shape, (torch.float32, torch.bfloat16), Deadline()))
    assert [line for line in lines if not line["passed"]] == []
    for name in bench_kernels.backends(device):
        assert len({line["kernel"] for line in lines if line["backend"] == name}) == 19


def test_the_cases_reach_every_file_of_kernels() -> None:
    text = (ROOT / "scripts" / "bench_cases.py").read_text(encoding="utf-8")
    without_ops = {"launch", "latent_rows", "row_threshold"}
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")} - without_ops
    assert [name for name in sorted(files) if f"kernels.{name} import" not in text] == []


def test_a_wrong_kernel_and_one_that_does_not_run_are_found(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no such image")

    monkeypatch.setattr(bench_cases, "gather_sum", lambda *args: sparse_matmul.gather_sum(*args) * 1.001)
    monkeypatch.setattr(bench_cases, "adam_rows", refuse)
    assert main(["--shapes", "6,16,40,3", "--sections", "check", "--out", str(tmp_path)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("WRONG: ") and "gather_sum (float32, torch)" in last and "adam_rows (float32, torch)" in last
    (file,) = tmp_path.glob("*.json")
    wrong = {line["kernel"] for line in json.loads(file.read_text())[0]["check"] if not line["passed"]}
    assert wrong == {"gather_sum", "adam_rows"}


def test_results_hold_steps_floors_and_kernels(main: Main, tmp_path: Path) -> None:
    common = ["--shapes", "32,16,64,4", "--rounds", "2", "--out", str(tmp_path), "--sections"]
    assert main([*common, "steps"]) == main([*common, "steps", "kernels"]) == 0
    (file,) = tmp_path.glob("*.json")
    first, entry = json.loads(file.read_text())  # appended
    assert "steps" in first and "kernels" not in first
    assert [entry["shape"][name] for name in ("rows", "d_in", "d_sae", "k")] == [32, 16, 64, 4]
    steps = {line["step"]: line for line in entry["steps"]}
    assert next(line for name, line in steps.items() if name.endswith("(the floor)"))["multiple_of_floor"] == 1
    ours, floor = steps["saeql, encoder float32"], entry["arithmetic_floor"]
    assert ours["tokens_per_second"] == pytest.approx(32 / ours["milliseconds"] * 1e3, rel=0.1)
    assert floor["milliseconds"] == pytest.approx(
        sum(floor[part] for part in ("gemm", "pre", "rows", "adam")), abs=1e-3
    )
    kernels = {line["kernel"]: line for line in entry["kernels"] if line["dtype"] == "float32"}
    assert kernels["encode_topk"]["share_of_matmul"] > 0 and len(kernels) == 19
    assert kernels["adam_rows"]["gigabytes"] == round(64 * 16 * 28 / 1e9, 4)


@pytest.mark.parametrize(
    ("shape", "milliseconds"),
    [
        ((4096, 768, 24576, 32), 0.92),
        ((4096, 768, 32768, 32), 1.14),
        ((4096, 2304, 65536, 64), 6.1),
        ((16384, 768, 32768, 32), 3.3),
    ],
)
def test_floor_at_the_rates_of_an_h100(shape: tuple[int, int, int, int], milliseconds: float) -> None:
    """At 800 TFLOP/s and 3.0 TB/s, in bfloat16; Adam then takes 6933 / rows times the matmul."""
    parts = bench_ceilings.floor(Shape(*shape, 0.0, "cuda"), 2, tflops=800.0, copy=3000.0)
    assert parts["milliseconds"] == pytest.approx(milliseconds, rel=0.015)
    assert parts["adam"] / parts["gemm"] == pytest.approx(6933 / shape[0], rel=1e-3)


def test_shapes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--shapes: expected rows,d_in,d_sae,k such as .* got '1,2,3'"):
        parse_shape("1,2,3", 0.0, "cpu")
    with pytest.raises(ValueError, match="k of at most d_sae"):
        parse_shape("4,8,16,17", 0.0, "cpu")
