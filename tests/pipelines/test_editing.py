"""Edited checkpoints of many families against the hooked model, the way back to the byte, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from saeql.pipelines import Run
from saeql.pipelines.cli import main
from saeql.pipelines.editing.affine import EditError
from saeql.pipelines.editing.bake import bake, write_model
from saeql.pipelines.editing.checkpoint import EDIT_FILE, UNDO_FILE, sha256, undo
from saeql.pipelines.editing.tensor_files import INDEX_FILE
from saeql.pipelines.model_build import build
from saeql.pipelines.model_config import ModelConfig
from saeql.pipelines.models import LanguageModel, ModelIdentity
from saeql.pipelines.steering.edits import Edit, FeatureScale
from saeql.pipelines.steering.steerer import Steerer
from saeql.pipelines.steering.vectors import SteeringVector
from saeql.sae.architectures import build as build_dictionary
from saeql.sae.config import DictionaryConfig

IDS = torch.tensor([[1, 5, 9, 2, 7, 8], [1, 3, 8, 4, 6, 11]])
COMMON: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {**COMMON, "num_key_value_heads": 1}
HEADS = {**GQA, "head_dim": 8}
OPT = {**{k: v for k, v in COMMON.items() if k != "intermediate_size"}, "ffn_dim": 32, "word_embed_proj_dim": 16}
GPT2: dict[str, Any] = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**GQA),
    "llama-tied": lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**GQA),
    "qwen2": lambda: hf.Qwen2Config(**GQA),
    "qwen3": lambda: hf.Qwen3Config(**HEADS),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "neox-sequential": lambda: hf.GPTNeoXConfig(**COMMON, use_parallel_residual=False),
    "gemma2": lambda: hf.Gemma2Config(**{**HEADS, "sliding_window": 4}),
    "opt": lambda: hf.OPTConfig(**OPT),
    "opt-350m": lambda: hf.OPTConfig(**{**OPT, "word_embed_proj_dim": 8}, do_layer_norm_before=False),
    "mixtral": lambda: hf.MixtralConfig(**HEADS, num_local_experts=4),
    "bloom": lambda: hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2,
                                    pad_token_id=0),
}  # fmt: skip

HOOKS = ("mlp_out.1", "attn_out.1", "resid_post.1", "resid_pre.1", "resid_pre.0")
NO_SWITCH = "has no bias, and the configuration of this"
A_SUM = "is a sum of what the embedding and all layers"
SCALED = "resid_pre.0 is not the sum of the embeddings in this model"
NORM = "is the output of a norm"
#: What is refused, by family, mode and hook point; all else must be held exactly.
REFUSED: dict[tuple[str, str, str], str] = {
    **{(name, "ablate_direction", hook): A_SUM for name in FAMILIES for hook in ("resid_post.1", "resid_pre.1")},
    **{("mistral", "add", hook): NO_SWITCH for hook in HOOKS[:4]},
    **{("qwen2", "add", hook): NO_SWITCH for hook in HOOKS[:4]},
    **{("qwen3", "add", hook): NO_SWITCH for hook in ("mlp_out.1", "resid_post.1", "resid_pre.1")},
    **{("gemma2", "add", hook): NORM for hook in HOOKS[:4]},
    **{("gemma2", "ablate_direction", hook): NORM for hook in ("mlp_out.1", "attn_out.1")},
    **{("gemma2", mode, "resid_pre.0"): SCALED for mode in ("add", "ablate_direction")},
    **{("opt-350m", "add", hook): "norms or scales the sum" for hook in ("resid_post.1", "resid_pre.1")},
    **{("opt-350m", mode, "resid_pre.0"): SCALED for mode in ("add", "ablate_direction")},
    **{
        ("mixtral", "add", hook): "a weighted sum over experts" for hook in ("mlp_out.1", "resid_post.1", "resid_pre.1")
    },
    ("mixtral", "ablate_direction", "mlp_out.1"): "a weighted sum over experts",
    ("mixtral", "add", "attn_out.1"): NO_SWITCH,
    **{("bloom", mode, "resid_pre.0"): SCALED for mode in ("add", "ablate_direction")},
}


def made(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A random model of a family on disk."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def steerer_of(folder: Path, hook_point: str) -> Steerer:
    """A steerer with a random dictionary of 8 latents at a hook point."""
    model = build(folder, ModelConfig(name=str(folder)), torch.float32, torch.device("cpu"))
    identity = ModelIdentity(str(folder), "", "", hook_point)
    dictionary = build_dictionary(DictionaryConfig(d_sae=8, k=2), 16, 16, seed=0)
    return Steerer(
        LanguageModel(model, None, identity, torch.device("cpu")), dictionary, identity, writes={hook_point: 16},
        median_norms={hook_point: 3.0}, scales={0: FeatureScale(1.5, 0.1), 1: FeatureScale(2.0, 0.1)},
    )  # fmt: skip


@torch.no_grad()
def difference(steerer: Steerer, edits: list[Edit], folder: Path) -> tuple[float, float]:
    """Largest difference of logits of the checkpoint in `folder` from the hooked model's, and from the model's own."""
    edited = build(folder, ModelConfig(name=str(folder)), torch.float32, torch.device("cpu"))
    plain = steerer.lm.model(IDS).logits
    with steerer.applied(edits):
        hooked = steerer.lm.model(IDS).logits
    new = edited(IDS).logits
    return float((new - hooked).abs().max()), float((new - plain).abs().max())


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("mode", ["add", "ablate_direction"])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_edited_checkpoint_is_the_hooked_model_or_is_refused(
    family: tuple[str, Path], mode: str, hook: str, tmp_path: Path
):
    name, folder = family
    steerer, out = steerer_of(folder, hook), tmp_path / "edited"
    edits = [Edit(0, mode, 0.7), Edit(1, mode, unit="p99" if mode == "add" else "norm", strength=0.5)]
    message = REFUSED.get((name, mode, hook))
    if message is not None:
        with pytest.raises(EditError, match=message) as caught:
            write_model(steerer, folder, edits, out)
        assert "\n" not in str(caught.value) and not out.exists()
        return
    plan, _ = write_model(steerer, folder, edits, out)
    from_hooked, from_plain = difference(steerer, edits, out)
    assert from_hooked <= 2e-5 < 1e-3 < from_plain, plan.notes
    tied = build(folder, ModelConfig(name=str(folder)), torch.float32, torch.device("cpu")).config.tie_word_embeddings
    assert ("tie_word_embeddings" in plan.switches) == (hook == "resid_pre.0" and bool(tied))
    assert ("mlp_bias" in plan.switches) == (
        name.startswith("llama") and mode == "add" and hook in ("mlp_out.1", "resid_post.1", "resid_pre.1")
    )
    undo(out, tmp_path / "back")
    assert same_files(folder, tmp_path / "back")


def same_files(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(sha256(a / n) == sha256(b / n) for n in names)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen3", "gpt2", "neox", "neox-sequential", "opt"])
def test_a_direction_taken_out_of_every_writer_is_hooks_at_all_of_them(name: str, tmp_path: Path):
    folder = made(name, tmp_path / "model")
    steerer = steerer_of(folder, "resid_post.1")
    plan, edits = write_model(steerer, folder, [Edit(0, "ablate_direction")], tmp_path / "edited", everywhere=True)
    assert len(steerer.placed(edits)) == 7 and len(plan.tensors) >= 7
    from_hooked, from_plain = difference(steerer, edits, tmp_path / "edited")
    assert from_hooked <= 2e-5 < 1e-3 < from_plain
    undo(tmp_path / "edited", tmp_path / "back")
    assert same_files(folder, tmp_path / "back")


@pytest.mark.parametrize(("name", "message"), [("gemma2", "norm"), ("mixtral", "experts"), ("opt-350m", "resid_pre.0")])
def test_models_without_plain_writers_cannot_be_orthogonalised(name: str, message: str, tmp_path: Path):
    folder = made(name, tmp_path / "model")
    with pytest.raises(EditError, match=message):
        write_model(
            steerer_of(folder, "resid_post.1"), folder, [Edit(0, "ablate_direction")], tmp_path / "x", everywhere=True
        )
    assert not (tmp_path / "x").exists()


def test_replace_and_several_hook_points_at_once(tmp_path: Path):
    folder = made("gpt2", tmp_path / "model")
    steerer = steerer_of(folder, "mlp_out.1")
    row = torch.randn(16, generator=torch.Generator().manual_seed(3))
    vector = SteeringVector("both", {"mlp_out.1": row, "resid_post.1": 2 * row, "attn_out.2": row}, {})
    edits = [Edit(0, "replace", to=0.5), Edit(1, "add", 0.3), Edit(vector, "add", 0.8, unit="raw")]
    write_model(steerer, folder, edits, tmp_path / "edited")
    from_hooked, from_plain = difference(steerer, edits, tmp_path / "edited")
    assert from_hooked <= 2e-5 < 1e-3 < from_plain


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_half_precision_files_keep_the_bytes_of_what_is_not_edited(shard: str, tmp_path: Path):
    folder = made("llama", tmp_path / "model", torch.bfloat16, shard)
    assert (folder / INDEX_FILE).exists() == (shard == "8KB")
    steerer, edits = steerer_of(folder, "resid_post.1"), [Edit(0, "add", 0.7)]
    write_model(steerer, folder, edits, tmp_path / "edited")
    assert difference(steerer, edits, tmp_path / "edited")[0] <= 2e-5
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype="auto")
    assert model.dtype == torch.float32 and model.config.mlp_bias
    biases = {n: p for n, p in model.named_parameters() if n.endswith("proj.bias")}
    assert [n for n, p in biases.items() if bool(p.any())] == ["model.layers.1.mlp.down_proj.bias"]
    write_model(steerer, folder, [Edit(0, "ablate_direction")], tmp_path / "x", everywhere=True, dtype="original")
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype="auto").dtype == torch.bfloat16
    for name in ("edited", "x"):
        undo(tmp_path / name, tmp_path / f"{name}-back")
        assert same_files(folder, tmp_path / f"{name}-back")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(0, "clamp"), "clamp depends on the activation of feature 0.*with a threshold"),
        (Edit(0, "scale", to=2.0), "scale depends on the activation"),
        (Edit(0, "ablate"), "ablate depends on the activation"),
        (Edit(0, "cap"), "cap changes only rows beyond a limit"),
        (Edit(0, "add", positions="prompt"), "positions 'prompt': weights act alike on every token"),
        (Edit(0, "add", schedule="fade:3"), "schedule 'fade:3': weights act alike at every step"),
        (Edit(0, "add", 0.0), "strength 0 changes nothing"),
    ],
)
def test_what_weights_cannot_hold_is_refused_with_the_reason(tmp_path: Path, edit: Edit, message: str):
    folder = made("llama", tmp_path / "model")
    with pytest.raises(EditError, match=message):
        write_model(steerer_of(folder, "mlp_out.1"), folder, [edit], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_other_refusals(tmp_path: Path):
    folder = made("llama", tmp_path / "model")
    steerer = steerer_of(folder, "mlp_in.1")

    def refused(message: str, edits: list[Edit], source: Path = folder, **options: Any) -> None:
        with pytest.raises(EditError, match=message):
            write_model(steerer, source, edits, tmp_path / "x", **options)

    refused("mlp_in.1 is what a module reads, after a norm", [Edit(0, "add", 0.5)])
    refused("mode add has no such meaning", [Edit(0, "add", 0.5)], everywhere=True)
    refused("no dtype 'half'", [Edit(0, "add", 0.5)], dtype="half")
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused("has no safetensors weights", [Edit(0, "add", 0.5)], source=tmp_path)
    with pytest.raises(EditError, match="is no checkpoint of `saeql edit`"):
        undo(folder, tmp_path / "y")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(EditError, match="is there already"):
        undo(folder, tmp_path / "taken")
    steerer = steerer_of(folder, "mlp_out.1")
    write_model(steerer, folder, [Edit(0, "ablate_direction")], tmp_path / "edited")
    weights = tmp_path / "edited" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(EditError, match="did not come out as it was"):
        undo(tmp_path / "edited", tmp_path / "z")


def test_the_command_writes_measures_and_undoes(
    tiny_run: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "edited"
    main(["edit", str(tiny_run), "--feature", "3:0.3", "--feature", "5", "--out", str(out), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / EDIT_FILE).read_text())
    measured = record["measured"]
    assert measured["is_equal"] and measured["largest_difference"] <= 1e-4 and measured["num_windows"] > 4
    assert measured["kl"]["value"] > 0 and measured["ce_after"]["n"] == measured["num_tokens"]
    assert record["hook_points"] == ["resid_post.1"] and record["config"] == {"mlp_bias": True}
    assert [e["strength"] for e in record["edits"]] == [0.3, 0.4] and (out / UNDO_FILE).exists()
    main(["edit", "--undo", str(out), "--out", str(tmp_path / "back")])
    assert "each with the bytes that it had" in capsys.readouterr().out
    assert same_files(tiny_model_folder, tmp_path / "back")

    arguments = ["edit", str(tiny_run), "--feature", "3", "--mode", "ablate_direction", "--everywhere"]
    main([*arguments, "--out", str(tmp_path / "b")])
    assert "the edited model is the hooked one" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--out", str(tmp_path / "c"), "--tolerance", "0"])
    text = capsys.readouterr().out
    assert "FAILED: the edited model is not the hooked one" in text and "in float64" in text
    failed = json.loads((tmp_path / "c" / EDIT_FILE).read_text())["measured"]
    assert not failed["is_equal"] and 0 < failed["num_beyond"] <= failed["num_windows"] * failed["window_tokens"]
    assert failed["rounding"]["largest_in_float64"] < failed["largest_difference"]
    off = [failed["rounding"][name] for name in ("of_hooked", "of_edited", "largest_in_float64")]
    assert failed["largest_difference"] <= sum(off) < 1e-3 and f"token {failed['rounding']['position']} of its" in text
    for argv, message in (
        (["edit", str(tiny_run), "--feature", "3", "--mode", "clamp", "--out", str(tmp_path / "d")], "clamp depends"),
        (["edit", str(tiny_run), "--feature", "3", "--out", str(out)], "is there already"),
        (["edit", str(tiny_run), "--out", str(tmp_path / "d"), "--undo", str(out)], "name nothing but --undo"),
        (["edit", "--out", str(tmp_path / "d")], "name a run"),
        ([*arguments[:4], "--positions", "prompt", "--out", str(tmp_path / "d")], "positions 'prompt'"),
        ([*arguments[:4], "--tolerance", "-1", "--out", str(tmp_path / "d")], "--tolerance -1: a difference"),
        ([*arguments[:4], "--windows", "0", "--out", str(tmp_path / "d")], "--windows 0: at least 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(argv)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.full
def test_the_embedded_model_holds_an_edit_to_a_ten_thousandth(tiny_config: Path, tmp_path: Path):
    from saeql.pipelines import load_config
    from saeql.pipelines.model_config import EMBEDDED_MODEL
    from saeql.pipelines.models import model_folder

    keys = {"model.name": EMBEDDED_MODEL, "model.hook_point": "resid_post.15", "train.num_steps": "5"}
    run = Run.create(tmp_path / "run", load_config(tiny_config, {**keys, "train.warmup_steps": "1"}))
    list(run.execute(("harvest", "train", "index", "label", "evaluate", "store")))
    for number, (edit, everywhere) in enumerate(
        [(Edit(0, "add", 0.4), False), (Edit(0, "ablate_direction"), True), (Edit(1, "add", 1.0), False)]
    ):
        baked = bake(run, [edit], tmp_path / str(number), everywhere=everywhere)
        # 61 edited weights round apart by more than a ten-thousandth in float32: there float64 must agree
        moved, rounding = baked.moved, baked.moved.rounding
        assert moved.is_equal or (everywhere and rounding is not None), moved
        if rounding is not None:  # float32 itself is further off there than float64 leaves between them
            assert rounding.largest_in_float64 <= moved.tolerance < rounding.of_hooked + rounding.of_edited, moved
        undo(tmp_path / str(number), tmp_path / f"{number}-back")
        name = "model.safetensors"
        assert sha256(tmp_path / f"{number}-back" / name) == sha256(model_folder(run.config.model) / name)
