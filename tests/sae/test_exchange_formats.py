"""Files in the layout of each library, forward passes computed from those very tensors the way that library does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saeql.sae.exchange import DictionaryWeights, ExchangeError, read

D, D_OUT, M, K = 6, 5, 16, 3
Tensors = dict[str, torch.Tensor]


def normal(**shapes: tuple[int, ...]) -> Tensors:
    """Named random tensors; a double underscore stands for the dot of a state dict."""
    generator = torch.Generator().manual_seed(11)
    return {name.replace("__", "."): torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def rows() -> torch.Tensor:
    return torch.randn(20, D, generator=torch.Generator().manual_seed(3))


def save(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def save_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def topk(pre: torch.Tensor, k: int = K) -> torch.Tensor:
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def assert_computes(weights: DictionaryWeights, z: torch.Tensor, y: torch.Tensor) -> None:
    assert (z > 0).any() and (z == 0).any()
    latents = weights.encode_dense(rows())
    torch.testing.assert_close(latents, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.decode_dense(latents, rows()), y, rtol=1e-5, atol=1e-5)


def saelens_tensors() -> Tensors:
    return normal(W_enc=(D, M), b_enc=(M,), W_dec=(M, D), b_dec=(D,))


OLD = {"d_in": D, "d_sae": M, "hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2", "dtype": "torch.float32"}


def test_saelens_before_6(tmp_path: Path):
    t = saelens_tensors()
    save(tmp_path / "sae_weights.safetensors", t | {"scaling_factor": torch.ones(M)})
    old = {"normalize_activations": False, "hook_point_layer": 3, "hook_point_head_index": None, "l1_coefficient": 1}
    save_json(tmp_path / "cfg.json", OLD | old)
    weights = read(tmp_path)
    z = ((rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    assert_computes(weights, z, z @ t["W_dec"] + t["b_dec"])
    assert weights.architecture == "relu"
    assert weights.metadata == {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3}


def test_saelens_before_6_topk_without_subtraction(tmp_path: Path):
    t = saelens_tensors()
    save(tmp_path / "sae_weights.safetensors", t)
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": False}
    save_json(tmp_path / "cfg.json", OLD | old | {"normalize_activations": None, "architecture": "standard"})
    z = topk(rows() @ t["W_enc"] + t["b_enc"])
    assert_computes(read(tmp_path), z, z @ t["W_dec"] + t["b_dec"])


def test_saelens_before_6_attention_heads_are_flattened(tmp_path: Path):
    save(tmp_path / "sae_weights.safetensors", saelens_tensors())
    save_json(tmp_path / "cfg.json", OLD | {"hook_point": "blocks.3.attn.hook_z"})
    assert read(tmp_path).metadata["reshape_activations"] == "hook_z"


def test_saelens_before_6_finetuned(tmp_path: Path):
    t = saelens_tensors()
    factor = torch.rand(M) + 0.5
    save(tmp_path / "sae_weights.safetensors", t | {"scaling_factor": factor})
    save_json(tmp_path / "cfg.json", OLD | {"finetuning_scaling_factor": True})
    z = ((rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    assert_computes(read(tmp_path), z, (z * factor) @ t["W_dec"] + t["b_dec"])
    save_json(tmp_path / "cfg.json", OLD)
    with pytest.raises(ExchangeError, match=r"scaling_factor is set, but cfg.json does not say"):
        read(tmp_path)


def test_saelens_other_activations_are_refused(tmp_path: Path):
    save_json(tmp_path / "cfg.json", OLD | {"activation_fn_str": "tanh-relu"})
    save(tmp_path / "sae_weights.safetensors", saelens_tensors())
    with pytest.raises(ExchangeError, match=r"activation_fn 'tanh-relu' cannot be represented"):
        read(tmp_path)


NEW = {"d_in": D, "d_sae": M, "metadata": {"sae_lens_version": "6.20.0", "hook_name": "h"}}


def test_saelens_training_checkpoint(tmp_path: Path):
    t = saelens_tensors()
    save(tmp_path / "sae_weights.safetensors", t | {"topk_threshold": torch.tensor(1.5, dtype=torch.double)})
    settings = {"architecture": "matryoshka_batchtopk", "k": 3.0, "matryoshka_widths": [4, M]}
    scaled = {"normalize_activations": "expected_average_only_in", "rescale_acts_by_decoder_norm": True}
    save_json(tmp_path / "cfg.json", NEW | settings | scaled)
    with pytest.raises(ExchangeError, match=r"'expected_average_only_in' without its factor"):
        read(tmp_path)
    save_json(tmp_path / "activation_scaler.json", {"scaling_factor": 0.7})
    weights = read(tmp_path)
    pre = ((0.7 * rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * t["W_dec"].norm(dim=1)
    z = pre.relu() * (pre > 1.5)
    assert_computes(weights, z, (z / t["W_dec"].norm(dim=1) @ t["W_dec"] + t["b_dec"]) / 0.7)
    assert (weights.architecture, weights.k) == ("matryoshka", 3)
    assert weights.metadata == {"hook_name": "h", "matryoshka_widths": [4, M]}


def test_saelens_log_threshold_and_hook_z(tmp_path: Path):
    t = saelens_tensors() | normal(log_threshold=(M,))
    save(tmp_path / "sae_weights.safetensors", {name: tensor.bfloat16() for name, tensor in t.items()})
    save_json(tmp_path / "cfg.json", NEW | {"architecture": "jumprelu", "reshape_activations": "hook_z"})
    t = {name: tensor.bfloat16().float() for name, tensor in t.items()}
    pre = (rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    z = pre.relu() * (pre > t["log_threshold"].exp())
    weights = read(tmp_path)
    assert_computes(weights, z, z @ t["W_dec"] + t["b_dec"])
    assert weights.metadata["reshape_activations"] == "hook_z"


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_saelens_norms_that_cannot_be_folded(norm: str, tmp_path: Path):
    save(tmp_path / "sae_weights.safetensors", saelens_tensors())
    save_json(tmp_path / "cfg.json", NEW | {"architecture": "standard", "normalize_activations": norm})
    with pytest.raises(ExchangeError, match=rf"cfg.json: normalize_activations = .{norm}"):
        read(tmp_path)
    if norm == "layer_norm":
        assert read(tmp_path, allow_layer_norm=True).input_norm == "layer_norm"


def test_sparsify(tmp_path: Path):
    folder = tmp_path / "run" / "layers.5.mlp"
    t = normal(encoder__weight=(M * 2, D), encoder__bias=(M * 2,), W_dec=(M * 2, D), b_dec=(D,), W_skip=(D, D))
    save(folder / "sae.safetensors", t)
    config = {"activation": "topk", "expansion_factor": 2, "num_latents": M * 2, "k": K, "d_in": D}
    save_json(folder / "cfg.json", config | {"multi_topk": True, "skip_connection": True, "transcode": True})
    save_json(folder.parent / "config.json", {"model": "pythia", "ctx_len": 512, "sae": {}})
    weights = read(folder)
    z = topk((rows() @ t["encoder.weight"].t() + t["encoder.bias"]).relu())
    assert_computes(weights, z, z @ t["W_dec"] + rows() @ t["W_skip"].t() + t["b_dec"])
    assert weights.form == "skip_transcoder"
    assert weights.metadata == {"model_name": "pythia", "context_size": 512, "hf_hook_name": "layers.5.mlp"}
    save_json(folder / "cfg.json", config | {"activation": "groupmax"})
    with pytest.raises(ExchangeError, match=r"cfg.json: unknown activation 'groupmax'; there is topk"):
        read(folder)


def test_sparsify_signed_latents_are_refused(tmp_path: Path):
    save_json(tmp_path / "cfg.json", {"num_latents": M, "k": K, "d_in": D, "signed": True})
    save(tmp_path / "sae.safetensors", normal(W_dec=(M, D)))
    with pytest.raises(ExchangeError, match=r"cfg.json: signed = True cannot be represented, only False"):
        read(tmp_path)


def test_sparsify_width_by_expansion_factor(tmp_path: Path):
    t = normal(encoder__weight=(4 * D, D), encoder__bias=(4 * D,), W_dec=(4 * D, D), b_dec=(D,))
    save(tmp_path / "sae.safetensors", t)
    save_json(tmp_path / "cfg.json", {"expansion_factor": 4, "num_latents": 0, "k": K, "d_in": D})
    z = topk(((rows() - t["b_dec"]) @ t["encoder.weight"].t() + t["encoder.bias"]).relu())
    assert_computes(read(tmp_path), z, z @ t["W_dec"] + t["b_dec"])


def dictionary_learning(folder: Path, name: str, state: Mapping[str, Any], file: str = "ae.pt", **trainer: Any) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / file)
    fields = {"dict_class": name, "activation_dim": D, "dict_size": M, "lm_name": "pythia", "layer": 3, **trainer}
    save_json(folder / "config.json", {"trainer": fields, "buffer": {"io": "out", "ctx_len": 64}})


def test_dictionary_learning_batchtopk_and_its_checkpoints(tmp_path: Path):
    t = normal(encoder__weight=(M, D), encoder__bias=(M,), decoder__weight=(D, M), b_dec=(D,))
    state = t | {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.9)}
    dictionary_learning(tmp_path, "BatchTopKSAE", state, k=K)
    post = ((rows() - t["b_dec"]) @ t["encoder.weight"].t() + t["encoder.bias"]).relu()
    z = post * (post > 0.9)
    y = z @ t["decoder.weight"].t() + t["b_dec"]
    assert_computes(read(tmp_path), z, y)
    assert read(tmp_path).metadata == {"model_name": "pythia", "hook_layer": 3, "context_size": 64}
    dictionary_learning(tmp_path, "BatchTopKSAE", state, "checkpoints/ae_1000.pt", k=K)
    assert_computes(read(tmp_path / "checkpoints" / "ae_1000.pt"), z, y)
    dictionary_learning(tmp_path, "BatchTopKSAE", state, k=K + 1)
    with pytest.raises(ExchangeError, match=r"ae.pt: k is 3, config.json says 4"):
        read(tmp_path)


def test_dictionary_learning_before_a_threshold_was_measured(tmp_path: Path):
    t = normal(W_enc=(D, M), b_enc=(M,), W_dec=(M, D), b_dec=(D,))
    state = t | {"k": torch.tensor(K), "threshold": torch.tensor(-1.0), "group_sizes": torch.tensor([4, 12])}
    dictionary_learning(tmp_path, "MatryoshkaBatchTopKSAE", state, k=K)
    z = ((rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    assert_computes(read(tmp_path), z, z @ t["W_dec"] + t["b_dec"])
    dictionary_learning(tmp_path, "MatryoshkaBatchTopKSAE", state | {"group_sizes": torch.tensor([4, 11])}, k=K)
    with pytest.raises(ExchangeError, match=r"group_sizes \[4, 11\] must be positive and sum to 16"):
        read(tmp_path)


def test_dictionary_learning_april_update_class(tmp_path: Path):
    t = normal(encoder__weight=(M, D), encoder__bias=(M,), decoder__weight=(D, M), decoder__bias=(D,))
    dictionary_learning(tmp_path, "AutoEncoderNew", t)
    z = (rows() @ t["encoder.weight"].t() + t["encoder.bias"]).relu()
    assert_computes(read(tmp_path), z, z @ t["decoder.weight"].t() + t["decoder.bias"])


@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope(lower: bool, tmp_path: Path):
    folder = tmp_path / "layer_3" / "width_16k" / "average_l0_7"
    folder.mkdir(parents=True)
    t = normal(W_enc=(D, M), b_enc=(M,), W_dec=(M, D), b_dec=(D,), threshold=(M,))
    t["threshold"] = t["threshold"].abs()
    named = {("w" + name[1:] if lower and name[0] == "W" else name): tensor.numpy() for name, tensor in t.items()}
    arrays: dict[str, Any] = dict(named)
    np.savez(folder / "params.npz", **arrays)
    pre = rows() @ t["W_enc"] + t["b_enc"]
    z = pre.relu() * (pre > t["threshold"])
    weights = read(folder)
    assert_computes(weights, z, z @ t["W_dec"] + t["b_dec"])
    assert (weights.form, weights.metadata["gemma_scope"]) == ("autoencoder", "layer_3/width_16k/average_l0_7")
    assert read(folder / "params.npz").d_sae == M
    folder.rename(tmp_path / "transcoder")
    assert read(tmp_path / "transcoder").form == "transcoder"


def test_gemma_scope_2(tmp_path: Path):
    t = normal(w_enc=(D, M), b_enc=(M,), w_dec=(M, D_OUT), b_dec=(D_OUT,), threshold=(M,))
    skip = normal(affine_skip_connection=(D, D_OUT))
    save(tmp_path / "params.safetensors", t | skip)
    points = {"hf_hook_point_in": "model.layers.3.a.output", "hf_hook_point_out": "model.layers.3.b.output"}
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": True, **points}
    save_json(tmp_path / "config.json", config)
    pre = rows() @ t["w_enc"] + t["b_enc"]
    z = pre.relu() * (pre > t["threshold"])
    weights = read(tmp_path)
    y = z @ t["w_dec"] + t["b_dec"]
    assert_computes(weights, z, y + rows() @ skip["affine_skip_connection"])
    assert weights.form == "skip_transcoder" and weights.metadata["hf_hook_name_out"] == points["hf_hook_point_out"]
    save(tmp_path / "params.safetensors", t)
    with pytest.raises(ExchangeError, match=r"affine_skip_connection disagrees with affine_connection of config.json"):
        read(tmp_path)
    save_json(tmp_path / "config.json", config | {"affine_connection": False})
    assert_computes(read(tmp_path), z, y)
    assert read(tmp_path).form == "transcoder"
    save(tmp_path / "params.safetensors", t | {"w_dec": torch.ones(M, 2, D_OUT)})
    with pytest.raises(ExchangeError, match=r"w_dec has 3 axes: a cross-layer transcoder"):
        read(tmp_path)


@pytest.mark.parametrize(("out", "form"), [("a", "autoencoder"), (None, "autoencoder"), ("b", "transcoder")])
def test_gemma_scope_2_form_is_decided_by_its_hook_points(out: str | None, form: str, tmp_path: Path):
    save(tmp_path / "params.safetensors", normal(w_enc=(D, M), b_enc=(M,), w_dec=(M, D), b_dec=(D,), threshold=(M,)))
    config = {"architecture": "jump_relu", "hf_hook_point_in": "a", "hf_hook_point_out": out}
    save_json(tmp_path / "config.json", config)
    assert read(tmp_path).form == form


def openai(path: Path, **fields: Any) -> Tensors:
    t = normal(pre_bias=(D,), latent_bias=(M,), encoder__weight=(M, D), decoder__weight=(D, M))
    torch.save({**t, "stats_last_nonzero": torch.zeros(M, dtype=torch.long), **fields}, path)
    return t


def test_openai_relu(tmp_path: Path):
    t = openai(tmp_path / "8.pt", activation="ReLU", activation_state_dict={})
    z = ((rows() - t["pre_bias"]) @ t["encoder.weight"].t() + t["latent_bias"]).relu()
    for path in (tmp_path, tmp_path / "8.pt"):
        assert_computes(read(path), z, z @ t["decoder.weight"].t() + t["pre_bias"])


def test_openai_tied(tmp_path: Path):
    t = normal(pre_bias=(D,), latent_bias=(M,), encoder__weight=(M, D))
    torch.save({**t, "decoder.linear.weight": t["encoder.weight"]}, tmp_path / "8.pt")
    z = ((rows() - t["pre_bias"]) @ t["encoder.weight"].t() + t["latent_bias"]).relu()
    assert_computes(read(tmp_path), z, z @ t["encoder.weight"] + t["pre_bias"])


def test_openai_topk_normalises_rows(tmp_path: Path):
    t = openai(tmp_path / "8.pt", activation="TopK", activation_state_dict={"k": K, "postact_fn": "ReLU"})
    with pytest.raises(ExchangeError, match=r'8.pt: activation "TopK" comes with a layer norm'):
        read(tmp_path / "8.pt")
    weights = read(tmp_path / "8.pt", allow_layer_norm=True)
    mean, deviation = rows().mean(1, keepdim=True), rows().std(1, keepdim=True)
    x = (rows() - mean) / (deviation + 1e-5)
    z = topk((x - t["pre_bias"]) @ t["encoder.weight"].t() + t["latent_bias"])
    assert_computes(weights, z, (z @ t["decoder.weight"].t() + t["pre_bias"]) * deviation + mean)
    assert weights.k == K and weights.input_norm == "layer_norm"


def test_openai_other_activations_are_refused(tmp_path: Path):
    openai(tmp_path / "8.pt", activation="Identity")
    with pytest.raises(ExchangeError, match=r"8.pt: unknown activation 'Identity'; there is ReLU, TopK"):
        read(tmp_path)
    openai(tmp_path / "8.pt", activation="TopK", activation_state_dict={"k": K, "postact_fn": "Identity"})
    with pytest.raises(ExchangeError, match=r"unknown activation_state_dict.postact_fn 'Identity'"):
        read(tmp_path, allow_layer_norm=True)


LLAMA = {"d_model": D, "d_sae": M, "hook_point_in": "blocks.3.hook_a", "norm_activation": "dataset-wise"}
LINEAR = {"encoder__weight": (M, D), "encoder__bias": (M,), "decoder__weight": (D, M), "decoder__bias": (D,)}


def test_llama_scope(tmp_path: Path):
    t = normal(**LINEAR)
    save(tmp_path / "checkpoints" / "final.safetensors", t)
    config = LLAMA | {"act_fn": "jumprelu", "jump_relu_threshold": 2.0, "hook_point_out": "blocks.3.hook_b"}
    save_json(tmp_path / "hyperparams.json", config | {"dataset_average_activation_norm": {"in": 3.0, "out": 8.0}})
    scale_in, scale_out = D**0.5 / 3, D**0.5 / 8
    pre = scale_in * rows() @ t["encoder.weight"].t() + t["encoder.bias"]
    # as it was measured: scales folded in, decoder rows of norm 1
    measured = pre * t["decoder.weight"].norm(dim=0) / scale_out
    z = pre.relu() * (measured > 2.0)
    weights = read(tmp_path)
    assert_computes(weights, z, (z @ t["decoder.weight"].t() + t["decoder.bias"]) / scale_out)
    assert weights.form == "transcoder" and weights.metadata["hook_name_out"] == "blocks.3.hook_b"
    save_json(tmp_path / "hyperparams.json", config)
    with pytest.raises(ExchangeError, match=r"dataset_average_activation_norm.out is None"):
        read(tmp_path)


def llamascopium(folder: Path, tensors: Tensors, **config: Any) -> None:
    norm = {"dataset_average_activation_norm.blocks.3.hook_a": torch.tensor(3.0)}
    save(folder / "sae_weights.safetensors", tensors | norm)
    fields = {"sae_type": "sae", "d_model": D, "expansion_factor": M / D, "hook_point_out": "blocks.3.hook_a"}
    save_json(folder / "config.json", LLAMA | fields | config)


def test_llamascopium_jumprelu(tmp_path: Path):
    t = normal(W_E=(D, M), b_E=(M,), W_D=(M, D), b_D=(D,))
    log = normal(log_jumprelu_threshold=(M,))["log_jumprelu_threshold"]
    t["W_D"][2] = 0  # a latent without a direction never passes
    llamascopium(tmp_path, t | {"activation_function.log_jumprelu_threshold": log}, act_fn="jumprelu")
    scale = D**0.5 / 3
    pre = scale * rows() @ t["W_E"] + t["b_E"]
    z = pre * (pre * t["W_D"].norm(dim=1) > log.exp())
    assert (z[:, 2] == 0).all()
    assert_computes(read(tmp_path), z, (z @ t["W_D"] + t["b_D"]) / scale)
    llamascopium(
        tmp_path, t | {"log_jumprelu_threshold": log}, act_fn="jumprelu", norm_activation="inference",
        sparsity_include_decoder_norm=False,
    )  # fmt: skip
    pre = rows() @ t["W_E"] + t["b_E"]
    z = pre * (pre > log.exp())
    assert_computes(read(tmp_path), z, z @ t["W_D"] + t["b_D"])


def test_llamascopium_topk_chooses_by_decoder_norm(tmp_path: Path):
    t = normal(W_E=(D, M), b_E=(M,), W_D=(M, D), b_D=(D,))
    llamascopium(tmp_path, t, act_fn="topk", top_k=K)
    scale, norms = D**0.5 / 3, t["W_D"].norm(dim=1)
    scaled = topk((scale * rows() @ t["W_E"] + t["b_E"]) * norms)
    assert_computes(read(tmp_path), scaled, (scaled / norms @ t["W_D"] + t["b_D"]) / scale)


def test_llama_scope_r1_layout(tmp_path: Path):
    t = normal(**LINEAR, log_jumprelu_threshold=(M,))
    llamascopium(tmp_path, t, act_fn="jumprelu", norm_activation="inference", sparsity_include_decoder_norm=False)
    pre = rows() @ t["encoder.weight"].t() + t["encoder.bias"]
    z = pre * (pre > t["log_jumprelu_threshold"].exp())
    assert_computes(read(tmp_path), z, z @ t["decoder.weight"].t() + t["decoder.bias"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_activation": "token-wise"}, r"norm_activation 'token-wise' depends on every row"),
        ({"use_glu_encoder": True}, r"use_glu_encoder = True cannot be represented"),
        ({"sae_type": "crosscoder"}, r"unknown sae_type 'crosscoder'; there is sae"),
        ({"hook_point_out": "elsewhere"}, r"the average norm at elsewhere is None"),
        ({"act_fn": "jumprelu"}, r"has no tensor activation_function.log_jumprelu_threshold"),
    ],
)
def test_llamascopium_refusals(config: dict[str, Any], message: str, tmp_path: Path):
    llamascopium(tmp_path, normal(W_E=(D, M), b_E=(M,), W_D=(M, D), b_D=(D,)), **config)
    with pytest.raises(ExchangeError, match=message):
        read(tmp_path)
