"""A run that trains straight from the model, by the command line: its whole road, kill and resume, what is refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from saeql.pipelines import STAGES, Run, load_config
from saeql.pipelines.cli import main
from saeql.sae.checkpoint import CheckpointError, checkpoints
from saeql.store.shards import ShardReader

sys.path.insert(0, str(Path(__file__).parent))
from train_processes import settle_copy, torchrun

#: Groups of a fifth of the text or so.
LIVE = {"train.source": "live", "train.shuffle_buffer_bytes": "220000", "train.checkpoint_every_steps": "7",
        "train.num_steps": "150", "harvest.max_train_tokens": "3000"}  # fmt: skip
FLAGS = [text for key, value in LIVE.items() for text in (f"--{key}", value)]


def weights(run: Path) -> bytes:
    return next((run / "dictionaries").glob("*/sae_weights.safetensors")).read_bytes()


@pytest.fixture(scope="module")
def live_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("live") / "run"
    main(["run", str(tiny_config), "--out", str(folder), *FLAGS])
    return folder


def test_the_whole_road_works_on_a_sample_of_the_text(live_run: Path, tiny_run: Path):
    run, stored = Run.open(live_run), Run.open(tiny_run)
    assert list(run.finished()) == list(STAGES)
    rows = {s: ShardReader(run.activations / "resid_post.1" / s).num_rows for s in ("train", "calibration", "test")}
    full = {s: ShardReader(stored.activations / "resid_post.1" / s).num_rows for s in rows}
    assert 2900 < rows["train"] < 3200 < full["train"] / 2
    assert rows["calibration"] == full["calibration"] and rows["test"] == full["test"]
    cursor = json.loads((checkpoints(run.path / "checkpoints")[-1] / "state.json").read_text())["cursors"][0]
    assert cursor["epoch"] >= 1 and cursor["place"]["start"]["num_taken"] * 32 > rows["train"]
    lines = [json.loads(line) for line in (live_run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 150 and lines[-1]["fvu"] < lines[0]["fvu"]
    with run.store() as store, stored.store() as others:
        mine, theirs = ({m["metric"]: m["value"] for m in s.metrics()} for s in (store, others))
        assert store.sql("SELECT count(*) AS n FROM features WHERE kind != 'none'")["n"][0].as_py() > 0
    assert mine["fvu"] < theirs["fvu"] + 0.1  # a dictionary that learned 150 steps against one that learned 60
    steerer = run.steerer()
    assert steerer.generate("The river", []) == steerer.generate("The river", [])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "saeql.pipelines", *arguments]


#: A training that gets SIGKILL as soon as it has made some steps: from outside that moment is a matter of speed.
KILLED = """
import os, signal, sys
from saeql.pipelines import cli
from saeql.sae.trainer import Trainer

learn = Trainer._learn_from

def counted(self, batch):
    learn(self, batch)
    if self.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

Trainer._learn_from = counted
cli.main(["train", sys.argv[1]])
"""


@pytest.mark.parametrize("steps", [9, pytest.param(135, marks=pytest.mark.full)])
def test_a_training_killed_and_resumed_ends_bit_identical(live_run: Path, tmp_path: Path, steps: int):
    folder = shutil.copytree(live_run, tmp_path / "run")
    before = weights(folder)
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "dictionaries")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(steps)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    reached = int(checkpoints(folder / "checkpoints")[-1].name[5:])
    assert reached == steps // 7 * 7 and not (folder / "dictionaries").exists()
    subprocess.run(command("train", str(folder), "--resume"), check=True, capture_output=True)
    assert weights(folder) == before
    logged = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(10, 151, 10))


def test_a_signal_in_the_middle_of_a_group_stops_with_a_checkpoint(live_run: Path, tmp_path: Path):
    folder = settle_copy(live_run, tmp_path / "run", checkpoint_every_steps=1000)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    passes, step = (int(n) for n in re.findall(r"passes (\d+) step (\d+)", out)[0])
    assert passes == 20 and 0 < step < 150 and re.search(r"stopped by SIGTERM at step \d+ of 150", errors)
    assert [int(c.name[5:]) for c in checkpoints(folder / "checkpoints")] == [step]
    subprocess.run(command("train", str(folder), "--resume"), check=True, capture_output=True)
    assert weights(folder) == weights(live_run)


#: A training that gets SIGTERM in its twentieth forward pass, which is not the last of a group.
STOPPED = """
import os, signal, sys
from pathlib import Path
from saeql.pipelines import Run, cli
from saeql.pipelines.forward import ForwardPass
from saeql.sae.checkpoint import checkpoints

