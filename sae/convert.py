"""Between our dictionaries and the container of the exchange formats."""

from dataclasses import replace

import torch

from .architectures import architecture
from .config import DictionaryConfig
from .exchange.weights import DictionaryWeights, ExchangeError
from .model import SparseAutoencoder


def to_weights(dictionary: SparseAutoencoder) -> DictionaryWeights:
    """The container of a dictionary, for `exchange.write` or for its naive reference forward pass."""
    config, extra = dictionary.config, dictionary.extra_tensors()
    kind = config.architecture
    if kind == "matryoshka" and config.matryoshka_selection == "topk":
        kind, extra = "topk", {}
    tensors = {"W_enc": dictionary.W_enc, "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec, **extra}
    if "b_gate" not in extra:
        tensors["b_enc"] = dictionary.b_enc
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip
    return DictionaryWeights(
        architecture=kind,
        form=config.form,
        d_in=dictionary.d_in,
        d_out=dictionary.d_out,
        d_sae=dictionary.d_sae,
        k=config.k if kind in ("topk", "batchtopk", "matryoshka") else None,
        tensors={name: t.detach().float().clone() for name, t in tensors.items()},
        subtract_b_dec=dictionary.reads_what_it_writes,
        metadata={k: v for k, v in dictionary.metadata.items() if k != "saeql"},
    ).validate()


def from_weights(weights: DictionaryWeights) -> SparseAutoencoder:
    """A dictionary of ours with the same latents and output.

    An encoder that reads x where ours reads x - b_dec gets the difference in its bias. Raises ExchangeError for what
    our models cannot be: a layer norm of every row, BatchTopK without a threshold or with many.
    """
    weights = weights.folded()
    if weights.input_norm != "none" or weights.rescale_by_decoder_norm:
        raise ExchangeError(f"a dictionary with input_norm {weights.input_norm!r} cannot become one of saeql's")
    reads_own = weights.form in ("autoencoder", "crosscoder")
    if weights.subtract_b_dec != reads_own:
        weights = weights.with_subtraction(reads_own)
    kind, tensors = weights.architecture, weights.tensors
    if kind in ("batchtopk", "matryoshka"):
        if "threshold" not in tensors:
            raise ExchangeError(f"a {kind} dictionary without a threshold cannot encode single rows")
        same = bool((tensors["threshold"] == tensors["threshold"][0]).all())
        kind = kind if same else "jumprelu"
    settings = DictionaryConfig(architecture=kind, form=weights.form, d_sae=weights.d_sae)
    if weights.k is not None:
        settings = replace(settings, k=weights.k)
    made = architecture(kind)(settings, weights.d_in, weights.d_out)
    with torch.no_grad():
        made.load_extra(tensors)
        for name in {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"} & tensors.keys():
            getattr(made, name).copy_(tensors[name])
    made.metadata = dict(weights.metadata)
    return made
