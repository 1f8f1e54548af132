"""Every supported family, built tiny and random from its configuration, against what transformers and plain hooks say.

The places of `Truth` are written out here, from the modelling files, and share nothing with the table in the library.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from saeql.pipelines.model_build import build, is_causal, skeleton
from saeql.pipelines.model_config import ModelConfig
from saeql.sae.hook_points import Anatomy, anatomy, hook_points, layer_stack, resolve
from saeql.sae.hooks import capture, edit

NUM_LAYERS = 3
COMMON: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA: dict[str, Any] = {**COMMON, "num_key_value_heads": 1}
HEADS: dict[str, Any] = {**GQA, "head_dim": 8}
GPT2: dict[str, Any] = {"vocab_size": 50, "n_embd": 16, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
OPT: dict[str, Any] = {
    **{k: COMMON[k] for k in COMMON if k != "intermediate_size"},
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
}
MOE: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
SPARSE: dict[str, Any] = {**MOE, "shared_expert_intermediate_size": 8}


def added(layer: Any, pre: torch.Tensor, attn: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
    """Norms before attention and MLP, one after the other or in parallel: the stream is a sum."""
    return pre + attn + mlp


def opt_normed(layer: Any, pre: torch.Tensor, attn: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
    """Norms after each sum, as in OPT-350m."""
    return layer.final_layer_norm(layer.self_attn_layer_norm(pre + attn) + mlp)


def bert_normed(layer: Any, pre: torch.Tensor, attn: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
    """Norms after each sum, as in BERT."""
    return layer.output.LayerNorm(layer.attention.output.LayerNorm(pre + attn) + mlp)


@dataclass(frozen=True)
class Truth:
    """A family's layers, the modules below a layer that its places are at, and how a layer's output comes about."""

    config: Callable[[], Any]
    layers: str
    attn_out: str
    mlp_in: str
    mlp_out: str
    sum: Callable[..., torch.Tensor] = added


def llama_like(config_class: str, options: dict = GQA, **more: Any) -> Truth:
    return Truth(lambda: getattr(hf, config_class)(**options, **more), "model.layers", "self_attn", "mlp", "mlp")


def sandwich(config_class: str, options: dict) -> Truth:
    layers, after = "model.layers", ("post_attention_layernorm", "mlp", "post_feedforward_layernorm")
    return Truth(lambda: getattr(hf, config_class)(**options), layers, *after)


FAMILIES = {
    "llama": llama_like("LlamaConfig"),
    "mistral": llama_like("MistralConfig", sliding_window=4),
    "qwen2": llama_like("Qwen2Config"),
    "qwen3": llama_like("Qwen3Config", HEADS),
    "gemma2": sandwich("Gemma2Config", {**HEADS, "sliding_window": 4}),
    "gemma3": sandwich("Gemma3TextConfig", {**HEADS, "sliding_window": 4}),
    "gpt2": Truth(lambda: hf.GPT2Config(**GPT2), "transformer.h", "attn", "mlp", "mlp"),
    "neox": Truth(lambda: hf.GPTNeoXConfig(**COMMON), "gpt_neox.layers", "attention", "mlp", "mlp"),
    "neox-sequential": Truth(
        lambda: hf.GPTNeoXConfig(**COMMON, use_parallel_residual=False), "gpt_neox.layers", "attention", "mlp", "mlp"
    ),
    "opt": Truth(lambda: hf.OPTConfig(**OPT), "model.decoder.layers", "self_attn", "fc1", "fc2"),
    "opt-350m": Truth(
        lambda: hf.OPTConfig(**{**OPT, "word_embed_proj_dim": 8}, do_layer_norm_before=False),
        "model.decoder.layers", "self_attn", "fc1", "fc2", opt_normed,
    ),
    "phi": llama_like("PhiConfig", COMMON),
    "phi3": llama_like("Phi3Config"),
    "olmo": llama_like("OlmoConfig"),
    "olmo2": sandwich("Olmo2Config", GQA),
    "mixtral": llama_like("MixtralConfig", HEADS, num_local_experts=4),
    "qwen2-moe": llama_like("Qwen2MoeConfig", {**GQA, **SPARSE}),
    "qwen3-moe": llama_like("Qwen3MoeConfig", {**HEADS, **MOE}),
    "bloom": Truth(
        lambda: hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=NUM_LAYERS, n_head=2, bos_token_id=1,
                               eos_token_id=2, pad_token_id=0),
        "transformer.h", "self_attention.dense", "mlp", "mlp.dense_4h_to_h",
    ),
    "mpt": Truth(
        lambda: hf.MptConfig(vocab_size=50, d_model=16, n_layers=NUM_LAYERS, n_heads=2, max_seq_len=32),
        "transformer.blocks", "attn", "ffn", "ffn.down_proj",
    ),
    # not in the library's table: by structure
    "falcon": Truth(
        lambda: hf.FalconConfig(**{k: v for k, v in COMMON.items() if k != "intermediate_size"}),
        "transformer.h", "self_attention", "mlp", "mlp",
    ),
    "starcoder2": llama_like("Starcoder2Config"),
    "gptj": Truth(lambda: hf.GPTJConfig(**GPT2, rotary_dim=4), "transformer.h", "attn", "mlp", "mlp"),
    "bert": Truth(
        lambda: hf.BertConfig(**COMMON, architectures=["BertForMaskedLM"]), "bert.encoder.layer",
        "attention.output.dense", "intermediate", "output.dense", bert_normed,
    ),
    "modernbert": Truth(
        lambda: hf.ModernBertConfig(**COMMON, cls_token_id=1, sep_token_id=2, local_attention=4,
                                    architectures=["ModernBertForMaskedLM"]),
        "model.layers", "attn", "mlp", "mlp",
    ),
}  # fmt: skip
ENCODERS = ("bert", "modernbert")
IDS = torch.tensor([[1, 5, 9, 2, 7, 8], [1, 3, 8, 4, 6, 11]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Built:
    name: str
    truth: Truth
    model: Any
    folder: Path

    def place(self, kind: str, n: int) -> tuple[nn.Module, bool]:
        """Module of a place, and whether the place is its input."""
        below = "" if kind.startswith("resid") else f".{getattr(self.truth, kind)}"
        return self.model.get_submodule(f"{self.truth.layers}.{n}{below}"), kind in ("resid_pre", "mlp_in")


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    truth = FAMILIES[request.param]
    torch.manual_seed(0)
    with torch.random.fork_rng():
        auto = hf.AutoModelForMaskedLM if request.param in ENCODERS else hf.AutoModelForCausalLM
        model = auto.from_config(truth.config(), dtype=torch.float32).eval()
        for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return Built(request.param, truth, model.requires_grad_(False), folder)


@contextmanager
def by_hand(built: Built, kind: str, n: int, fn: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """A plain torch hook at a place; what `fn` returns takes the place of what was there, in its shape."""
    module, is_input = built.place(kind, n)

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
        old = args[0] if args else kwargs["hidden_states"]
        new = fn(old)
        if new is None:
            return None
        new = new.reshape(old.shape)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        old = output[0] if isinstance(output, tuple) else output
        new = fn(old)
        if new is None:
            return None
        new = new.reshape(old.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if is_input:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    yield
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)], ids=["whole", "right-padded", "left-padded"])
def test_what_is_captured_is_what_the_model_computes(family: Built, mask: torch.Tensor | None):
    names = [f"{kind}.{n}" for n in range(NUM_LAYERS) for kind in KINDS]
    assert hook_points(family.model) == names
    states = family.model(IDS, attention_mask=mask, output_hidden_states=True).hidden_states
    with capture(family.model, names) as reader:
        acts = reader.run(IDS, mask)
    for n in range(NUM_LAYERS):
        torch.testing.assert_close(acts[f"resid_pre.{n}"], states[n], rtol=0, atol=0)
        if n < NUM_LAYERS - 1:  # the last entry of hidden_states is taken after the final norm
            torch.testing.assert_close(acts[f"resid_post.{n}"], states[n + 1], rtol=0, atol=0)
        layer = family.model.get_submodule(f"{family.truth.layers}.{n}")
        parts = (acts[f"{kind}.{n}"] for kind in ("resid_pre", "attn_out", "mlp_out"))
        torch.testing.assert_close(family.truth.sum(layer, *parts), acts[f"resid_post.{n}"], rtol=1e-5, atol=1e-5)
    for kind in ("attn_out", "mlp_in", "mlp_out"):
        seen: list[torch.Tensor] = []
        with by_hand(family, kind, 1, lambda old, seen=seen: seen.append(old.clone())):
            family.model(IDS, attention_mask=mask)
        torch.testing.assert_close(acts[f"{kind}.1"], seen[0].reshape(*IDS.shape, -1), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_editing_is_replacing_by_hand(family: Built, kind: str):
    new = torch.randn(*IDS.shape, 16, generator=torch.Generator().manual_seed(1))
    before = family.model(IDS, attention_mask=MASK).logits
    with by_hand(family, kind, 1, lambda _: new.clone()):
        expected = family.model(IDS, attention_mask=MASK).logits
    with edit(family.model, f"{kind}.1", lambda acts: new.clone()):
        edited = family.model(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(edited, expected, rtol=0, atol=0)
    assert not torch.allclose(edited, before, atol=1e-3)
    with edit(family.model, f"{kind}.1", lambda acts: acts + 0.0):
        torch.testing.assert_close(family.model(IDS, attention_mask=MASK).logits, before, rtol=0, atol=0)


@torch.no_grad()
def test_layers_after_the_deepest_are_not_run_and_truncated_not_kept(family: Built):
    names = ("resid_post.1", "mlp_in.0", "attn_out.1")
    ran: list[int] = []
    for n, layer in enumerate(layer_stack(family.model)[1]):
        layer.register_forward_pre_hook(lambda *_args, n=n: ran.append(n))
    with capture(family.model, list(names)) as reader:
        whole = dict(reader.run(IDS, MASK))
    assert ran == [0, 1]

    options = {"name": str(family.folder), "hook_point": names[0], "more_hook_points": names[1:]}
    device = torch.device("cpu")
    kept = build(family.folder, ModelConfig(**options), torch.float32, device)
    short = build(family.folder, ModelConfig(**options, truncate=True), torch.float32, device)
    with capture(short, list(names)) as reader:
        for name, acts in reader.run(IDS, MASK).items():
            torch.testing.assert_close(acts, whole[name], rtol=0, atol=0)
    saved = sum(bytes_of(p) for p in layer_stack(kept)[1][2].parameters())
    assert parameter_bytes(kept) - parameter_bytes(short) >= saved > 0
    head = kept.get_output_embeddings().weight
    if head is not kept.get_input_embeddings().weight:
        assert parameter_bytes(kept) - parameter_bytes(short) >= saved + bytes_of(head)
    assert is_causal(kept) == (family.name not in ENCODERS)


def bytes_of(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def parameter_bytes(model: nn.Module) -> int:
    return sum(bytes_of(p) for p in model.parameters())


def test_the_skeleton_has_the_same_hook_points_without_weights(family: Built):
    bare = skeleton(family.folder, ModelConfig(name=str(family.folder)))
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    for name in hook_points(family.model):
        assert resolve(bare, name) == resolve(family.model, name)


def test_table_and_structure_agree_where_structure_is_enough(family: Built):
    layer = layer_stack(family.model)[1][0]
    config = family.model.config
    family.model.config = None  # no model_type to look up
    try:
        by_structure = anatomy(family.model, layer)
    finally:
        family.model.config = config
    truth = Anatomy(family.truth.attn_out, family.truth.mlp_in, family.truth.mlp_out)
    assert anatomy(family.model, layer) == truth
    assert (by_structure == truth) == (family.name not in ("bloom", "mpt"))
