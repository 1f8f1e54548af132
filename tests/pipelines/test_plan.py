import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saeql.pipelines import Run, load_config
from saeql.pipelines.cli import main
from saeql.pipelines.footprint import Footprint
from saeql.pipelines.hardware import GPUS
from saeql.pipelines.models import load_model
from saeql.pipelines.outline import ModelOutline, outline
from saeql.pipelines.plan import make_plan
from saeql.pipelines.plan_cluster import Step, batch_for_efficiency, layout, layouts, step_seconds
from saeql.pipelines.plan_terms import Rows, Sizes, StageTerms, total
from saeql.sae.hooks import HookPointError
from saeql.store.shards import ShardReader

STEP = Step(batch_tokens=65536, d_in=4096, d_out=4096, d_sae=262144, k=64, dense=False)


@pytest.fixture(scope="module")
def seen(tiny_config: Path) -> ModelOutline:
    config = load_config(tiny_config)
    return outline(config.model, ("resid_post.1",), torch.float32, (8, 32), (4, 32))


def test_outline_has_the_size_of_the_loaded_model(tiny_config: Path, seen: ModelOutline):
    model = load_model(load_config(tiny_config).model).model
    assert seen.num_parameters == sum(p.numel() for p in model.parameters())
    assert seen.vocabulary == model.config.vocab_size
    assert seen.widths == {"resid_post.1": model.config.hidden_size}
    assert seen.stored_dtype == torch.float32
    assert seen.depth_share == {"resid_post.1": 2 / 3}


def test_outline_counts_the_operations_of_the_layers_that_run(tiny_config: Path, seen: ModelOutline):
    model = load_model(load_config(tiny_config).model).model
    layers = model.model.layers
    linear = sum(m.weight.numel() for layer in layers[:2] for m in layer.modules() if isinstance(m, torch.nn.Linear))
    tokens = 8 * 32
    attention = 2 * 2 * 2 * tokens * 32 * model.config.hidden_size  # two layers, two products
    assert seen.harvest.flops == 2 * tokens * linear + attention
    everything = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
    everything += model.lm_head.weight.numel()
    assert seen.full.flops == 2 * 128 * everything + 3 * 2 * 2 * 128 * 32 * model.config.hidden_size


def test_outline_live_bytes_lie_between_what_is_kept_and_all_that_is_made(seen: ModelOutline):
    rows, width = 8 * 32, 32
    assert 3 * rows * width * 4 < seen.harvest.live_bytes < 40 * rows * width * 4
    assert seen.full.live_bytes >= 4 * 32 * seen.vocabulary * 4


def test_outline_names_a_hook_point_that_is_not_there(tiny_config: Path):
    config = load_config(tiny_config)
    with pytest.raises(HookPointError, match=r"resid_post\.9"):
        outline(config.model, ("resid_post.9",), torch.float32, (1, 8), (1, 8))


def test_disk_terms_are_within_15_percent_of_a_run(tiny_run: Path, seen: ModelOutline):
    run = Run.open(tiny_run)
    readers = {s: ShardReader(run.activations / "resid_post.1" / s) for s in ("train", "calibration", "test")}
    rows = Rows({split: reader.num_windows for split, reader in readers.items()}, 32)
    own = Sizes.of(run.spec, seen.widths)
    terms = StageTerms(run.config, seen, rows, [own], Footprint(0, 0, True), cuda=False)
    for planned, folders in (
        (terms.activations_disk(), ["activations"]),
        (terms.train_disk([own]), ["checkpoints", "dictionaries"]),
    ):
        written = sum(f.stat().st_size for name in folders for f in (tiny_run / name).rglob("*") if f.is_file())
        assert total(planned) == pytest.approx(written, rel=0.15)


