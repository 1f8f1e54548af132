"""Transcoders, crosscoders and sweeps through the whole pipeline, on one harvest of several hook points."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from saeql.pipelines import Edit, Run, capture, load_config, load_dictionary
from saeql.pipelines.pareto import advise, pareto
from saeql.pipelines.sweep import run_sweep
from saeql.sae.config import ConfigError

TWO_PLACES = {"model.more_hook_points": '["mlp_out.1", "resid_post.0"]', "train.num_steps": "150"}
MLP = {"dictionary.reads": '["resid_post.0"]', "dictionary.writes": '["mlp_out.1"]'}


@pytest.fixture(scope="module")
def harvested(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which only the harvest is done, at three hook points."""
    run = Run.create(tmp_path_factory.mktemp("forms") / "run", load_config(tiny_config, TWO_PLACES))
    list(run.execute(("harvest",)))
    return run.path


def finished(harvested: Path, tiny_config: Path, folder: Path, overrides: dict[str, str]) -> Run:
    """A run of another dictionary on a copy of the same harvest."""
    run = Run.create(folder / "run", load_config(tiny_config, {**TWO_PLACES, **overrides}))
    for name in ("activations", "evidence", "stages.json"):
        source = harvested / name
        shutil.copytree(source, run.path / name) if source.is_dir() else shutil.copy(source, run.path / name)
    list(run.execute())
    return run


