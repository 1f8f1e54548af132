"""The dictionary directory: names, shapes, config keys, and a forward pass computed by hand in the field's layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saeql.sae.architectures import build
from saeql.sae.config import DictionaryConfig
from saeql.sae.files import DictionaryError, load_dictionary, save_density, save_dictionary
from saeql.sae.model import SparseAutoencoder, geometric_median

D_IN, D_SAE, K = 12, 40, 5


@pytest.fixture
def dictionary() -> SparseAutoencoder:
    made = build(DictionaryConfig(d_sae=D_SAE, k=K), D_IN, seed=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.b_enc.copy_(torch.randn(D_SAE, generator=generator) * 0.1)
        made.b_dec.copy_(torch.randn(D_IN, generator=generator))
        made.W_enc.add_(torch.randn(D_SAE, D_IN, generator=generator) * 0.1)
    made.metadata = {"model_name": "m", "hook_name": "blocks.1.hook_resid_post", "saeql": {"seed": 4}}
    return made


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(30, D_IN, generator=torch.Generator().manual_seed(2))


def forward_by_hand(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """SAELens's top-k forward pass with apply_b_dec_to_input, from the file alone."""
    w, k = load_file(folder / "sae_weights.safetensors"), json.loads((folder / "cfg.json").read_text())["k"]
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    values, indices = pre.topk(k, dim=1)
    acts = torch.zeros_like(pre).scatter_(1, indices, values.relu())
    return acts @ w["W_dec"] + w["b_dec"]


def test_saved_directory_is_what_saelens_reads(dictionary: SparseAutoencoder, x: torch.Tensor, tmp_path: Path):
    save_dictionary(dictionary, tmp_path)
    save_density(tmp_path, torch.full((D_SAE,), 0.01))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert {k: v for k, v in config.items() if k != "metadata"} == {
        "architecture": "topk",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    assert load_file(tmp_path / "sparsity.safetensors")["sparsity"].tolist() == pytest.approx([-2.0] * D_SAE)
    torch.testing.assert_close(dictionary(x), forward_by_hand(tmp_path, x))


def test_loading_gives_the_same_dictionary(dictionary: SparseAutoencoder, x: torch.Tensor, tmp_path: Path):
    loaded = load_dictionary(save_dictionary(dictionary, tmp_path))
    assert torch.equal(loaded(x), dictionary(x))
    assert loaded.metadata["hook_name"] == dictionary.metadata["hook_name"]
    assert loaded.metadata["saeql"]["seed"] == 4 and loaded.config == dictionary.config


def damage(folder: Path, what: str) -> None:
    weights, config = load_file(folder / "sae_weights.safetensors"), json.loads((folder / "cfg.json").read_text())
    if what == "truncated":
        file = folder / "sae_weights.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        return
    if what == "no weights":
        (folder / "sae_weights.safetensors").unlink()
        return
    if what == "not json":
        (folder / "cfg.json").write_text("{")
        return
    if what == "nan":
        weights["b_enc"][3] = float("nan")
    if what == "missing":
        del weights["b_dec"]
    save_file(weights, folder / "sae_weights.safetensors")
    changes = {
        "shape": ("d_sae", 41),
        "architecture": ("architecture", "topkk"),
        "k": ("k", 41),
        "norm": ("normalize_activations", "layer_norm"),
    }
    if what in changes:
        config[changes[what][0]] = changes[what][1]
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"sae_weights.safetensors is damaged"),
        ("no weights", r"sae_weights.safetensors is missing"),
        ("not json", r"cfg.json is not JSON"),
        ("nan", r"b_enc holds values that are not finite"),
        ("missing", r"has no tensor b_dec"),
        ("shape", r"W_enc has shape \(12, 40\), cfg.json says \(12, 41\)"),
        ("architecture", r'unknown architecture "topkk".*did you mean "topk"'),
        ("k", r"dictionary.k must lie between"),
        ("norm", r"normalize_activations = 'layer_norm' is not supported"),
    ],
)
def test_damaged_directories_name_file_and_field(
    dictionary: SparseAutoencoder, tmp_path: Path, what: str, message: str
):
    damage(save_dictionary(dictionary, tmp_path), what)
    with pytest.raises(DictionaryError, match=message):
        load_dictionary(tmp_path)


def test_no_directory(tmp_path: Path):
    with pytest.raises(DictionaryError, match=r"cfg\.json is missing"):
        load_dictionary(tmp_path / "nothing")


def test_geometric_median_resists_outliers_and_is_optimal():
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = geometric_median(rows)
    rows[:40] += 1000
    assert (geometric_median(rows) - clean).norm() < 0.5 < (rows.mean(0) - clean).norm()
    point = geometric_median(rows, num_steps=500, tolerance=1e-12)
    gradient = ((point - rows) / (point - rows).norm(dim=1, keepdim=True)).sum(0)
    assert gradient.norm() < 1e-3
