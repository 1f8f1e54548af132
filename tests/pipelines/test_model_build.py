"""Models that are truncated, spread, quantised or bring their own code; globs of hook points in a run; encoders."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import h5py
import pytest
import torch

from saeql.pipelines import Run, RunConfig, load_config
from saeql.pipelines.cli import main
from saeql.pipelines.models import LanguageModel, ModelConfig, ModelError, load_model
from saeql.sae.config import ConfigError
from saeql.sae.hook_points import layer_stack
from saeql.sae.hooks import capture, edit
from saeql.store.shards import ShardReader

IDS = torch.tensor([[1, 5, 9, 2], [3, 3, 8, 0]])


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"{package} is not installed")


def local(folder: Path, **options) -> LanguageModel:
    return load_model(ModelConfig(name=str(folder), dtype="float32", **{"hook_point": "resid_post.1", **options}))


@torch.no_grad()
def acts_of(model: LanguageModel, name: str = "resid_post.1") -> torch.Tensor:
    with capture(model.model, [name], model.device) as reader:
        return reader.run(IDS.to(model.input_device))[name]


def config_of(tiny_config: Path, **overrides: str) -> RunConfig:
    return load_config(tiny_config, {key.replace("__", "."): value for key, value in overrides.items()})


def shards_of(run: Run, hook_point: str) -> list[bytes]:
    return [p.read_bytes() for p in sorted((run.activations / hook_point).rglob("*.h5"))]


# --- globs -----------------------------------------------------------------------------------------------------------


def test_globs_of_a_configuration_become_names_and_are_harvested_in_one_pass(tiny_config: Path, tmp_path: Path):
    config = config_of(
        tiny_config, model__hook_point="resid_post.*", model__more_hook_points='["layers.[01].mlp", "resid_post.1"]',
        dictionary__reads='["*.2"]', sweep__hook_points='["resid_post.*"]',
    )  # fmt: skip
    run = Run.create(tmp_path / "run", config)
    names = ("resid_post.0", "resid_post.1", "resid_post.2", "layers.0.mlp", "layers.1.mlp")
    assert run.config.model.hook_points == names
    assert run.spec.reads == ("resid_post.2",) and run.config.sweep.hook_points == names[:3]
    assert Run.create(tmp_path / "run", config).config == run.config  # the same globs go on with the same run
    info = run.harvest()
    assert tuple(info.widths) == names
    reader = ShardReader(run.activations / "layers.1.mlp" / "train")
    ids = torch.from_numpy(reader.token_ids(0).reshape(-1, 32)[:2]).long()
    with torch.no_grad(), capture(run.language_model.model, ["model.layers.1.mlp"]) as seen:
        expected = seen.run(ids)["model.layers.1.mlp"].flatten(0, 1)
    stored = torch.tensor(reader.rows(0, 0, 64))
    torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-6)


def test_globs_that_match_nothing_are_named(tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for key, message in (
        ("model.hook_point", r'no hook point "layer\.\*\.mlp".*resid_pre\.0 to resid_pre\.2'),
        ("dictionary.reads", r'dictionary\.reads: "layer\.\*\.mlp" matches none of the harvested hook points'),
    ):
        value = '["layer.*.mlp"]' if key == "dictionary.reads" else "layer.*.mlp"
        with pytest.raises(SystemExit, match="2"):
            main(["run", str(tiny_config), "--out", str(tmp_path / "run"), f"--{key}", value])
        assert re.search(message, capsys.readouterr().err)


def test_hooks_lists_what_can_be_named(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]):
    main(["hooks", str(tiny_model_folder)])
    table = capsys.readouterr().out
    assert re.search(r"mlp_in\.\*\s+model\.layers\.\*\.mlp\s+input\s+0 to 2\s+\[B, T, 32\]", table)
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj\s.*output\s+0 to 2\s+\[B, T, 64\]", table)
    main(["hooks", str(tiny_model_folder), "layers.*.self_attn.o_proj@in", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [line["hook_point"] for line in listed] == [f"layers.{n}.self_attn.o_proj@in" for n in range(3)]
    assert {(line["reads"], line["shape"]) for line in listed} == {("input", "[B, T, 32]")}
    with pytest.raises(SystemExit, match="2"):
        main(["hooks", str(tiny_model_folder), "layers.1.mpl"])
    assert 'did you mean "layers.1.mlp"' in capsys.readouterr().err


# --- truncated -------------------------------------------------------------------------------------------------------


def test_a_truncated_harvest_is_the_same_and_later_stages_load_the_whole_model(tiny_config: Path, tmp_path: Path):
    whole = Run.create(tmp_path / "whole", config_of(tiny_config))
    whole.harvest()
    short = Run.create(tmp_path / "short", config_of(tiny_config, model__truncate="true"))
    short.harvest()
    assert shards_of(short, "resid_post.1") == shards_of(whole, "resid_post.1") != []
    assert len(layer_stack(short.language_model.model)[1]) == 3 and not short.language_model.truncated
    assert short.harvest_info.identity == whole.harvest_info.identity


def test_a_truncated_model_refuses_what_needs_the_whole(tiny_model_folder: Path, tiny_run: Path):
    from saeql.pipelines.evaluate import Evaluator
    from saeql.pipelines.steering.steerer import Steerer

    model, run = local(tiny_model_folder, truncate=True), Run.open(tiny_run)
    with pytest.raises(ModelError, match="evaluation needs the whole model"):
        Evaluator(model, run.activations, run.harvest_info, run.config.evaluate)
    with pytest.raises(ModelError, match="steering needs the whole model"):
        Steerer(model, run.dictionary(), model.identity, writes={}, median_norms={}, scales={})
    with pytest.raises(ModelError, match=r'"model.norm" is in no layer'):
        local(tiny_model_folder, hook_point="model.norm", truncate=True)


# --- spread and quantised --------------------------------------------------------------------------------------------

MAPS = {
    "one device": {"": "cpu"},
    "cpu and disk": {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
        "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu",
    },
}  # fmt: skip


@needs("accelerate")
@torch.no_grad()
@pytest.mark.parametrize("device_map", MAPS.values(), ids=list(MAPS))
def test_a_device_map_changes_where_weights_are_and_nothing_else(device_map: dict, tiny_model_folder: Path):
    plain, spread = local(tiny_model_folder), local(tiny_model_folder, device_map=device_map)
    on_disk = [name for name, p in spread.model.named_parameters() if p.device.type == "meta"]
    assert bool(on_disk) == ("disk" in device_map.values())
    for name in ("resid_post.1", "mlp_in.2", "attn_out.1"):
        torch.testing.assert_close(acts_of(spread, name), acts_of(plain, name), rtol=0, atol=0)
    with edit(plain.model, "mlp_out.1", lambda acts: acts * 2), edit(spread.model, "mlp_out.1", lambda acts: acts * 2):
        torch.testing.assert_close(spread.model(IDS).logits, plain.model(IDS).logits, rtol=0, atol=0)
    again = [name for name, p in spread.model.named_parameters() if p.device.type == "meta"]
    assert again == on_disk  # a pass that stopped early has put back what it fetched


@needs("accelerate")
def test_a_whole_run_on_a_spread_model(tiny_config: Path, tmp_path: Path):
    table = ", ".join(f'"{path}" = "{device}"' for path, device in MAPS["cpu and disk"].items())
    run = Run.create(tmp_path / "run", config_of(tiny_config, model__device_map=f"{{{table}}}"))
    assert [stage for stage, _ in run.execute()][-1] == "report"
    assert Run.open(run.path).config == run.config


def test_device_maps_and_quantisations_that_do_not_exist(tiny_model_folder: Path):
    with pytest.raises(ConfigError, match=r'model.device_map must be one of auto.*did you mean "auto"'):
        ModelConfig(device_map="atuo")
    with pytest.raises(ConfigError, match=r'model.quantization must be one of.*did you mean "torchao_int8"'):
        ModelConfig(quantization="torchao_int4")
    if importlib.util.find_spec("accelerate"):
        with pytest.raises(ModelError, match=r"cannot load model .*does not give any device for .*embed_tokens"):
            local(tiny_model_folder, device_map={"model.layers.0": "disk"})


@pytest.mark.parametrize(
    ("name", "package"),
    [("bitsandbytes_8bit", "bitsandbytes"), ("bitsandbytes_4bit", "bitsandbytes"), ("torchao_int8", "torchao")],
)
def test_quantised_activations_are_near(name: str, package: str, tiny_model_folder: Path, tmp_path: Path):
    if not importlib.util.find_spec(package):
        with pytest.raises(ModelError, match=f"needs the package {package}: `pip install {package}`"):
            local(tiny_model_folder, quantization=name)
        pytest.skip(f"{package} is not installed: only its absence was tried")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)  # 4-bit kernels work on blocks of 64
    plain, quantised = acts_of(local(tmp_path)), acts_of(local(tmp_path, quantization=name))
    error = float((quantised - plain).norm() / plain.norm())
    assert 0 < error < (0.25 if "4bit" in name else 0.05)


# --- code that comes with a model ------------------------------------------------------------------------------------

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class RiverConfig(LlamaConfig):
    model_type = "river"

class RiverForCausalLM(LlamaForCausalLM):
    config_class = RiverConfig
"""


