"""The container and the three formats that are written: its forward pass by hand, folding, round trips, detection."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saeql.sae.exchange import DictionaryWeights, ExchangeError, detect, read, write

D, D_OUT, M, K = 6, 5, 16, 3


def random_weights(architecture: str, form: str = "autoencoder", d_out: int = D, **settings: Any) -> DictionaryWeights:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    t = {"W_enc": normal(M, D), "W_dec": normal(M, d_out), "b_dec": normal(d_out)}
    if architecture == "gated":
        t |= {"b_gate": normal(M), "r_mag": normal(M) * 0.3, "b_mag": normal(M)}
    else:
        t["b_enc"] = normal(M)
    if architecture == "jumprelu":
        t["threshold"] = normal(M).abs()
    if architecture in ("batchtopk", "matryoshka"):
        t["threshold"] = torch.full((M,), 0.7)
    if form == "skip_transcoder":
        t["W_skip"] = normal(d_out, D)
    k = K if architecture in ("topk", "batchtopk", "matryoshka") else None
    settings = {"metadata": {"model_name": "m"}, **settings}
    return DictionaryWeights(
        architecture=architecture, form=form, d_in=D, d_out=d_out, d_sae=M, k=k, tensors=t, **settings
    )


def rows() -> torch.Tensor:
    return torch.randn(20, D, generator=torch.Generator().manual_seed(3))


def both(weights: DictionaryWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = weights.encode_dense(x)
    return z, weights.decode_dense(z, x)


def assert_identical(a: DictionaryWeights, b: DictionaryWeights) -> None:
    for f in dataclasses.fields(a):
        if f.name != "tensors":
            assert getattr(a, f.name) == getattr(b, f.name), f.name
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


# two latents of two-dimensional rows, every number by hand
SMALL = {
    "W_enc": torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]),
    "b_enc": torch.tensor([0.5, 0.0, -1.0]),
    "W_dec": torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]]),
    "b_dec": torch.tensor([1.0, -1.0]),
}
X = torch.tensor([[2.0, 1.0]])


@pytest.mark.parametrize(
    ("settings", "extra", "z", "y"),
    [
        # pre-activations: 2 + 0.5, 2 * 1, 2 + 1 - 1
        ({"architecture": "relu"}, {}, [2.5, 2, 2], [10.5, 11]),
        # x - b_dec = (1, 2): 1.5, 4, 2
        ({"architecture": "relu", "subtract_b_dec": True}, {}, [1.5, 4, 2], [7.5, 9]),
        ({"architecture": "topk", "k": 1}, {}, [2.5, 0, 0], [8.5, 9]),
        # a threshold is passed only from above
        ({"architecture": "jumprelu"}, {"threshold": torch.tensor([3.0, 1.9, 2.0])}, [0, 2, 0], [1, 1]),
        ({"architecture": "batchtopk", "k": 2}, {"threshold": torch.tensor([2.1] * 3)}, [2.5, 0, 0], [8.5, 9]),
        # norms 5, 1, 1: pre-activations 12.5, 2, 2; decoded after division
        ({"architecture": "topk", "k": 1, "rescale_by_decoder_norm": True}, {}, [12.5, 0, 0], [8.5, 9]),
        # 2 x = (4, 2): 4.5, 4, 5; output halved
        ({"architecture": "relu", "input_scaling": 2.0}, {}, [4.5, 4, 5], [9.75, 10.5]),
        (
            {"architecture": "relu", "form": "skip_transcoder"},
            {"W_skip": torch.tensor([[1.0, 1.0], [0.0, -1.0]])},
            [2.5, 2, 2],
            [13.5, 10],
        ),
        # (2, 1): mean 1.5, deviation sqrt(0.5): (r, -r) with r = sqrt(0.5), up to the epsilon
        ({"architecture": "relu", "input_norm": "layer_norm"}, {}, [1.207107, 0, 0], [4.767767, 4.207107]),
    ],
)
def test_forward_by_hand(settings: dict[str, Any], extra: dict[str, torch.Tensor], z: list, y: list):
    weights = DictionaryWeights(d_in=2, d_out=2, d_sae=3, tensors={**SMALL, **extra}, **settings).validate()
    latents, output = both(weights, X)
    torch.testing.assert_close(latents, torch.tensor([z], dtype=torch.float32), rtol=0, atol=1e-4)
    torch.testing.assert_close(output, torch.tensor([y], dtype=torch.float32), rtol=0, atol=1e-4)


def test_gated_forward_by_hand():
    t = {name: SMALL[name] for name in ("W_enc", "W_dec", "b_dec")}
    t |= {"b_gate": torch.tensor([-2.0, 1.0, -2.9]), "b_mag": torch.tensor([1.0, -1.0, 0.0])}
    t["r_mag"] = torch.tensor([0.0, torch.log(torch.tensor(2.0)), 0.0])
    weights = DictionaryWeights(architecture="gated", d_in=2, d_out=2, d_sae=3, tensors=t).validate()
    # projections 2, 2, 3; gates 0 (shut), 3, 0.1; magnitudes 3, 2 * 2 - 1, 3
    torch.testing.assert_close(weights.encode_dense(X), torch.tensor([[0.0, 3.0, 3.0]]))


def test_batchtopk_without_threshold_shares_k_over_the_batch():
    weights = DictionaryWeights(architecture="batchtopk", d_in=2, d_out=2, d_sae=3, k=1, tensors=SMALL).validate()
    z = weights.encode_dense(torch.tensor([[2.0, 1.0], [10.0, 0.0]]))
    assert z.tolist() == [[0, 0, 0], [10.5, 0, 9.0]]


@pytest.mark.parametrize("architecture", ["relu", "gated", "topk", "jumprelu", "batchtopk", "matryoshka"])
@pytest.mark.parametrize(
    "settings",
    [
        {"rescale_by_decoder_norm": True, "subtract_b_dec": True},
        {"input_scaling": 0.3, "subtract_b_dec": True},
        {"input_scaling": 0.3, "output_scaling": 2.0, "subtract_b_dec": True},
        {"input_scaling": 3.0, "rescale_by_decoder_norm": True},
    ],
    ids=str,
)
def test_folding_changes_nothing(architecture: str, settings: dict[str, Any]):
    weights = random_weights(architecture, **settings)
    folded = weights.folded().validate()
    assert (folded.rescale_by_decoder_norm, folded.input_scaling, folded.output_scaling) == (False, None, None)
    for a, b in zip(both(weights, rows()), both(folded, rows()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (both(weights, rows())[0] != 0).any()


@pytest.mark.parametrize("architecture", ["relu", "gated", "topk", "jumprelu"])
def test_subtraction_moves_into_the_biases_and_back(architecture: str):
    weights = random_weights(architecture, subtract_b_dec=True)
    moved = weights.with_subtraction(False)
    assert not moved.subtract_b_dec
    for other in (moved, moved.with_subtraction(True)):
        torch.testing.assert_close(both(other, rows())[1], both(weights, rows())[1], rtol=1e-4, atol=1e-4)


def test_folding_scales_the_skip_connection():
    weights = random_weights("relu", "skip_transcoder", D_OUT, input_scaling=0.3, output_scaling=2.0)
    for a, b in zip(both(weights, rows()), both(weights.folded(), rows()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_folding_a_zero_decoder_row_is_refused():
    weights = random_weights("topk", rescale_by_decoder_norm=True)
    weights.tensors["W_dec"][4] = 0
    with pytest.raises(ExchangeError, match=r"row 4 of W_dec is zero"):
        weights.folded()


SUBTRACTED: dict[str, Any] = {"subtract_b_dec": True}
ROUND_TRIPS = [
    ("saelens", random_weights("relu", **SUBTRACTED)),
    ("saelens", random_weights("relu", metadata={"hook_name": "h.hook_z", "reshape_activations": "hook_z"})),
    ("saelens", random_weights("gated", **SUBTRACTED)),
    ("saelens", random_weights("topk", **SUBTRACTED)),
    ("saelens", random_weights("jumprelu", **SUBTRACTED)),
    ("saelens", random_weights("relu", "transcoder", D_OUT)),
    ("saelens", random_weights("relu", "skip_transcoder", D_OUT)),
    ("saelens", random_weights("jumprelu", "transcoder", D_OUT)),
    ("saelens", random_weights("jumprelu", "skip_transcoder", D_OUT)),
    ("saelens", random_weights("relu", input_norm="layer_norm")),
    ("sparsify", random_weights("topk", **SUBTRACTED)),
    ("sparsify", random_weights("topk", "transcoder")),
    ("sparsify", random_weights("topk", "skip_transcoder")),
    ("sparsify", random_weights("topk", "skip_transcoder", **SUBTRACTED)),
    ("dictionary_learning", random_weights("relu", **SUBTRACTED)),
    ("dictionary_learning", random_weights("gated", **SUBTRACTED)),
    ("dictionary_learning", random_weights("topk", metadata={"threshold": 0.25}, **SUBTRACTED)),
    ("dictionary_learning", random_weights("batchtopk", **SUBTRACTED)),
    ("dictionary_learning", random_weights("matryoshka", metadata={"group_sizes": [4, 12]}, **SUBTRACTED)),
    ("dictionary_learning", random_weights("jumprelu")),
    ("dictionary_learning", random_weights("relu", "transcoder", **SUBTRACTED)),
]


@pytest.mark.parametrize(
    ("format", "weights"), ROUND_TRIPS, ids=[f"{f}-{w.architecture}-{w.form}" for f, w in ROUND_TRIPS]
)
def test_round_trip_is_exact(format: str, weights: DictionaryWeights, tmp_path: Path):
    folder = write(weights, tmp_path / "d", format)
    assert detect(folder) == format
    assert not [p.name for p in folder.iterdir() if ".tmp." in p.name]
    assert_identical(read(folder, allow_layer_norm=True), weights)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_saelens_holds_batchtopk_as_jumprelu_and_says_so(architecture: str, tmp_path: Path):
    weights = random_weights(architecture, subtract_b_dec=True)
    back = read(write(weights, tmp_path, "saelens"))
    assert back.architecture == "jumprelu" and back.k is None
    assert back.metadata == {"model_name": "m", "trained_architecture": architecture, "trained_k": K}
    assert all(torch.equal(a, b) for a, b in zip(both(back, rows()), both(weights, rows()), strict=True))


@pytest.mark.parametrize(
    ("format", "weights"),
    [
        ("saelens", random_weights("topk", rescale_by_decoder_norm=True)),
        ("saelens", random_weights("jumprelu", rescale_by_decoder_norm=True, input_scaling=2.0)),
        ("sparsify", random_weights("topk", rescale_by_decoder_norm=True)),
        ("sparsify", random_weights("topk")),
        ("dictionary_learning", random_weights("relu")),
        ("dictionary_learning", random_weights("jumprelu", subtract_b_dec=True, input_scaling=0.5)),
    ],
)
def test_what_a_format_cannot_say_is_folded(format: str, weights: DictionaryWeights, tmp_path: Path):
    back = read(write(weights, tmp_path, format))
    for a, b in zip(both(weights, rows()), both(back, rows()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "weights", "message"),
    [
        ("saelens", random_weights("topk", "transcoder"), r"SAELens has no class for a topk transcoder"),
        ("saelens", random_weights("relu", "crosscoder"), r"SAELens has no class for a relu crosscoder"),
        ("sparsify", random_weights("relu"), r"sparsify holds topk only"),
        ("sparsify", random_weights("topk", "transcoder", D_OUT), r"sparsify needs d_in = d_out, got 6 and 5"),
        ("dictionary_learning", random_weights("relu", "skip_transcoder"), r"no class for a relu skip_transcoder"),
        ("dictionary_learning", random_weights("topk", input_norm="layer_norm"), r"has no layer_norm"),
        ("gemma_scope", random_weights("relu"), r"unknown format 'gemma_scope'; there is saelens, sparsify"),
        ("saelens", random_weights("relu", metadata={"a": torch.ones(1)}), r"cfg.json: metadata cannot be written"),
    ],
)
def test_writing_what_cannot_be_represented(format: str, weights: DictionaryWeights, message: str, tmp_path: Path):
    with pytest.raises(ExchangeError, match=message):
        write(weights, tmp_path, format)


def test_matryoshka_widths_become_group_sizes(tmp_path: Path):
    weights = random_weights("matryoshka", subtract_b_dec=True, metadata={"matryoshka_widths": [4, 9, M]})
    assert read(write(weights, tmp_path, "dictionary_learning")).metadata["group_sizes"] == [4, 5, 7]


def test_batchtopk_needs_one_threshold_for_dictionary_learning(tmp_path: Path):
    weights = random_weights("batchtopk", subtract_b_dec=True)
    weights.tensors["threshold"][3] = 2
    with pytest.raises(ExchangeError, match=r"BatchTopKSAE needs one threshold.*write it as jumprelu"):
        write(weights, tmp_path, "dictionary_learning")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topkk"}, r"^file: unknown architecture 'topkk'; there is relu, gated"),
        ({"form": "coder"}, r"unknown form 'coder'"),
        ({"d_sae": 0}, r"d_sae must be at least 1"),
        ({"d_sae": 17}, r"W_enc has shape \(16, 6\), expected \(17, 6\)"),
        ({"k": 17}, r"k must lie between 1 and d_sae \(16\), got 17"),
        ({"k": None}, r"needs k"),
        ({"d_out": 5}, r"an autoencoder needs d_in = d_out, got 6 and 5"),
        ({"input_scaling": -1.0}, r"input_scaling must be a positive number"),
        ({"form": "skip_transcoder"}, r"needs tensor W_skip"),
        ({"architecture": "jumprelu"}, r"needs tensor threshold"),
        ({"architecture": "gated"}, r"has no tensor b_enc, only W_enc, b_gate"),
        ({"form": "transcoder", "input_norm": "layer_norm"}, r"layer_norm is defined for autoencoders"),
    ],
)
def test_validation_names_source_and_field(changes: dict[str, Any], message: str):
    with pytest.raises(ExchangeError, match=message):
        dataclasses.replace(random_weights("topk"), **changes).validate("file")


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "b_enc holds values"), (torch.float16, "is torch.float16")]
)
def test_validation_of_values(value: Any, message: str):
    weights = random_weights("relu")
    if isinstance(value, float):
        weights.tensors["b_enc"][2] = value
    else:
        weights.tensors["b_enc"] = weights.tensors["b_enc"].to(value)
    with pytest.raises(ExchangeError, match=message):
        weights.validate()


def test_detection_says_what_it_looked_for(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        ExchangeError, match=r"Looked for saelens: cfg.json, sae_weights.safetensors; .*Found notes.txt"
    ):
        read(tmp_path)
    with pytest.raises(ExchangeError, match=r"does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(ExchangeError, match=r"unknown format 'onnx'"):
        read(tmp_path, "onnx")


def test_a_file_of_a_folder_names_the_folder(tmp_path: Path):
    weights = random_weights("topk", subtract_b_dec=True)
    write(weights, tmp_path, "saelens")
    assert_identical(read(tmp_path / "cfg.json"), weights)
    assert_identical(read(tmp_path / "sae_weights.safetensors", "saelens"), weights)


def test_two_formats_in_one_folder(tmp_path: Path):
    weights = random_weights("topk", subtract_b_dec=True)
    write(weights, tmp_path, "saelens")
    with pytest.raises(ExchangeError, match=r"already holds a dictionary in the format saelens"):
        write(weights, tmp_path, "sparsify")
    write(weights, tmp_path, "saelens")  # the same one is overwritten
    (tmp_path / "sae.safetensors").write_bytes((tmp_path / "sae_weights.safetensors").read_bytes())
    with pytest.raises(ExchangeError, match=r"could be saelens or sparsify; say which"):
        read(tmp_path)
    assert_identical(read(tmp_path, "saelens"), weights)


def test_written_saelens_config(tmp_path: Path):
    write(random_weights("topk", subtract_b_dec=True), tmp_path, "saelens")
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        "architecture": "topk",
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "k": K,
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "m"},
    }