def test_a_sweep_adds_weights_and_moments_but_no_gradients(tiny_config: Path, seen: ModelOutline):
    config = load_config(tiny_config, {"train.init_tokens": "1"})
    run_spec = Sizes.of(Run(Path("nowhere"), config).spec, seen.widths)
    rows = Rows({"train": 100, "calibration": 10, "test": 10}, 32)
    terms = StageTerms(config, seen, rows, [run_spec], Footprint(0, 0, True), cuda=False)
    one, four = (total(terms.train_ram([run_spec] * n)) for n in (1, 4))
    assert four - one == 3 * 3 * run_spec.parameter_bytes  # float32 encoder: no bfloat16 copies


def test_what_is_frozen_has_no_moments(tiny_config: Path, seen: ModelOutline):
    def terms(**dictionary: str) -> dict[str, float]:
        config = load_config(tiny_config, {f"dictionary.{key}": value for key, value in dictionary.items()})
        own = Sizes.of(Run(Path("nowhere"), config).spec, seen.widths)
        rows = Rows({"train": 100, "calibration": 10, "test": 10}, 32)
        made = StageTerms(config, seen, rows, [own], Footprint(0, 0, True), cuda=False)
        return {term.name: term.num_bytes for term in (*made.train_ram([own]), *made.train_disk([own]))}

    free, frozen, soft = (terms(freeze=freeze) for freeze in ("none", "decoder", "soft_decoder"))
    assert free["Adam"] - frozen["Adam"] == 2 * 4 * 96 * 32
    assert frozen["checkpoints"] < free["checkpoints"] < soft["checkpoints"]
    assert soft["starts"] == 4 * 96 * 32
    fixed = terms(freeze="all", architecture="jumprelu")
    assert fixed["Adam"] == fixed["checkpoints"] == 0


def test_plan_warns_and_names_the_setting(tiny_config: Path):
    config = load_config(tiny_config, {"corpus.max_tokens": str(10**13), "train.shuffle_buffer_bytes": str(10**14)})
    plan = make_plan(config)
    assert any("train needs" in w and "train.shuffle_buffer_bytes" in w for w in plan.warnings)
    assert any("of disk" in w and "corpus.max_tokens" in w for w in plan.warnings)
    assert plan.stage("train").ram_bytes > 10**14


def test_plan_settles_globs_as_the_run_does(tiny_config: Path):
    options = {"corpus.max_tokens": "5000", "model.hook_point": "resid_post.0"}
    more = {"model.more_hook_points": '["resid_post.1", "resid_post.2"]'}
    named = make_plan(load_config(tiny_config, options | more))
    globbed = make_plan(load_config(tiny_config, options | {"model.hook_point": "resid_post.*"}))
    assert globbed.disk_bytes == named.disk_bytes


def test_plan_command(tiny_config: Path, capsys: pytest.CaptureFixture[str]):
    size = ["--corpus.max_tokens", "5000"]
    main(["plan", str(tiny_config), *size, "--json", "--sweep.ks", "[2, 4]"])
    made = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in made["stages"]][:2] == ["harvest", "train"]
    assert made["stages"][-2]["name"] == "train --sweep"
    assert all(s["ram_bytes"] == pytest.approx(sum(t["num_bytes"] for t in s["ram"])) for s in made["stages"])
    assert made["warnings"] == []
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(tiny_config), *size, "--gpu", "rtx4090", "--nodes", "2", "--strict",
              "--dictionary.d_sae", "200000000"])  # fmt: skip
    text = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "WARNING train needs" in text and "dictionary.d_sae" in text and "16 x 1" in text


