"""The command line: every command works and is documented, and what a user can mend is one line and exit code 2."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saeql.pipelines.cli import app, main

COMMANDS = sorted(name for name in app if not name.startswith("-"))


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """stdout of a command that succeeds."""
    main([str(a) for a in argv])
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if re.match(r"saeql: ", line)]
    assert caught.value.code == 2
    assert len(lines) == 1 and output.err.splitlines()[-1] == lines[0], output.err
    assert "Traceback" not in output.err and output.out == ""
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    text = run(capsys, command, "--help")
    assert f"Example: saeql {command}" in text


def test_every_command_is_in_the_readme():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert [c for c in COMMANDS if f"saeql {c}" not in readme] == []


def test_help_does_not_import_the_heavy_libraries():
    code = (
        "import sys\nfrom saeql.pipelines.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'duckdb', 'pyarrow', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


def test_opening_a_run_imports_only_what_all_of_its_commands_need():
    code = (
        "import sys, saeql.pipelines.run\nprint(sorted({'scipy.stats', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_show_search_sql_and_steer(tiny_run: Path, capsys: pytest.CaptureFixture[str]):
    card = json.loads(run(capsys, "show", tiny_run, 5, "--json"))
    assert card["feature"] == 5 and len(card["neighbours"]) == 5 and card["logit_effects"]
    assert "feature 5 of topk_96_k4" in run(capsys, "show", tiny_run, 5)
    hits = json.loads(run(capsys, "search", tiny_run, "river", "--json", "--limit", "3"))
    assert 0 < len(hits) <= 3 and all("river" in str(hit["matched"]) for hit in hits)
    assert "river" in run(capsys, "search", tiny_run, "river")
    query = "SELECT feature, label FROM features ORDER BY feature LIMIT 2"
    assert json.loads(run(capsys, "sql", tiny_run, query, "--json"))[1]["feature"] == 1
    assert run(capsys, "sql", tiny_run, query, "--csv").splitlines()[0] == "feature,label"
    assert "feature" in run(capsys, "sql", tiny_run, query)
    shown = json.loads(run(capsys, "steer", tiny_run, "--feature", 5, "--prompt", "The river", "--json"))
    assert shown["texts"][0]["baseline"] and shown["edits"][0]["strength"] == 0.4
    assert shown["edits"][0]["label"] == card["label"]
    for mode in ("add", "ablate"):
        text = run(capsys, "steer", tiny_run, "--feature", 5, "--mode", mode, "--prompt", "The river", "--tokens", 5)
        assert "baseline" in text and f"feature 5, {mode}" in text and card["label"] in text


def test_export_and_import_bring_the_same_dictionary_back(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import torch

    from saeql.pipelines import Run, load_dictionary

    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)) * 3
    with torch.no_grad():
        expected = Run.open(tiny_run).dictionary()(x)
        for name in ("saelens", "sparsify", "dictionary_learning"):
            assert name in run(capsys, "export", tiny_run, tmp_path / name, "--format", name)
            assert "topk autoencoder" in run(capsys, "import", tmp_path / name, tmp_path / f"{name}-back")
            torch.testing.assert_close(load_dictionary(tmp_path / f"{name}-back")(x), expected, rtol=1e-5, atol=1e-5)
    refused = fails(capsys, "export", tiny_run, tmp_path / "x", "--format", "saelen")
    assert "saelens, sparsify, dictionary_learning, a run's store as parquet" in refused
    assert "neither a local folder nor reachable" in fails(capsys, "import", "nobody/nothing", tmp_path / "y")


def test_config_prints_toml_that_can_be_run(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from saeql.pipelines import RunConfig, load_config

    file = tmp_path / "reference.toml"
    file.write_text(run(capsys, "config"))
    assert load_config(file) == RunConfig()
    keys = [line for line in file.read_text().splitlines() if "=" in line and not line.startswith("# (")]
    assert all(before != "# " for before in file.read_text().splitlines()) and len(keys) > 30


BAD_CONFIGS = [
    ({"train.num_step": "3"}, r'unknown key "train.num_step".*did you mean "num_steps"'),
    ({"train.num_steps": "many"}, r'"train.num_steps" must be a whole number'),
    ({"model.name": "/nowhere/model"}, r"no model '/nowhere/model'"),
    ({"model.name": "embedded:smollm"}, r"no embedded model"),
    ({"model.hook_point": "resid_post.7"}, r'no hook point "resid_post.7".*resid_post.0 to resid_post.2'),
    ({"corpus.source": "/nowhere.jsonl"}, r"no corpus at /nowhere.jsonl"),
    ({"harvest.context_tokens": "20000"}, r"too small: no window of 20000 tokens"),
    ({"dictionary.architecture": "topp"}, r'unknown architecture "topp".*did you mean "topk"'),
    ({"dictionary.k": "200"}, r"dictionary.k must lie between 1 and d_sae \(96\)"),
    ({"label.active_fraction": "2.0"}, r"active_fraction must be in \[0, 1\)"),
    ({"corpus.max_tokens": "9000000000000000"}, r"no room for the activations"),
]


def test_evaluate_measures_the_run_and_any_other_dictionary(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from saeql.pipelines import Run

    with Run.open(tiny_run).store() as store:
        stored = {m["metric"]: m for m in store.metrics()}
    run(capsys, "export", tiny_run, tmp_path / "foreign", "--format", "sparsify")
    for dictionary in ("topk_96_k4", tmp_path / "foreign"):
        told = json.loads(run(capsys, "evaluate", tiny_run, "--dictionary", dictionary, "--json"))
        assert told["reads"] == told["writes"] == ["resid_post.1"] and told["split"] == "test"
        metrics = {m.pop("metric"): m for m in told["metrics"]}
        for name in ("fvu", "fvu_all_rows", "l0", "dead_share", "ce_increase", "kl_all_rows", "ce_recovered_zero"):
            for key in ("value", "low", "high", "n"):
                assert metrics[name][key] == pytest.approx(stored[name][key], rel=1e-4, abs=1e-6), (name, key)
        assert sum(b["share"] for b in told["density_histogram"]) == pytest.approx(1 - metrics["dead_share"]["value"])
    assert "no dictionary 'topk_96': neither" in fails(capsys, "evaluate", tiny_run, "--dictionary", "topk_96")
    for options in (("--reads", "resid_post.0"), ("--allow-mismatch",)):
        assert "of another dictionary: name it by --dictionary" in fails(capsys, "evaluate", tiny_run, *options)

    shutil.copytree(tiny_run, tmp_path / "run")
    text = run(capsys, "evaluate", tmp_path / "run")
    assert "topk_96_k4 at resid_post.1" in text and "ce_recovered_zero" in text and "all rows" in text
    assert list(Run.open(tmp_path / "run").finished())[-1] == "evaluate"
    assert {m["metric"] for m in Run.open(tmp_path / "run").evidence.read("metrics").to_pylist()} == stored.keys()


@pytest.mark.parametrize(
    ("overrides", "message"), BAD_CONFIGS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_bad_configurations(
    overrides: dict[str, str], message: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    assert re.search(message, fails(capsys, "run", tiny_config, "--out", tmp_path / "run", *flags))


def test_empty_corpus(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty.txt").write_text(" \n")
    flags = ["--corpus.source", str(tmp_path / "empty.txt")]
    assert "is empty" in fails(capsys, "run", tiny_config, "--out", tmp_path / "run", *flags)


def test_bad_requests_to_a_finished_run(
    tiny_run: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert "no feature 96: its features are 0 to 95" in fails(capsys, "show", tiny_run, 96)
    assert "0 to 95" in fails(capsys, "steer", tiny_run, "--feature", 96, "--prompt", "x")
    assert "no steering mode" in fails(capsys, "steer", tiny_run, "--feature", 6, "--prompt", "x", "--mode", "ad")
    assert "read-only" in fails(capsys, "sql", tiny_run, "DELETE FROM evidence.labels")
    assert "read-only" in fails(capsys, "sql", tiny_run, "CREATE TABLE t AS SELECT 1")
    assert re.search(r'density|"densty"', fails(capsys, "sql", tiny_run, "SELECT densty FROM features"))
    assert "saeql: " in fails(capsys, "sql", tiny_run, "SELEC 1")
    assert "saeql: " in fails(capsys, "search", tiny_run, "river", "--where", "nonsense > 3")
    assert "already holds a run with seed = 3, not 4" in fails(
        capsys, "run", tiny_config, "--out", tiny_run, "--seed", 4
    )
    assert "unexpected argument" in fails(capsys, "run", tiny_config, "stray", "--out", tiny_run)
    assert "no run and no store in" in fails(capsys, "show", tiny_run.parent, 1)
    assert "did you mean" in fails(capsys, "serch", tiny_run, "x").lower()
    assert "requires an argument" in fails(capsys, "steer", tiny_run)
    steer = ("steer", tiny_run, "--feature", 6, "--prompt", "x")
    assert "--tokens 0: at least 1" in fails(capsys, *steer, "--tokens", 0)
    assert "--temperature -1: 0, for the likeliest" in fails(capsys, *steer, "--temperature", -1)
    assert "--repetition-penalty 0: above 0" in fails(capsys, *steer, "--repetition-penalty", 0)
    assert "--top 0: at least 1" in fails(capsys, "steer", tiny_run, "--search", "river", "--prompt", "x", "--top", 0)
    (tmp_path / "empty.txt").write_text("\n \n")
    texts = ("--positive", tmp_path / "empty.txt", "--negative", tmp_path / "empty.txt")
    assert "empty.txt has no text" in fails(capsys, "vector", tiny_run, *texts)


def test_a_directory_with_other_things_in_it_is_left_alone(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "thesis.txt").write_text("important")
    assert "is not empty and holds no run" in fails(capsys, "run", tiny_config, "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_unfinished_runs_say_what_is_missing(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from saeql.pipelines import Run, load_config

    Run.create(tmp_path / "new", load_config(tiny_config))
    assert "saeql" in fails(capsys, "show", tmp_path / "new", 1)
    assert "features.duckdb does not exist" in fails(capsys, "steer", tmp_path / "new", "--feature", 1, "--prompt", "x")
    assert "saeql harvest" in fails(capsys, "train", tmp_path / "new")


def test_a_full_disk_is_one_line(tiny_config: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        command = [sys.executable, "-m", "saeql.pipelines", "run", tiny_config, "--out", disk / "run"]
        result = subprocess.run(command, capture_output=True, text=True)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(r"saeql: .*(no space|No space|no room)", result.stderr.splitlines()[-1])