def test_one_pass_reads_every_hook_point(harvested: Path):
    run = Run.open(harvested)
    window = run.evidence.read("windows", split="test").to_pylist()[0]["token_ids"]
    with torch.no_grad(), capture(run.language_model.model, list(run.config.model.hook_points)) as reader:
        expected = reader.run(torch.tensor([window]))
    from saeql.store.shards import ShardReader

    for name in ("resid_post.1", "mlp_out.1", "resid_post.0"):
        stored = torch.from_numpy(ShardReader(harvested / "activations" / name / "test").rows(0, 0, 32).copy())
        torch.testing.assert_close(stored, expected[name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["transcoder", "skip_transcoder"])
def test_a_transcoder_runs_end_to_end(form: str, harvested: Path, tiny_config: Path, tmp_path: Path):
    run = finished(harvested, tiny_config, tmp_path, {**MLP, "dictionary.form": form})
    with run.store() as store:
        metrics = {m["metric"]: m["value"] for m in store.metrics()}
        assert store.dictionaries()[0]["hook_point"] == "resid_post.0"
    assert metrics["fvu"] < 1 and "ce_recovered" in metrics
    config = json.loads((run.dictionary_path / "cfg.json").read_text())
    assert config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out" and config["d_out"] == 32
    steerer = run.steerer()
    assert steerer.generate("The river", [Edit(3, "add", 0.5)])
    with pytest.raises(ValueError, match="use add"):
        steerer.generate("The river", [Edit(3, "ablate")])


def test_a_crosscoder_runs_end_to_end(harvested: Path, tiny_config: Path, tmp_path: Path):
    places = {"dictionary.form": "crosscoder", "dictionary.reads": '["resid_post.1", "mlp_out.1"]'}
    run = finished(harvested, tiny_config, tmp_path, places)
    dictionary = run.dictionary()
    assert (dictionary.d_in, dictionary.d_out) == (64, 64)
    with run.store() as store:
        metrics = {m["metric"]: m["value"] for m in store.metrics()}
    assert metrics["fvu"] < 1 and {"fvu@resid_post.1", "fvu@mlp_out.1", "ce_increase"} < metrics.keys()
    # layer 1 ends in resid_post.1, which is put in place of whatever mlp_out.1 had led to
    assert metrics["ce_increase"] == metrics["ce_increase@resid_post.1"] != metrics["ce_increase@mlp_out.1"]
    steerer = run.steerer()
    ids, row = torch.tensor([[1, 5, 9, 11]]), dictionary.W_dec[3].detach()
    with torch.no_grad(), capture(run.language_model.model, ["mlp_out.1"]) as reader:
        base = reader.run(ids)["mlp_out.1"]
    edits = steerer.applied([Edit(3, "add", 0.5)])
    with edits, torch.no_grad(), capture(run.language_model.model, ["mlp_out.1"]) as reader:
        moved = reader.run(ids)["mlp_out.1"] - base
    direction = row[32:] / row[32:].norm()
    expected = 0.5 * steerer.median_norms["mlp_out.1"] * direction
    torch.testing.assert_close(moved[0, 0], expected, rtol=1e-3, atol=1e-4)


def test_fine_tuning_starts_where_the_other_training_ended(harvested: Path, tiny_config: Path, tmp_path: Path):
    run = finished(harvested, tiny_config, tmp_path / "first", {})
    start = {"dictionary.start_from": str(run.dictionary_path), "train.warmup_steps": "0"}
    tuned = Run.create(tmp_path / "tuned", load_config(tiny_config, {**TWO_PLACES, **start, "train.lr": "1e-9"}))
    shutil.copytree(harvested / "activations", tuned.path / "activations")
    tuned.train()
    before, after = run.dictionary(), tuned.dictionary()
    torch.testing.assert_close(after.W_dec, before.W_dec, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.b_enc, before.b_enc, rtol=1e-3, atol=1e-4)
    first = json.loads((tuned.path / "metrics.jsonl").read_text().splitlines()[0])["fvu"]
    last = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["fvu"]
    assert first == pytest.approx(last, rel=0.1)
    other = load_config(tiny_config, {**TWO_PLACES, **start, "dictionary.k": "5"})
    refused = Run.create(tmp_path / "refused", other)
    shutil.copytree(harvested / "activations", refused.path / "activations")
    with pytest.raises(ConfigError, match="has k 4, this asks for 5"):
        refused.train()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dictionary.form": "transcoder"}, r"dictionary\.writes must name one hook point"),
        ({"dictionary.writes": '["mlp_out.1"]'}, "writes what it reads"),
        ({"dictionary.reads": '["mlp_out.2"]'}, r"'mlp_out\.2', which is not harvested.*did you mean"),
        ({"dictionary.reads": '["mlp_out.1", "resid_post.0"]'}, "must name one hook point for form autoencoder"),
        ({"dictionary.form": "transcode"}, r"dictionary\.form must be one of.*did you mean"),
    ],
)
def test_places_that_do_not_fit_are_refused_at_once(
    overrides: dict[str, str], message: str, tiny_config: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        Run.create(tmp_path / "run", load_config(tiny_config, {**TWO_PLACES, **overrides}))


def test_a_sweep_trains_everything_on_one_stream_and_advises(harvested: Path, tiny_config: Path, tmp_path: Path):
    sweep = {
        "sweep.architectures": '["topk", "batchtopk", "jumprelu"]',
        "sweep.ks": "[2, 8]",
        "sweep.target_l0s": "[4.0]",
        "sweep.hook_points": '["resid_post.1", "resid_post.0"]',
    }
    run = Run.create(tmp_path / "run", load_config(tiny_config, {**TWO_PLACES, **sweep}))
    shutil.copytree(harvested / "activations", run.path / "activations")
    rows = run_sweep(run)
    assert len(rows) == 10 and len({row["dictionary"] for row in rows}) == 10
    exact = {row["dictionary"]: row["l0"] for row in rows if row["architecture"] == "topk"}
    assert all(l0 <= int(name.split("_k")[1].split("_")[0]) for name, l0 in exact.items())
    for name in ("sweep.json", "sweep.html", "sweep.png"):
        assert (run.path / "sweep" / name).stat().st_size > 1000
    summary = json.loads((run.path / "sweep" / "sweep.json").read_text())
    advised = {advice["hook_point"]: advice["dictionary"] for advice in summary["advice"]}
    places = {row["dictionary"]: row["hook_point"] for row in rows}
    assert set(advised) == {"resid_post.0", "resid_post.1"}
    assert all(places[dictionary] == place for place, dictionary in advised.items())
    assert all(row["train_seconds"] > 0 and row["step_ms"] > 0 for row in rows)


def test_a_dictionary_of_a_sweep_is_the_one_that_is_trained_alone(harvested: Path, tiny_config: Path, tmp_path: Path):
    run = Run.create(tmp_path / "run", load_config(tiny_config, {**TWO_PLACES, "sweep.ks": "[2, 8]"}))
    shutil.copytree(harvested / "activations", run.path / "activations")
    run_sweep(run)
    alone = Run.create(tmp_path / "alone", load_config(tiny_config, {**TWO_PLACES, "dictionary.k": "8"}))
    shutil.copytree(harvested / "activations", alone.path / "activations")
    got = load_dictionary(run.path / "sweep" / "dictionaries" / "topk_96_k8")
    alone.train()
    assert torch.equal(got.W_dec, alone.dictionary().W_dec)


def test_a_sweep_of_one_is_refused(harvested: Path):
    with pytest.raises(ConfigError, match="names nothing that varies"):
        run_sweep(Run.open(harvested))


def row(l0: float, fvu: float, dead: float = 0.0, **more) -> dict:
    return {"dictionary": f"{l0:g}", "hook_point": "here", "l0": l0, "fvu": fvu, "dead_share": dead, **more}


def advised(rows: list[dict]) -> str:
    (advice,) = advise(rows)
    return advice["dictionary"]


def test_the_front_holds_what_nothing_beats():
    rows = [row(8, 0.5), row(16, 0.4), row(16, 0.45), row(20, 0.42), row(32, 0.3)]
    assert [r["dictionary"] for r in pareto(rows)] == ["8", "16", "32"]


def test_advice_stops_where_more_l0_no_longer_pays():
    rows = [row(8, 0.5), row(16, 0.3), row(32, 0.2), row(64, 0.19), row(128, 0.185)]
    assert advised(rows) == "32"
    assert "a further one only explains 1.0% more" in advise(rows)[0]["reason"]
    assert "larger one may pay" in advise(rows[:3])[0]["reason"]
    assert advised([*rows, row(24, 0.1, dead=0.5)]) == "32"
    assert advised([row(16, 0.3), row(32, 0.29)]) == "16"
    assert advise([row(0, 1.0)])[0]["dictionary"] == ""


def test_advice_is_not_led_astray_by_equal_l0_or_one_bad_dictionary():
    crowded = [row(15.9, 0.3), row(16, 0.25), row(31.9, 0.21), row(32, 0.2), row(64, 0.16), row(128, 0.155)]
    assert advised(crowded) == "64"
    bad_middle = [row(8, 0.5), row(16, 0.495), row(32, 0.3), row(64, 0.295)]
    assert advised(bad_middle) == "32"


def test_advice_goes_by_cross_entropy_where_it_was_measured():
    rows = [
        row(16, 0.3, ce_recovered=0.95, ce_increase=0.3),
        row(32, 0.25, ce_recovered=0.98, ce_increase=0.12),
        row(64, 0.15, ce_recovered=0.985, ce_increase=0.09),
    ]
    assert advised(rows) == "32"
    assert "only wins back 0.5% of the cross-entropy" in advise(rows)[0]["reason"]


def test_every_hook_point_gets_its_own_advice():
    rows = [row(16, 0.3), row(32, 0.29), {**row(8, 0.1), "hook_point": "there"}]
    assert [(a["hook_point"], a["dictionary"]) for a in advise(rows)] == [("here", "16"), ("there", "8")]
