"""Pruning: units are taken out exactly and put back, worth is what was planted, a checkpoint is the pruned model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from saeql.pipelines import LanguageModel, Run
from saeql.pipelines.cli import main
from saeql.pipelines.models import ModelIdentity
from saeql.pipelines.pruning.checkpoint import write_checkpoint
from saeql.pipelines.pruning.curve import PruneOptions, Pruner, masks_of
from saeql.pipelines.pruning.importance import (
    activation_scores,
    active_values,
    feature_scores,
    loss_scores,
    magnitude_scores,
)
from saeql.pipelines.pruning.units import PruneError, Units, find_units, num_weights, taken_out
from saeql.sae.architectures import architecture
from saeql.sae.config import DictionaryConfig
from saeql.sae.hooks import capture

IDS = np.random.default_rng(0).integers(3, 40, (6, 10)).astype(np.int32)


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=45, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=45, n_embd=16, n_inner=24, n_layer=2, n_head=4))


def neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=45, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                            num_attention_heads=4))  # fmt: skip


FAMILIES = [llama, gpt2, neox]


@pytest.fixture
def lm_of(tiny_model_folder: Path) -> Callable[[Any], LanguageModel]:
    def made(model: Any) -> LanguageModel:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
        identity = ModelIdentity("tiny", "0", "0", "resid_post.1")
        return LanguageModel(model.eval(), tokenizer, identity, torch.device("cpu"))

    return made


def build(family: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return family().eval()


def dictionary_of(d_in: int, d_sae: int = 6, k: int = 6) -> Any:
    made = architecture("topk")(DictionaryConfig(d_sae=d_sae, k=k), d_in)
    made.initialise(0)
    return made


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.from_numpy(IDS).long()).logits


def drawn_masks(units: list[Units]) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(4)
    return masks_of(units, [rng.random(own.num) for own in units], 0.25, "layer")


# --- units -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_that_is_taken_out_gives_nothing(family: Callable[[], Any]):
    model = build(family)
    units = find_units(model, ("mlp", "heads"))
    assert [(own.layer, own.kind, own.num, own.width) for own in units] == [
        (0, "mlp", 24, 1), (0, "heads", 4, 4), (1, "mlp", 24, 1), (1, "heads", 4, 4),
    ]  # fmt: skip
    before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    masks = drawn_masks(units)
    with taken_out(units, masks):
        pruned = logits(model)
    handles = []
    for number, own in enumerate(units):
        kept = torch.from_numpy(~np.repeat(masks[number], own.width))
        handles.append(own.reader.register_forward_pre_hook(lambda _m, args, kept=kept: (args[0] * kept, *args[1:])))
    assert torch.allclose(logits(model), pruned, atol=1e-6) and not torch.allclose(pruned, before, atol=1e-3)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_weights_come_back_after_an_exception():
    model = build(llama)
    before, units = logits(model), find_units(model, ("mlp",))
    with pytest.raises(RuntimeError), taken_out(units, drawn_masks(units)):
        raise RuntimeError
    assert torch.equal(logits(model), before)


def test_a_mixture_of_experts_is_refused():
    config = MixtralConfig(vocab_size=45, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    model = MixtralForCausalLM(config)
    with pytest.raises(PruneError, match="layer 0 has no MLP of one projection in"):
        find_units(model, ("mlp",))
    assert len(find_units(model, ("heads",))) == 1


def test_masks_take_the_least_of_each_layer_or_of_all():
    units = find_units(build(llama), ("mlp",))
    scores = [np.arange(24.0), 100 + np.arange(24.0)]
    by_layer, of_all = (masks_of(units, scores, 0.25, across) for across in ("layer", "model"))
    assert [np.flatnonzero(by_layer[n]).tolist() for n in (0, 1)] == [list(range(6))] * 2
    assert np.flatnonzero(of_all[0]).tolist() == list(range(12)) and not of_all[1].any()
    assert num_weights(units, by_layer) == 12 * 3 * 16


# --- worth -------------------------------------------------------------------------------------------------------


def test_feature_worth_is_the_change_of_activations_to_first_order(lm_of: Callable[[Any], LanguageModel]):
    """Against every gradient taken by itself: of each feature at each token by each unit."""
    lm, features = lm_of(build(llama)), [1, 4]
    dictionary, units = dictionary_of(16), find_units(lm.model, ("mlp", "heads"))
    found, reached = feature_scores(lm, dictionary, ["resid_post.0"], features, units, IDS[:2], draws=400)
    assert reached == [True, True, False, False]
    inputs: dict[int, torch.Tensor] = {}

    def note(number: int) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple) -> tuple:
            inputs[number] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
            return (inputs[number], *args[1:])

        return hook

    handles = [own.reader.register_forward_pre_hook(note(n)) for n, own in enumerate(units[:2])]
    with capture(lm.model, ["resid_post.0"]) as reader:
        x = reader.run(torch.from_numpy(IDS[:2]).long())["resid_post.0"]
    for handle in handles:
        handle.remove()
    active = active_values(dictionary, x.detach(), features) > 0
    z = ((x - dictionary.b_dec) @ dictionary.W_enc[features].T + dictionary.b_enc[features]) * active
    z = z / z.detach().square().sum((0, 1)).sqrt()
    squares = [torch.zeros(2, own.num) for own in units[:2]]
    for index in torch.nonzero(active).tolist():
        gradients = torch.autograd.grad(z[tuple(index)], [inputs[0], inputs[1]], retain_graph=True)
        for n, gradient in enumerate(gradients):
            squares[n] += units[n].of_columns((inputs[n].detach() * gradient).sum(1)).square().detach()
    for n in (0, 1):
        expected = squares[n].sum(0).div(2).sqrt().numpy()
        assert np.corrcoef(expected, found[n])[0, 1] > 0.99
        assert found[n] == pytest.approx(expected, rel=0.25, abs=0.02 * float(expected.max()))


def test_the_neuron_that_writes_a_feature_is_kept(lm_of: Callable[[Any], LanguageModel]):
    lm = lm_of(build(llama))
    dictionary, units = dictionary_of(16), find_units(lm.model, ("mlp",))
    with torch.no_grad():
        units[0].columns[:, 17] = 3.0 * dictionary.W_enc[2]
    scores, _ = feature_scores(lm, dictionary, ["resid_post.0"], [2], units[:1], IDS)
    assert int(scores[0].argmax()) == 17

    def change(masks: dict[int, np.ndarray]) -> float:
        def values() -> torch.Tensor:
            with capture(lm.model, ["resid_post.0"]) as reader, torch.no_grad():
                return active_values(dictionary, reader.run(torch.from_numpy(IDS).long())["resid_post.0"], [2])

        before = values()
        with taken_out(units, masks):
            return float((values() - before).square().sum())

    rng = np.random.default_rng(0)
    by_chance = [change(masks_of(units[:1], [rng.random(24)], 0.5, "layer")) for _ in range(5)]
    assert change(masks_of(units[:1], scores, 0.5, "layer")) < 0.2 * float(np.mean(by_chance))


def test_loss_activation_and_magnitude_by_hand(lm_of: Callable[[Any], LanguageModel]):
    lm = lm_of(build(neox))
    units = find_units(lm.model, ("mlp", "heads"))
    weights = units[1].columns.view(16, 4, 4)
    assert magnitude_scores(units)[1] == pytest.approx(weights.square().sum((0, 2)).sqrt().numpy(), rel=1e-5)
    seen: dict[int, torch.Tensor] = {}
    handle = units[0].reader.register_forward_pre_hook(lambda _m, args: seen.__setitem__(0, args[0].detach()))
    logits(lm.model)
    handle.remove()
    by_hand = seen[0].square().sum((0, 1)).sqrt() * units[0].columns.norm(dim=0)
    assert activation_scores(lm, units, IDS)[0] == pytest.approx(by_hand.numpy(), rel=1e-4)
    # a small scaling of one neuron's input moves the loss by what activation times gradient says
    taylor = loss_scores(lm, units, IDS[:1])[0]
    n = int(taylor.argmax())

    def loss(scale: float) -> float:
        def hook(_module: Any, args: tuple) -> tuple:
            factor = torch.ones(24, dtype=torch.float64)
            factor[n] = scale
            return (args[0] * factor, *args[1:])

        handle, ids = units[0].reader.register_forward_pre_hook(hook), torch.from_numpy(IDS[:1]).long()
        with torch.no_grad():
            out = lm.model.double()(input_ids=ids).logits[0, :-1]
        handle.remove()
        return float(torch.nn.functional.cross_entropy(out, ids[0, 1:], reduction="sum"))

    assert abs(loss(1.001) - loss(0.999)) / 0.002 == pytest.approx(taylor[n], rel=0.01)


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_the_pruned_model(
    family: Callable[[], Any], cut: bool, lm_of: Callable[[Any], LanguageModel], tmp_path: Path
):
    lm = lm_of(build(family))
    units = find_units(lm.model, ("mlp", "heads"))
    masks = drawn_masks(units)
    before = logits(lm.model)
    with taken_out(units, masks):
        expected = logits(lm.model)
    assert write_checkpoint(lm, units, masks, tmp_path / "out", {"share": 0.25}, cut=cut) is cut
    assert torch.equal(logits(lm.model), before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    neurons = find_units(loaded, ("mlp",))[0]
    assert neurons.num == (18 if cut else 24)
    if not cut:
        gone = torch.from_numpy(np.flatnonzero(masks[0]))
        assert float(neurons.columns[:, gone].abs().sum()) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "<s>"
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["pruned"][0]["units"] == np.flatnonzero(masks[0]).tolist()
    with pytest.raises(PruneError, match="is in use"):
        write_checkpoint(lm, units, masks, tmp_path / "out", {}, cut=cut)


# --- the curve ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tiny_run: Path) -> list[int]:
    with Run.open(tiny_run).store() as store:
        return store.sql("SELECT feature FROM features ORDER BY density DESC LIMIT 4")["feature"].to_pylist()


def test_layers_after_the_hook_point_are_left_alone(tiny_run: Path, features: list[int]):
    pruner = Pruner(Run.open(tiny_run), PruneOptions(tuple(features), calibration_windows=4))
    assert {own.layer for own in pruner.units} == {0, 1}  # of 3; the dictionary reads resid_post.1


def test_a_curve_from_the_command_line(
    tiny_run: Path, features: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    named = [part for f in features for part in ("--feature", str(f))]
    main(["prune", str(tiny_run), *named, "--shares", "0.25,0.75", "--random-seeds", "2", "--out", str(tmp_path / "p"),
          "--calibration-windows", "8", "--loss-windows", "8", "--feature-windows", "12", "--json"])  # fmt: skip
    output = capsys.readouterr()
    curve = json.loads(output.out)
    assert "no probe: task conjunction-that" in output.err and "probe_auroc" not in curve["before"]
    assert json.loads((tmp_path / "p" / "pruning.json").read_text()) == curve
    assert (tmp_path / "p" / "pruning.png").read_bytes()[:4] == b"\x89PNG"
    before = curve["before"]
    assert before["ce_increase"]["value"] == before["feature_fvu"]["value"] == 0 and before["kept"]["value"] == 1
    rows = curve["rows"]
    assert len(rows) == 2 * (4 + 2) and {row["parameter_share"] for row in rows if row["share"] == 0.25} == {
        rows[0]["parameter_share"]
    }
    assert all(row["mlp_share"] == row["share"] and row["heads_share"] == row["share"] for row in rows)
    at = {(row["method"], row["seed"], row["share"]): row for row in rows}
    for share in (0.25, 0.75):
        by_chance = [at["random", seed, share]["feature_fvu"]["value"] for seed in (0, 1)]
        assert at["features", 0, share]["feature_fvu"]["value"] < min(by_chance)


def test_a_pruned_model_from_the_command_line(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["prune", str(tiny_run), "--where", "density > 0", "--what", "mlp", "--share", "0.5", "--out",
          str(tmp_path / "m"), "--calibration-windows", "4"])  # fmt: skip
    assert "zeroed" in capsys.readouterr().err  # the last layer is not pruned: widths differ
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    zeros = [int((own.columns.abs().sum(0) == 0).sum()) for own in find_units(loaded, ("mlp",))]
    assert zeros == [32, 32, 0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--feature", "9999"], "no feature 9999"),
        (["--feature", "1", "--shares", "a"], "numbers such as"),
        (["--feature", "1", "--shares", "1.5"], "between 0 and 1"),
        (["--feature", "1", "--task", "nothing"], "no task 'nothing': name a file"),
        (["--feature", "1", "--task", "planted"], "is several tasks: name one of"),
        (["--feature", "1", "--methods", "luck"], "no method 'luck'"),
        (["--feature", "1", "--what", "norms"], "no kind of unit 'norms'"),
        (["--feature", "1", "--across", "all"], "not of 'all'"),
        (["--feature", "1", "--share", "0.5"], "name its folder"),
    ],
)
def test_wrong_options_are_one_line(tiny_run: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(tiny_run), *argv])
    assert caught.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
