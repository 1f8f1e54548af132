"""The whole job on a tiny real model: stages, files, what is reused, what is refused, what is identical."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saeql.pipelines import STAGES, Run, RunError, load_config
from saeql.pipelines.corpus import CorpusError
from saeql.pipelines.harvest import HarvestInfo
from saeql.pipelines.models import ModelError, ModelMismatch
from saeql.sae.checkpoint import checkpoints
from saeql.sae.comm import CommError
from saeql.sae.hook_points import HookPointError
from saeql.store.evidence import Evidence
from saeql.store.shards import ShardReader


def test_every_stage_leaves_its_files(tiny_run: Path):
    run = Run.open(tiny_run)
    assert list(run.finished()) == list(STAGES)
    for name in ("config.toml", "metrics.jsonl", "features.duckdb", "report.html", "showcase.json"):
        assert (tiny_run / name).stat().st_size > 0
    for table in (
        "documents",
        "windows",
        "vocabulary",
        "activations",
        "logit_effects",
        "neighbours",
        "labels",
        "metrics",
    ):
        assert run.evidence.has(table)
    weights = load_file(run.dictionary_path / "sae_weights.safetensors")
    assert tuple(weights["W_enc"].shape) == (32, 96)
    assert not list(tiny_run.rglob("*.tmp.*"))


def test_splits_do_not_share_documents_and_every_row_is_accounted_for(tiny_run: Path):
    evidence = Evidence(tiny_run / "evidence")
    owners = {}
    for window in evidence.read("windows").to_pylist():
        for document in window["document_ids"]:
            assert owners.setdefault(document, window["split"]) == window["split"]
    for rows in evidence.read("split_rows").to_pylist():
        left_out = rows["num_first_position_rows"] + rows["num_massive_rows"]
        assert rows["num_rows"] == rows["num_kept_rows"] + left_out == 32 * rows["num_windows"]
        reader = ShardReader(tiny_run / "activations" / "resid_post.1" / rows["split"])
        assert reader.num_rows == rows["num_rows"]


def test_stored_activations_are_those_of_the_model(tiny_run: Path):
    run = Run.open(tiny_run)
    window = run.evidence.read("windows", split="test").to_pylist()[0]
    reader = ShardReader(run.activations / "resid_post.1" / "test")
    stored = torch.from_numpy(reader.rows(0, 0, 32).copy())
    with torch.no_grad():
        states = run.language_model.model(torch.tensor([window["token_ids"]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(stored, states[2][0], rtol=1e-4, atol=1e-5)  # resid_post.1


def test_indexed_activations_are_those_of_the_dictionary(tiny_run: Path):
    run = Run.open(tiny_run)
    rows = run.evidence.read("activations", split="test")
    window = run.evidence.read("windows", split="test").to_pylist()[0]
    mine = [row for row in rows.to_pylist() if row["window_id"] == window["window_id"]]
    acts = torch.from_numpy(ShardReader(run.activations / "resid_post.1" / "test").rows(0, 0, 32).copy())
    with torch.no_grad():
        latents = run.dictionary().encode(acts)
    expected = {
        (position, int(feature)): float(value)
        for position in range(1, 32)
        for feature, value in zip(latents.indices[position], latents.values[position], strict=True)
        if value > 0
    }
    found = {(r["position"], r["feature"]): r["activation"] for r in mine}
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in expected.items())


def test_training_improved_and_is_described(tiny_run: Path):
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["fvu"] < lines[0]["fvu"]


def test_metrics_agree_with_a_computation_of_their_own(tiny_run: Path):
    run = Run.open(tiny_run)
    with run.store() as store:
        metrics = {m["metric"]: m for m in store.metrics()}
    info, reader = run.harvest_info, ShardReader(run.activations / "resid_post.1" / "test")
    acts = torch.cat([torch.from_numpy(reader.acts(s).copy()) for s in range(len(reader))]).view(-1, 32, 32)[:, 1:]
    kept = acts.reshape(-1, 32)
    kept = kept[kept.norm(dim=1) <= info.norm_limit("resid_post.1")].double()
    with torch.no_grad():
        x_hat = run.dictionary()(kept.float()).double()
    expected = float((kept - x_hat).square().sum() / (kept - kept.mean(0)).square().sum())
    assert metrics["fvu"]["value"] == pytest.approx(expected, rel=1e-5)
    assert metrics["fvu"]["low"] <= expected <= metrics["fvu"]["high"]
    assert metrics["fvu"]["n"] == len(kept)
    assert metrics["ce_increase"]["value"] == pytest.approx(
        metrics["ce_spliced"]["value"] - metrics["ce_model"]["value"]
    )
    assert {m["split"] for m in metrics.values()} == {"test"}


def test_divergence_is_that_of_a_computation_of_its_own(tiny_run: Path):
    from saeql.pipelines import edit

    run = Run.open(tiny_run)
    with run.store() as store:
        metrics = {m["metric"]: m["value"] for m in store.metrics()}
    windows = torch.tensor(run.evidence.read("windows", split="test")["token_ids"].to_pylist())
    chosen = torch.linspace(0, len(windows) - 1, min(12, len(windows)), dtype=torch.float64).round().long().unique()
    model, dictionary, limit = run.language_model.model, run.dictionary(), run.harvest_info.norm_limit("resid_post.1")

    def splice(acts: torch.Tensor) -> torch.Tensor:
        keep = acts.norm(dim=-1, keepdim=True) <= limit
        keep[:, 0] = False
        return torch.where(keep, dictionary(acts.reshape(-1, 32)).view_as(acts), acts)

    with torch.no_grad():
        p = model(windows[chosen]).logits[:, :-1].log_softmax(-1)
        with edit(model, "resid_post.1", splice):
            q = model(windows[chosen]).logits[:, :-1].log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert metrics["kl"] == pytest.approx(float(expected), rel=1e-3)
    assert 0 <= metrics["kl_recovered"] <= 1


def test_cross_entropy_of_the_untouched_model_is_that_of_transformers(tiny_run: Path):
    run = Run.open(tiny_run)
    with run.store() as store:
        value = next(m for m in store.metrics() if m["metric"] == "ce_model")
    windows = torch.tensor(run.evidence.read("windows", split="test")["token_ids"].to_pylist())
    chosen = torch.linspace(0, len(windows) - 1, min(12, len(windows)), dtype=torch.float64).round().long().unique()
    with torch.no_grad():
        loss = run.language_model.model(windows[chosen], labels=windows[chosen]).loss
    assert value["value"] == pytest.approx(float(loss), rel=1e-4)


def test_a_finished_run_is_reused_and_another_configuration_is_refused(tiny_run: Path, tiny_config: Path):
    run = Run.create(tiny_run, load_config(tiny_config))
    assert [seconds for _, seconds in run.execute()] == [None] * len(STAGES)
    with pytest.raises(RunError, match=r"train\.lr = None, not 0\.5"):
        Run.create(tiny_run, load_config(tiny_config, {"train.lr": "0.5"}))


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("model.hook_point", "resid_post.99", HookPointError),
        ("model.name", "/no/such/model", ModelError),
        ("corpus.source", "/no/such/text.jsonl", CorpusError),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing_in_the_way_of_the_corrected_one(
    tmp_path: Path, tiny_config: Path, key: str, value: str, error: type[Exception]
):
    with pytest.raises(error):
        Run.create(tmp_path / "run", load_config(tiny_config, {key: value}))
    assert not (tmp_path / "run").exists()
    Run.create(tmp_path / "run", load_config(tiny_config))


def copy_of(run: Path, folder: Path) -> Run:
    return Run.open(shutil.copytree(run, folder / "copy"))


def test_the_same_seed_twice_gives_identical_weights(tiny_run: Path, tmp_path: Path):
    run = copy_of(tiny_run, tmp_path)
    before = (run.dictionary_path / "sae_weights.safetensors").read_bytes()
    shutil.rmtree(run.path / "checkpoints")
    assert [stage for stage, _ in run.execute(("harvest", "train"), again=True)] == ["harvest", "train"]
    assert (run.dictionary_path / "sae_weights.safetensors").read_bytes() == before


def test_training_resumes_to_identical_weights(tiny_run: Path, tmp_path: Path):
    run = copy_of(tiny_run, tmp_path)
    before = (run.dictionary_path / "sae_weights.safetensors").read_bytes()
    last = checkpoints(run.path / "checkpoints")[-1]
    shutil.rmtree(last)  # as if killed after the one before
    shutil.rmtree(run.path / "dictionaries")
    list(run.execute(("train",), again=True, resume=True))
    assert (run.dictionary_path / "sae_weights.safetensors").read_bytes() == before
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40, 50, 60]


def test_a_stage_that_runs_again_makes_later_ones_stale(tiny_run: Path, tmp_path: Path):
    run = copy_of(tiny_run, tmp_path)
    list(run.execute(("index",), again=True))
    assert list(run.finished()) == ["harvest", "train", "index"]
    assert [stage for stage, seconds in run.execute() if seconds is not None] == [
        "label",
        "evaluate",
        "store",
        "report",
    ]


def test_a_new_harvest_or_a_new_start_forgets_old_checkpoints(tiny_run: Path, tmp_path: Path):
    run = copy_of(tiny_run, tmp_path)
    before = (run.dictionary_path / "sae_weights.safetensors").read_bytes()
    list(run.execute(("harvest",), again=True))
    assert not checkpoints(run.path / "checkpoints")
    list(run.execute(("train",), resume=True))
    assert (run.dictionary_path / "sae_weights.safetensors").read_bytes() == before
    assert len(checkpoints(run.path / "checkpoints")) == 2
    for state in (run.path / "checkpoints").glob("*/state.json"):
        state.write_text("of another training")
    list(run.execute(("train",), again=True, resume=False))
    assert (run.dictionary_path / "sae_weights.safetensors").read_bytes() == before
    list(run.execute(("train",), again=True, resume=True))


def test_a_stage_does_not_read_what_is_out_of_date(tiny_run: Path, tmp_path: Path):
    run = copy_of(tiny_run, tmp_path)
    list(run.execute(("index",), again=True))
    with pytest.raises(RunError, match="store reads what label makes, which is missing or out of date: `saeql label"):
        list(run.execute(("store",), again=True))
    assert list(run.finished()) == ["harvest", "train", "index"]
    list(run.execute(("label", "evaluate", "store", "report")))
    assert list(run.finished()) == list(STAGES)


def test_ranks_that_have_not_joined_are_refused(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(tiny_run, tmp_path / "copy")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CommError, match=r"2 ranks were started with train\.feature_shards 1, and 1 have joined: pass"):
        Run.open(tmp_path / "copy").train()


def test_two_writers_exclude_each_other(tiny_run: Path, tmp_path: Path):
    run = copy_of(tiny_run, tmp_path)
    with run.locked(), pytest.raises(RunError, match=r"in use by another saeql process \(pid \d+ on \S+\)"):
        list(Run.open(run.path).execute(("report",), again=True))


def test_a_dictionary_of_another_model_is_refused(tiny_run: Path, tmp_path: Path):
    run = copy_of(tiny_run, tmp_path)
    file = run.activations / "harvest.json"
    data = json.loads(file.read_text())
    data["identity"]["model_sha256"] = "0" * 64
    file.write_text(json.dumps(data))
    assert HarvestInfo.load(run.activations).identity.model_sha256 == "0" * 64
    with pytest.raises(ModelMismatch, match=r"model_sha256 0000.*--allow-mismatch"):
        list(run.execute(("index",), again=True))


def test_steering_changes_text_and_ablation_removes_the_feature(tiny_run: Path):
    from saeql.pipelines import Edit, capture

    run = Run.open(tiny_run)
    steerer = run.steerer()
    with run.store() as store:
        feature = store.sql("SELECT feature FROM features ORDER BY density DESC LIMIT 1")["feature"][0].as_py()
    prompt = "The river"
    assert steerer.generate(prompt, []) == steerer.generate(prompt, [])
    ids = torch.tensor([[1, 5, 9, 11, 13, 15]])
    model, dictionary = run.language_model.model, run.dictionary()

    def acts(edits: list[Edit]) -> torch.Tensor:
        with steerer.applied(edits), capture(model, ["resid_pre.2"]) as reader, torch.no_grad():
            return reader.run(ids)["resid_pre.2"][0]

    base, row = acts([]), dictionary.W_dec[feature].detach()
    added = acts([Edit(feature, "add", 0.5)])
    torch.testing.assert_close(
        added - base, (0.5 * steerer.median_norms["resid_post.1"] * row).expand_as(base), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        latents = dictionary.encode(base)
        old = (latents.values * (latents.indices == feature)).sum(1)
    torch.testing.assert_close(acts([Edit(feature, "ablate")]), base - old[:, None] * row, rtol=1e-4, atol=1e-4)
    target = 2 * steerer.scales[feature].p99
    clamped = acts([Edit(feature, "clamp", to=2.0)])
    torch.testing.assert_close(clamped, base + (target - old)[:, None] * row, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(acts([]), base)