@pytest.fixture
def river(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model as one that transformers does not know, with its code beside the weights."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = shutil.copytree(tiny_model_folder, tmp_path / "river")
    (folder / "modeling_river.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "river", "architectures": ["RiverForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_river.RiverConfig",
        "AutoModelForCausalLM": "modeling_river.RiverForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_model_is_run_only_where_it_is_named(
    river: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        main(["run", str(tiny_config), "--out", str(tmp_path / "no"), "--model.name", str(river)])
    message = capsys.readouterr().err
    assert f'is not run unless asked for by name: model.trust_remote_code = "{river}"' in message
    assert len(message.strip().splitlines()) == 1 and not (tmp_path / "modules" / "transformers_modules").exists()
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code must name the model"):
        ModelConfig(name=str(river), trust_remote_code="true")

    config = config_of(tiny_config, model__name=str(river), model__trust_remote_code=str(river))
    run = Run.create(tmp_path / "yes", config)
    info = run.harvest()
    assert type(run.language_model.model).__name__ == "RiverForCausalLM"
    assert re.fullmatch(rf"{re.escape(str(river))} sha256:[0-9a-f]{{64}}", info.identity.trusted_code)
    shard = next((run.activations / "resid_post.1" / "train").glob("*.h5"))
    with h5py.File(shard) as file:
        assert json.loads(str(file.attrs["saeql"]))["attributes"]["trusted_code"] == info.identity.trusted_code
    main(["hooks", str(river), "resid_post.*", "--trust-remote-code", str(river)])
    assert "resid_post.2" in capsys.readouterr().out


def test_trust_in_one_repository_is_no_trust_in_another(river: Path):
    config = json.loads((river / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling_river.RiverForCausalLM"
    (river / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="code of another repository, someone/else, which is not run"):
        local(river, trust_remote_code=str(river))


def test_missing_weights_of_a_layer_are_not_made_up(tiny_model_folder: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"lack \d+ weights, such as model\.layers\.3"):
        local(folder)


# --- encoders --------------------------------------------------------------------------------------------------------


def test_a_whole_run_on_an_encoder(tiny_config: Path, tiny_model_folder: Path, tmp_path: Path):
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    from saeql.pipelines.steering.edits import Edit, SteerError

    folder, tokenizer = tmp_path / "bert", AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                        num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    run = Run.create(tmp_path / "run", config_of(tiny_config, model__name=str(folder), model__hook_point="mlp_out.1"))
    assert [stage for stage, _ in run.execute()][-1] == "report"
    with run.store() as store:
        metrics = {row["metric"] for row in store.metrics()}
        assert store.sql("SELECT count(*) AS n FROM logit_effects")["n"][0].as_py() == 0
    assert {"fvu", "l0", "dead_share"} <= metrics and not any(name.startswith("ce_") for name in metrics)
    steerer = run.steerer()
    with pytest.raises(SteerError, match="is an encoder and writes no text"):
        steerer.generate("The river", [])
    with torch.no_grad(), steerer.applied([Edit(3, "add", 1.0)]):
        changed = run.language_model.model(IDS).logits
    assert not torch.allclose(changed, run.language_model.model(IDS).logits)
