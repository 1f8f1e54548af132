"""Training dynamics: fates of features by hand, real checkpoints of a tiny model, a crosscoder that finds a change."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from saeql.pipelines import ModelConfig
from saeql.pipelines.cli import main
from saeql.pipelines.dynamics.fine_tuning import FineTuneError, FineTuning, fine_tune
from saeql.pipelines.dynamics.firing import Contexts, Firing, firing
from saeql.pipelines.dynamics.steps import LEAST_ROWS, step
from saeql.pipelines.harvest import open_source
from saeql.pipelines.run import Run
from saeql.sae.architectures import architecture
from saeql.sae.config import DictionaryConfig

KEYS = ("--dictionary.d_sae", "48", "--train.num_steps", "40")


@pytest.fixture(scope="module")
def checkpoints(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model, and the same after learning one sentence by heart."""
    folder, rng = tmp_path_factory.mktemp("tuned"), random.Random(0)
    text = folder / "new.jsonl"
    lines = [json.dumps({"text": " the music of seven blue stone" * rng.randint(20, 30)}) for _ in range(20)]
    text.write_text("\n".join(lines))
    losses: list[float] = []
    options = FineTuning(steps=40, checkpoints=1, batch_windows=8, context_tokens=32, learning_rate=1e-2)
    made = fine_tune(
        ModelConfig(name=str(tiny_model_folder), dtype="float32"), str(text), folder / "out", options,
        on_step=lambda _step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]
    return made


def dictionary_of(rows: torch.Tensor) -> Any:
    made = architecture("topk")(DictionaryConfig(d_sae=len(rows), k=2), rows.shape[1])
    made.initialise(0)
    with torch.no_grad():
        made.W_dec.copy_(rows)
        made.W_enc.copy_(rows)
    return made


def fires(counts: Sequence[int]) -> Firing:
    return Firing(1000, np.array(counts), np.full((len(counts), 3, 2), -1))


def test_fates_are_told_apart():
    rows = torch.eye(8)[:5]
    later = rows[[1, 0, 2, 3, 4]].clone()  # the first two change places
    later[2] = 0.8 * rows[2] + 0.6 * torch.eye(8)[6]  # drifts
    later[3] = torch.eye(8)[7]  # turns
    before, after = fires([50, 40, 30, 20, 10]), fires([80, 50, 30, 20, LEAST_ROWS - 1])
    found = step(dictionary_of(rows), dictionary_of(later), before, after, cosine=0.7)
    assert found.fate.tolist() == ["kept", "kept", "kept", "turned", "silent"]
    assert found.matching.partner[:2].tolist() == [1, 0] and np.flatnonzero(found.born).tolist() == [3]
    numbers = found.summary(before, after)
    assert numbers["kept"] == 3 and numbers["alive_after"] == 4 and numbers["kept_share"] == 0.6
    assert numbers["cosine_p10"] == pytest.approx(0.84, abs=0.01)
    assert numbers["density_doubled_or_halved"] == pytest.approx(1 / 3)  # 40 -> 80 of the second


def test_firing_counts_rows_and_keeps_the_strongest(tiny_run: Path):
    run = Run.open(tiny_run)
    source = open_source(run.activations, "test", run.harvest_info, run.spec.reads, 512)
    dictionary = run.dictionary()
    found = firing(dictionary, source, examples=2)
    x = torch.cat([batch.acts.float() for batch in source.batches()])
    latents = dictionary.encode(x)
    dense = torch.zeros(len(x), dictionary.d_sae).scatter_add_(1, latents.indices.long(), latents.values).detach()
    assert found.num_rows == len(x) and found.counts.tolist() == (dense > 0).sum(0).tolist()
    f = int(found.counts.argmax())
    batches = list(open_source(run.activations, "test", run.harvest_info, run.spec.reads, 512).batches())
    windows = torch.cat([batch.window_ids.clone() for batch in batches])
    positions = torch.cat([batch.positions.clone() for batch in batches])
    at = int(dense[:, f].argmax())
    assert found.strongest[f, 0].tolist() == [int(windows[at]), int(positions[at])]
    texts = Contexts({4: [1, 10, 11, 12]}, lambda ids: " ".join(map(str, ids))).of([(4, 2), (-1, -1)])
    assert texts == ["10<<11>>"]


def test_checkpoints_are_models_that_learned(checkpoints: list[Path]):
    assert [folder.name for folder in checkpoints] == ["step-0", "step-40"]
    first, last = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in checkpoints)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], last["model.layers.0.mlp.up_proj.weight"])
    config = ModelConfig(name=str(checkpoints[0]), dtype="float32")
    with pytest.raises(FineTuneError, match="is there already"):
        fine_tune(config, str(checkpoints[0].parent.parent / "new.jsonl"), checkpoints[0].parent, FineTuning(steps=1, checkpoints=1))  # fmt: skip  # noqa: E501
    with pytest.raises(FineTuneError, match="do not fit"):
        fine_tune(config, "", checkpoints[0].parent, FineTuning(steps=1, checkpoints=2))