passes, run_pass = [], ForwardPass._pass

def counted(self, token_ids):
    passes.append(1)
    if len(passes) == 20:
        os.kill(os.getpid(), signal.SIGTERM)
    return run_pass(self, token_ids)

ForwardPass._pass = counted
sys.argv = ["saeql", "train", sys.argv[1]]
try:
    cli.main()
finally:
    last = checkpoints(Path(sys.argv[2]) / "checkpoints")[-1]
    print("passes", len(passes), "step", int(last.name[5:]))
"""


def test_ranks_read_a_part_of_the_text_each_and_go_on_bit_for_bit(live_run: Path, tmp_path: Path):
    whole, run = (settle_copy(live_run, tmp_path / name, num_steps=60) for name in ("whole", "run"))
    done = torchrun(whole, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((checkpoints(whole / "checkpoints")[-1] / "state.json").read_text())
    places = [cursor["place"] for cursor in state["cursors"]]
    assert [place["part"] for place in places] == [[0, 2], [1, 2]]
    shutil.copytree(whole, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("dictionaries"))
    shutil.rmtree(checkpoints(run / "checkpoints")[-1])  # as if killed after the one before
    done = torchrun(run, 2, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(run) == weights(whole)


def test_a_resume_on_other_text_model_or_windows_is_refused_with_both_values(
    live_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(live_run, tmp_path / "run")
    config, text = (folder / "config.toml"), (folder / "config.toml").read_text()
    for old, new, said in (
        ("max_document_tokens = 6000", "max_document_tokens = 5000",
         "corpus.max_document_tokens = 6000, this run asks for 5000"),
        ("batch_windows = 8\nwindows_per", "batch_windows = 4\nwindows_per",
         "harvest.batch_windows = 8, this run asks for 4"),
        ("seed = 3", "seed = 4", "seed = 3, this run asks for 4"),
        ('source = "live"', 'source = "shards"', "source = live, this run asks for shards"),
    ):  # fmt: skip
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(folder), "--resume"])
        assert stopped.value.code == 2
        assert re.search(f"the checkpoint was trained with (train.)?{re.escape(said)}", capsys.readouterr().err)
    other = shutil.copytree(Run.open(live_run).config.model.name, tmp_path / "model")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("quickly", "slowly"))
    config.write_text(text.replace(Run.open(live_run).config.model.name, str(other)))
    with pytest.raises(SystemExit):
        main(["train", str(folder), "--resume"])
    assert re.search(r"with tokenizer_sha256 \w{16}, the model to train from has \w{16}", capsys.readouterr().err)


def test_a_checkpoint_of_another_revision_is_refused(live_run: Path, tmp_path: Path):
    folder = shutil.copytree(live_run, tmp_path / "run")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("[model]\n", '[model]\nrevision = "v2"\n'))
    with pytest.raises(CheckpointError, match=r"with model\.revision = None, this run asks for v2"):
        Run.open(folder).train(resume=True)


def test_a_sweep_learns_from_one_live_stream(live_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = shutil.copytree(live_run, tmp_path / "run")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("ks = []", "ks = [2, 4]").replace("num_steps = 150", "num_steps = 40"))
    run = Run.open(folder)
    assert len(run.config.sweep.ks) == 2
    main(["train", str(folder), "--sweep"])
    assert "topk_96_k2" in capsys.readouterr().out
    rows = json.loads((folder / "sweep" / "sweep.json").read_text())["dictionaries"]
    assert [row["l0"] for row in rows] == [2, 4] and all(0 < row["fvu"] < 1 for row in rows)


def test_a_truncated_model_gives_the_same_dictionary(live_run: Path, tmp_path: Path):
    config = load_config(live_run / "config.toml", {"model.truncate": "true"})
    run = Run.create(tmp_path / "run", config)
    list(run.execute(("harvest", "train")))
    assert weights(run.path) == weights(live_run)
