"""Language models: the embedded default is a real one, and identity follows the files."""

import shutil
from pathlib import Path

import pytest
import torch

from saeql.pipelines.models import LanguageModel, ModelConfig, ModelError, ModelMismatch, load_model
from saeql.sae.hooks import HookPointError


@pytest.fixture(scope="module")
def embedded() -> LanguageModel:
    return load_model(ModelConfig())


def test_the_embedded_model_knows_a_capital(embedded: LanguageModel):
    ids = embedded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        next_id = int(embedded.model(ids).logits[0, -1].argmax())
    assert embedded.token_texts([next_id]) == [" Paris"]


def test_the_embedded_model_is_whole(embedded: LanguageModel):
    assert embedded.model.config.hidden_size == 576 and embedded.model.config.num_hidden_layers == 30
    assert embedded.identity.hook_point == "resid_post.15"
    assert load_model(ModelConfig()).identity == embedded.identity


def test_token_texts_keep_the_leading_space(embedded: LanguageModel):
    ids = embedded.tokenizer(" river bank", add_special_tokens=False).input_ids
    assert embedded.token_texts(ids) == [" river", " bank"]


def local(folder: Path, hook_point: str = "resid_post.1") -> LanguageModel:
    return load_model(ModelConfig(name=str(folder), hook_point=hook_point, dtype="float32"))


def test_identity_changes_with_weights_tokenizer_and_hook_point(tiny_model_folder: Path, tmp_path: Path):
    first = local(tiny_model_folder).identity
    copy = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    assert local(copy).identity.model_sha256 == first.model_sha256
    first.require(local(copy).identity)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelMismatch, match="model_sha256"):
        first.require(local(copy).identity)
    first.require(local(copy).identity, allow_mismatch=True)
    with pytest.raises(ModelMismatch, match=r"hook_point resid_post\.1"):
        first.require(local(tiny_model_folder, "resid_post.0").identity)


def test_what_cannot_be_loaded_is_named(tiny_model_folder: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"no embedded model .*embedded:smollm2-135m-instruct"):
        load_model(ModelConfig(name="embedded:gpt5"))
    with pytest.raises(ModelError, match="neither a local folder nor reachable"):
        load_model(ModelConfig(name="nobody/has-this"))
    with pytest.raises(HookPointError):
        local(tiny_model_folder, "resid_post.3")
    with pytest.raises(ModelError, match="cannot load model"):
        local(tmp_path)
