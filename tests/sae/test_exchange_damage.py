"""Damaged and hostile files: one clear error that names file and field, and nothing of theirs is ever run."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saeql.sae.exchange import DictionaryWeights, ExchangeError, read, write

D, M, K = 6, 16, 3
FILES = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
}


@pytest.fixture(params=FILES)
def format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(format: str, tmp_path: Path) -> Path:
    t = {"W_enc": torch.randn(M, D), "b_enc": torch.randn(M), "W_dec": torch.randn(M, D), "b_dec": torch.randn(D)}
    weights = DictionaryWeights(
        architecture="topk", d_in=D, d_out=D, d_sae=M, k=K, tensors=t, subtract_b_dec=True, metadata={"model_name": "m"}
    )
    return write(weights, tmp_path / "d", format)


def load(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)


def store(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, file) if file.suffix == ".pt" else save_file(tensors, file)


def refused(path: Path, format: str, *parts: str) -> None:
    with pytest.raises(ExchangeError) as caught:
        read(path, format)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_truncated_weights(folder: Path, format: str, share: float):
    file = folder / FILES[format][1]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    refused(folder, format, file.name, "damaged")


@pytest.mark.parametrize("which", [0, 1])
def test_missing_files(folder: Path, format: str, which: int):
    (folder / FILES[format][which]).unlink()
    refused(folder, format, f"{FILES[format][which]} is missing")


@pytest.mark.parametrize("text", ["{", "[]", "\x00\xff", '"a"', "[" * 100_000])
def test_config_is_not_an_object(folder: Path, format: str, text: str):
    (folder / FILES[format][0]).write_text(text)
    refused(folder, format, FILES[format][0], "is not")


def test_nan_wrong_shape_and_missing_tensor(folder: Path, format: str):
    file = folder / FILES[format][1]
    good = load(file)
    names = [name for name, tensor in good.items() if tensor.ndim]
    assert len(names) == 4
    for name in names:
        for value in (float("nan"), float("inf")):
            bad = {other: tensor.clone() for other, tensor in good.items()}
            bad[name].view(-1)[1] = value
            store(file, bad)
            refused(folder, format, f"{file.name}: {name} holds values that are not finite")
        store(file, good | {name: good[name][:-1].clone()})
        refused(folder, format, f"{file.name}: {name} has shape", "expected")
        store(file, {other: tensor for other, tensor in good.items() if other != name})
        refused(folder, format, f"{file.name} has no tensor {name}")
        store(file, good | {name: good[name] > 0})
        refused(folder, format, f"{file.name}: {name} is not a tensor of numbers")


def edit(folder: Path, format: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / FILES[format][0]
    config = json.loads(path.read_text())
    change(config["trainer"] if format == "dictionary_learning" else config)
    path.write_text(json.dumps(config))


KEYS = {
    "saelens": ("d_in", "d_sae", "k"),
    "sparsify": ("d_in", "num_latents", "k"),
    "dictionary_learning": ("activation_dim", "dict_size", "k"),
}


def test_config_values(folder: Path, format: str):
    path = folder / FILES[format][0]
    good = path.read_text()
    for key in KEYS[format]:
        for value in ("12", True, 7.5, [1]):
            edit(folder, format, lambda config, key=key, value=value: config.update({key: value}))
            refused(folder, format, path.name, key, "must be a int")
            path.write_text(good)
        if key != "num_latents":  # absent means the expansion factor there
            edit(folder, format, lambda config, key=key: config.pop(key))
            refused(folder, format, f"{path.name} has no key", key)
            path.write_text(good)
    edit(folder, format, lambda config: config.update({KEYS[format][1]: M + 1}))
    refused(folder, format, FILES[format][1], "has shape", "17")


@pytest.mark.parametrize("k", [0, -1, M + 1])
def test_k_outside_its_range(folder: Path, format: str, k: int):
    edit(folder, format, lambda config: config.update(k=k))
    if format == "dictionary_learning":
        state = load(folder / "ae.pt")
        store(folder / "ae.pt", state | {"k": torch.tensor(k)})
    refused(folder, format, FILES[format][0], f"k must lie between 1 and d_sae (16), got {k}")


def test_unknown_architecture(folder: Path, format: str):
    key = {"saelens": "architecture", "sparsify": "activation", "dictionary_learning": "dict_class"}[format]
    edit(folder, format, lambda config: config.update({key: "temporal"}))
    refused(
        folder, format, FILES[format][0], f"unknown {'trainer.' if 'dict' in key else ''}{key} 'temporal'; there is"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_is_an_exchange_error_or_a_dictionary(folder: Path, format: str):
    generator = random.Random(0)
    for name in FILES[format]:
        good = (folder / name).read_bytes()
        for _ in range(100):
            bad = bytearray(good)
            for _ in range(generator.randint(1, 4)):
                bad[generator.randrange(len(bad))] = generator.randrange(256)
            (folder / name).write_bytes(bad)
            try:
                read(folder, format)
            except ExchangeError as error:
                assert str(folder) in str(error)
        (folder / name).write_bytes(good)


class Hostile:
    """Makes a file wherever it is unpickled by a loader that runs what it is told."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["ae.pt", "8.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(name: str, zipped: bool, tmp_path: Path):
    witness = tmp_path / "witness"
    file = tmp_path / "d" / name
    file.parent.mkdir()
    state = {"encoder.weight": torch.ones(M, D), "activation": Hostile(witness)}
    if zipped:
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state["activation"]))
    (tmp_path / "d" / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": M}})
    )
    format = "openai" if name == "8.pt" else "dictionary_learning"
    refused(file, format, f"{file} was not loaded")
    assert not witness.exists()
    if zipped:
        refused(file, format, "its pickle asks to run or build getattr; only tensors are loaded")
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert witness.exists()  # it would have done it


def test_pickled_arrays_are_refused_and_not_run(tmp_path: Path):
    witness = tmp_path / "witness"
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "params.npz"
    np.savez(file, W_enc=np.array([Hostile(witness)], dtype=object))
    refused(tmp_path / "d", "gemma_scope", f"{file} is damaged or holds more than arrays")
    assert not witness.exists()
    np.load(file, allow_pickle=True)["W_enc"]
    assert witness.exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY\x01\x00", b"plain text"])
def test_damaged_archives(data: bytes, tmp_path: Path):
    (tmp_path / "params.npz").write_bytes(data)
    refused(tmp_path, "gemma_scope", "params.npz is")


def test_a_single_array_is_no_archive(tmp_path: Path):
    with (tmp_path / "params.npz").open("wb") as file:
        np.save(file, np.ones(3))
    refused(tmp_path, "gemma_scope", "params.npz is not an archive of arrays")


@pytest.mark.parametrize("data", [torch.ones(3), ["a"], 5])
def test_pt_without_a_state_dict(data: Any, tmp_path: Path):
    torch.save(data, tmp_path / "8.pt")
    refused(tmp_path / "8.pt", "openai", "8.pt is not a state dict")


def test_openai_with_a_wrong_axis_count(tmp_path: Path):
    torch.save({"encoder.weight": torch.ones(M)}, tmp_path / "8.pt")
    refused(tmp_path / "8.pt", "openai", "8.pt: encoder.weight must have 2 axes, found (16,)")
    torch.save({"decoder.weight": torch.ones(M)}, tmp_path / "8.pt")
    refused(tmp_path / "8.pt", "openai", "8.pt has no tensor encoder.weight; it has decoder.weight")
