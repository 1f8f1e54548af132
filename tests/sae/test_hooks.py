"""Hook points of real transformers models with random weights, against output_hidden_states."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saeql.sae.hook_points import HookPointError, hook_points, resolve
from saeql.sae.hooks import capture, edit


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()  # fmt: skip


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)).eval()


def neox() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    return GPTNeoXForCausalLM(config).eval()


@pytest.fixture(params=[llama, gpt2, neox], ids=lambda f: f.__name__)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return request.param()


IDS = torch.tensor([[1, 5, 9, 2], [3, 3, 8, 0]])


@torch.no_grad()
def test_residual_stream_is_what_transformers_reports(model: torch.nn.Module):
    states = model(IDS, output_hidden_states=True).hidden_states
    names = [f"resid_pre.{n}" for n in range(3)] + [f"resid_post.{n}" for n in range(2)]
    with capture(model, names) as reader:
        acts = reader.run(IDS)
    for n in range(3):
        torch.testing.assert_close(acts[f"resid_pre.{n}"], states[n])
    for n in range(2):  # the last entry of hidden_states is taken after the final norm
        torch.testing.assert_close(acts[f"resid_post.{n}"], states[n + 1])


@torch.no_grad()
def test_layers_after_the_deepest_are_not_run(model: torch.nn.Module):
    ran = []
    layers = resolve(model, "resid_post.2").module_path.rsplit(".", 1)[0]
    for n, layer in enumerate(model.get_submodule(layers).children()):
        layer.register_forward_pre_hook(lambda *_args, n=n: ran.append(n))
    with capture(model, ["resid_post.1", "mlp_out.0"]) as reader:
        assert set(reader.run(IDS)) == {"resid_post.1", "mlp_out.0"}
    assert ran == [0, 1]


@torch.no_grad()
def test_mlp_and_attention_outputs_are_those_of_their_modules(model: torch.nn.Module):
    seen = {}
    for kind in ("mlp_out", "attn_out"):
        point = resolve(model, f"{kind}.1")

        def keep(_module: object, _args: object, output: torch.Tensor | tuple, kind: str = kind) -> None:
            seen[kind] = output[0] if isinstance(output, tuple) else output

        model.get_submodule(point.module_path).register_forward_hook(keep)
    model(IDS)
    with capture(model, ["mlp_out.1", "attn_out.1"]) as reader:
        acts = reader.run(IDS)
    torch.testing.assert_close(acts["mlp_out.1"], seen["mlp_out"])
    torch.testing.assert_close(acts["attn_out.1"], seen["attn_out"])


@torch.no_grad()
def test_edit_changes_what_follows_and_is_undone(model: torch.nn.Module):
    before = model(IDS).logits
    for name in ("resid_pre.1", "resid_post.1", "mlp_out.1"):
        with edit(model, name, lambda acts: acts + 1.0):
            assert not torch.allclose(model(IDS).logits, before)
        with edit(model, name, lambda acts: acts):
            torch.testing.assert_close(model(IDS).logits, before)
    torch.testing.assert_close(model(IDS).logits, before)


@torch.no_grad()
def test_editing_the_last_layer_to_zero_leaves_only_the_final_norm(model: torch.nn.Module):
    with edit(model, "resid_post.2", torch.zeros_like):
        logits = model(IDS).logits
    assert torch.allclose(logits, logits[:1, :1].expand_as(logits))


def test_unknown_hook_point_lists_those_that_exist(model: torch.nn.Module):
    with pytest.raises(HookPointError, match=r"resid_post\.0 to resid_post\.2"):
        resolve(model, "resid_post.3")
    with pytest.raises(HookPointError, match=r'did you mean "resid_post\.1"'):
        resolve(model, "resid_pots.1")
    assert len(hook_points(model)) == 15


def test_module_paths_are_hook_points_too():
    point = resolve(llama(), "model.layers.1.mlp")
    assert (point.module_path, point.layer, point.transformer_lens_name) == (
        "model.layers.1.mlp",
        1,
        "model.layers.1.mlp",
    )
    assert resolve(llama(), "resid_post.1").transformer_lens_name == "blocks.1.hook_resid_post"