def test_dynamics_from_the_command_line(
    checkpoints: list[Path], tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["dynamics", str(tiny_config), *KEYS, "--out", str(tmp_path / "d"), "--later-steps", "20", "--json"]
    for folder in checkpoints:
        argv += ["--models", str(folder)]
    main(argv)
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoints"] == ["step-0", "step-40"] and list(found["steps"]) == ["step-0 -> step-40"]
    assert list(found["controls"]) == list(found["steps"])
    (moved,), (control,) = found["steps"].values(), found["controls"].values()
    for own in (moved, control):
        assert own["kept"] + own["silent"] + own["turned"] == own["alive_before"] > 10
    assert control["kept_share"] > moved["kept_share"]  # the model changed, training alone moves less
    assert found["survivors"] == [moved["alive_before"], moved["kept"]]
    across, twice = found["crosscoder"]["summary"], found["crosscoder"]["control"]
    assert across["base_only"] + across["tuned_only"] + across["shared"] == across["alive"]
    assert across["share_p95"] - across["share_p5"] > twice["share_p95"] - twice["share_p5"]
    assert across["shared_cosine_median"] < twice["shared_cosine_median"]
    rows = pq.read_table(tmp_path / "d" / "features.parquet").to_pylist()
    assert sum(row["born"] for row in rows) == moved["born"]
    kept = next(row for row in rows if row["fate"] == "kept")
    after = next(row for row in rows if row["checkpoint"] == "step-40" and row["feature"] == kept["partner"])
    assert after["lineage"] == kept["lineage"] and after["density"] == kept["density_after"] and kept["examples"]
    assert (tmp_path / "d" / "dynamics.png").read_bytes()[:4] == b"\x89PNG"
    started = Run.open(tmp_path / "d" / "checkpoints" / "step-40").config.dictionary.start_from
    assert started == str(Run.open(tmp_path / "d" / "checkpoints" / "step-0").dictionary_path.absolute())
    main([*argv, "--no-crosscoder"])  # finished runs are taken as they are
    assert json.loads(capsys.readouterr().out)["steps"] == found["steps"]


def test_a_control_differs_from_its_step_in_the_model_alone(
    checkpoints: list[Path], tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Where the model does not change, step and control are one training; where it does, they are not."""

    def followed(out: str, models: Sequence[Path], *more: str) -> None:
        named = [part for folder in models for part in ("--models", str(folder))]
        main(["dynamics", str(tiny_config), *KEYS, *named, "--out", str(tmp_path / out), "--no-crosscoder", *more])

    first, last = checkpoints
    followed("d", (first, last, last), "--later-steps", "10", "--json")
    found = json.loads(capsys.readouterr().out)
    changes, same = found["steps"]
    assert (changes, same) == ("0-step-0 -> 1-step-40", "1-step-40 -> 2-step-40")
    assert found["steps"][same] == found["controls"][same]
    assert found["steps"][changes] != found["controls"][changes]
    for name in ("0-step-0", "1-step-40"):
        own, control = (Run.open(tmp_path / "d" / folder / name) for folder in ("checkpoints", "controls"))
        assert control.config.dictionary.start_from == str(own.dictionary_path.absolute())
        assert control.config.model == own.config.model and control.config.train.num_steps == 10
    followed("anew", (last, last), "--start", "scratch")
    assert "control: 0-step-40 again" in capsys.readouterr().out
    anew = json.loads((tmp_path / "anew" / "dynamics.json").read_text(encoding="utf-8"))
    (step,), (control,) = anew["steps"].values(), anew["controls"].values()
    assert step["kept"] == step["alive_before"] > control["kept"]  # one model: one seed is one dictionary, two are not


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "at least two checkpoints"),
        (["--models", "b", "--start", "middle"], "not from 'middle'"),
        (["--models", "b", "--cosine", "2"], "above 0 and at most 1"),
        (["--models", "b", "--dictionary.form", "crosscoder"], "follows an autoencoder"),
    ],
)
def test_wrong_options_are_one_line(
    tiny_config: Path, tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        main(["dynamics", str(tiny_config), "--models", "a", "--out", str(tmp_path), *more])
    assert caught.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.full
def test_what_fine_tuning_changes_in_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """SmolLM2-135M on text that it has not seen, this project's own pages, for a few hundred steps."""
    pages = Path(__file__).parents[2] / "docs"
    options = FineTuning(steps=200, checkpoints=2, batch_windows=2, context_tokens=64, learning_rate=1e-4)
    made = fine_tune(ModelConfig(), str(pages), tmp_path / "tuned", options)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[corpus]\nsource = "{pages}"\nmax_tokens = 40000\n[harvest]\ncontext_tokens = 64\n'
        "[dictionary]\nd_sae = 1024\nk = 16\n[train]\nnum_steps = 300\nbatch_tokens = 512\ninit_tokens = 4096\n"
    )
    models = [part for folder in made for part in ("--models", str(folder))]
    main(["dynamics", str(recipe), *models, "--out", str(tmp_path / "d"), "--later-steps", "150", "--json"])
    found = json.loads(capsys.readouterr().out)
    steps, controls = found["steps"], found["controls"]
    assert all(own["cosine_median"] < controls[name]["cosine_median"] for name, own in steps.items())
    first = next(iter(steps))  # later the model moves less: kept shares of step and control are a feature apart
    assert steps[first]["kept_share"] < controls[first]["kept_share"]
    assert found["survivors"][0] > found["survivors"][2]
    across = found["crosscoder"]
    assert across["summary"]["shared_cosine_median"] < across["control"]["shared_cosine_median"]