def test_plan_refuses_what_it_does_not_know(tiny_config: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["--gpu", "h10"], "h100"),
        (["--nodes", "0"], "--nodes"),
        (["--corpus.source", "hf:nobody/nothing"], "corpus.max_tokens"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", str(tiny_config), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_wire_bytes_of_a_mesh():
    mesh = layout(STEP, GPUS["h100"], data=8, feature=8, gpus_per_node=8, other_bytes=0.0)
    gradient = 262144 / 8 * 8192 * 4
    assert mesh.data_wire_bytes == pytest.approx(2 * 7 / 8 * gradient)
    rows = 65536 / 8
    assert mesh.feature_wire_bytes == pytest.approx(7 * rows * 64 * 8 + 2 * 7 / 8 * rows * 4096 * 4)


def test_one_gpu_has_nothing_to_send_and_is_its_own_measure():
    mesh = layout(STEP, GPUS["h100"], 1, 1, 8, 0.0)
    assert mesh.data_wire_bytes == mesh.feature_wire_bytes == 0
    assert mesh.efficiency == pytest.approx(1)
    assert mesh.step_seconds == pytest.approx(step_seconds(STEP, GPUS["h100"]))


def test_features_share_the_weights_and_data_does_not():
    data, both, feature = (layout(STEP, GPUS["h100"], d, f, 8, 0.0) for d, f in ((64, 1), (8, 8), (1, 64)))
    assert data.memory_bytes > both.memory_bytes > 0
    weights = 262144 * 8192
    rows = 65536 // 8
    of_rows = rows * (5 * 4096 * 4 + 24 * 64) + min(2**30, 2 * rows * 262144 // 8)
    assert both.memory_bytes == pytest.approx(weights / 8 * 18 + of_rows)
    assert data.memory_bytes > weights * 18
    assert feature.data_wire_bytes == 0
    made = layouts(STEP, GPUS["h100"], 8, 8, 0.0)
    assert {(m.data, m.feature) for m in made} == {(64, 1), (8, 8), (1, 64), (1, 8)}
    assert made == sorted(made, key=lambda m: m.step_seconds)


def test_a_larger_batch_pays_for_the_wire():
    mesh = layout(STEP, GPUS["h100"], 64, 1, 8, 0.0)
    wanted = batch_for_efficiency(STEP, GPUS["h100"], mesh, 8)
    assert mesh.efficiency < 0.8
    assert wanted is not None
    assert layout(replace(STEP, batch_tokens=wanted), GPUS["h100"], 64, 1, 8, 0.0).efficiency >= 0.8
    assert layout(replace(STEP, batch_tokens=wanted // 2), GPUS["h100"], 64, 1, 8, 0.0).efficiency < 0.8


def test_a_live_training_holds_the_model_and_a_buffer_of_no_more_than_it_trains_on(
    tiny_config: Path, seen: ModelOutline
):
    def terms(**options: str) -> StageTerms:
        config = load_config(tiny_config, {"train.num_steps": "4000", **options})
        windows = {"train": 1600, "calibration": 100, "test": 100}
        own = Sizes.of(Run(Path("nowhere"), config).spec, seen.widths)
        return StageTerms(
            config, seen, Rows(windows, 32, text_windows=90_000), [own], Footprint(100, 300, True), cuda=False
        )

    def ram(of: StageTerms) -> dict[str, float]:
        return {term.name: term.num_bytes for term in of.train_ram(of.sizes)}

    stored, live = ram(terms()), ram(terms(**{"train.source": "live"}))
    row = 32 * 4 + 40
    assert stored["shuffle buffer"] == 2 * 1600 * 32 * row
    # 512,000 rows and the first positions between them, in one group
    assert live["shuffle buffer"] == pytest.approx(512_000 * 32 / 31 * row, rel=0.01)
    assert (stored["process"], live["process"]) == (100, 300)
    assert live["forward pass"] == seen.harvest.live_bytes and "forward pass" not in stored
    assert "forward pass" not in ram(
        terms(**{"train.source": "live", "train.init_tokens": "100000"})
    )  # they take turns
    small = ram(terms(**{"train.source": "live", "train.shuffle_buffer_bytes": "500000"}))
    assert 400_000 < small["shuffle buffer"] <= 500_000


def test_a_live_plan_stores_a_sample_and_overlaps_on_a_gpu(tiny_config: Path):
    options = {"corpus.max_tokens": "4000000", "train.source": "live"}
    plan = make_plan(load_config(tiny_config, options), gpu_name="h100", gpus_per_node=8)
    assert plan.stage("harvest").tokens == pytest.approx((1_000_000 + 1_200_000) * 32 / 31, rel=0.01)
    train = plan.stage("train")
    assert {"forward pass", "Adam"} <= {t.name for t in train.device} and "pinned memory" in {t.name for t in train.ram}
