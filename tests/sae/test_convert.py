"""Our dictionaries and the exchange container mean the same, both ways."""

from itertools import product
from pathlib import Path

import pytest
import torch

from saeql.sae.architectures import ARCHITECTURES, build
from saeql.sae.config import FORMS, DictionaryConfig
from saeql.sae.convert import from_weights, to_weights
from saeql.sae.exchange import read, write
from saeql.sae.exchange.weights import DictionaryWeights, ExchangeError
from saeql.sae.files import load_dictionary, save_dictionary
from saeql.sae.model import SparseAutoencoder
from saeql.sae.objective import loss_terms

CASES = list(product(ARCHITECTURES, FORMS))


def made(architecture: str, form: str) -> tuple[SparseAutoencoder, torch.Tensor]:
    config = DictionaryConfig(architecture=architecture, form=form, d_sae=32, k=4)
    dictionary = build(config, 10, 10 if form in ("autoencoder", "crosscoder") else 7, seed=1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 10, generator=generator)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        loss_terms(dictionary, x, x[:, : dictionary.d_out], None, auxk_coefficient=0.0)
    return dictionary, torch.randn(40, 10, generator=generator)


@pytest.mark.parametrize(("architecture", "form"), CASES, ids=lambda v: v)
@torch.no_grad()
def test_the_container_means_the_same(architecture: str, form: str):
    dictionary, x = made(architecture, form)
    weights = to_weights(dictionary)
    z = weights.encode_dense(x)
    torch.testing.assert_close(dictionary.encode(x).to_dense(), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dictionary(x), weights.decode_dense(z, x), rtol=1e-4, atol=1e-5)
    again = from_weights(weights)
    torch.testing.assert_close(again(x), dictionary(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["relu", "gated", "topk", "jumprelu"])
@torch.no_grad()
def test_what_we_save_is_what_the_exchange_reads(architecture: str, tmp_path: Path):
    dictionary, x = made(architecture, "autoencoder")
    weights = read(save_dictionary(dictionary, tmp_path / "ours"), "saelens")
    torch.testing.assert_close(weights.decode_dense(weights.encode_dense(x), x), dictionary(x), rtol=1e-4, atol=1e-5)
    loaded = load_dictionary(write(to_weights(dictionary), tmp_path / "theirs", "saelens"))
    torch.testing.assert_close(loaded(x), dictionary(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["jumprelu", "gated", "topk", "relu"])
@torch.no_grad()
def test_an_encoder_that_reads_x_as_it_is_becomes_ours(architecture: str):
    dictionary, x = made(architecture, "autoencoder")
    ours = to_weights(dictionary)
    theirs = DictionaryWeights(**{**vars(ours), "subtract_b_dec": False})
    converted = from_weights(theirs)
    torch.testing.assert_close(converted.encode(x).to_dense(), theirs.encode_dense(x), rtol=1e-4, atol=1e-4)


def test_what_our_models_cannot_be_is_refused():
    weights = to_weights(made("batchtopk", "autoencoder")[0])
    bare = DictionaryWeights(
        **{**vars(weights), "tensors": {k: v for k, v in weights.tensors.items() if k != "threshold"}}
    )
    with pytest.raises(ExchangeError, match="without a threshold"):
        from_weights(bare)
