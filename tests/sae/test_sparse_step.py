"""Gradients that are made without autograd against those of the stated loss, in every form."""

from itertools import product

import pytest
import torch

from saeql.sae import sparse_step as module
from saeql.sae.architectures import build
from saeql.sae.config import FORMS, DictionaryConfig
from saeql.sae.model import SparseAutoencoder
from saeql.sae.objective import loss_terms
from saeql.sae.sparse_step import sparse_step

D_IN, D_OUT, D_SAE, K, N = 12, 9, 40, 4, 23
SELECTING = ("topk", "batchtopk")


def made(architecture: str, form: str) -> tuple[SparseAutoencoder, torch.Tensor, torch.Tensor]:
    """A dictionary away from its start, so that no gradient is zero by symmetry; rows and targets."""
    alike = form in ("autoencoder", "crosscoder")
    dictionary = build(DictionaryConfig(architecture=architecture, form=form, d_sae=D_SAE, k=K), D_IN,
                       D_IN if alike else D_OUT, seed=1)  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(N, D_IN, generator=generator)
    return dictionary, x, x if alike else torch.randn(N, D_OUT, generator=generator)


@pytest.mark.parametrize("num_dead", [0, 5, 17])
@pytest.mark.parametrize("worth", [(0.0, 0.0), (0.0, 1e9), (1e9, 0.0)], ids=["sparse", "product", "dense"])
@pytest.mark.parametrize(("architecture", "form"), list(product(SELECTING, FORMS)))
def test_gradients_are_those_of_the_loss(
    architecture: str, form: str, worth: tuple[float, float], num_dead: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_dense_worth", lambda pre: worth[0])
    monkeypatch.setattr(module, "_product_worth", lambda pre: worth[1])
    dictionary, x, y = made(architecture, form)
    dead = torch.arange(3, 3 + 2 * num_dead, 2)
    threshold = getattr(dictionary, "threshold", torch.zeros(())).clone()
    step = sparse_step(dictionary, x, y, dead, auxk_coefficient=0.5)
    if architecture == "batchtopk":
        assert dictionary.get_buffer("threshold") != threshold
        dictionary.get_buffer("threshold").copy_(threshold)
    terms, outcome = loss_terms(dictionary, x, y, dead, auxk_coefficient=0.5)
    terms.total.backward()
    for one, other in zip(step.terms, terms, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6)
    assert float(step.terms.auxiliary) > 0 or not num_dead
    assert set(step.fired.tolist()) == set(outcome.fired.tolist()) and step.num_active == outcome.num_active
    enc, dec = step.weights.dense(backend="reference")
    got = {"W_enc": enc, "W_dec": dec, **step.others}
    expected = {name: p.grad for name, p in dictionary.named_parameters()}
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None
        error = float((got[name] - grad).norm() / grad.norm())
        assert error <= 1e-5, f"{name}: {error}"
    if num_dead:
        assert enc[dead].abs().sum(1).all() and dec[dead].abs().sum(1).all()
    torch.testing.assert_close(
        step.weights.square_norm(),
        (expected["W_enc"].square().sum() + expected["W_dec"].square().sum()),  # pyright: ignore[reportOptionalMemberAccess]
    )


@pytest.mark.parametrize("worth", [(0.0, 0.0), (0.0, 1e9), (1e9, 0.0)], ids=["sparse", "product", "dense"])
def test_a_narrow_encoder_gives_nearly_the_same(worth: tuple[float, float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_dense_worth", lambda pre: worth[0])
    monkeypatch.setattr(module, "_product_worth", lambda pre: worth[1])
    dictionary, x, y = made("topk", "autoencoder")
    dead = torch.arange(0, 34, 2)
    wide = sparse_step(dictionary, x, y, dead, auxk_coefficient=0.5)
    cast = dictionary.W_enc.detach().bfloat16()
    narrow = sparse_step(dictionary, x, y, dead, auxk_coefficient=0.5, matmul_dtype=torch.bfloat16, W_enc_cast=cast)
    torch.testing.assert_close(narrow.terms.total, wide.terms.total, rtol=0.03, atol=0)
    cosine = torch.nn.functional.cosine_similarity(
        torch.cat(wide.weights.dense(backend="reference")).flatten(),
        torch.cat(narrow.weights.dense(backend="reference")).flatten(),
        dim=0,
    )
    assert cosine > 0.97
