"""OpenAI's GPT-2 autoencoders: one `.pt` file with a state dict (github.com/openai/sparse_autoencoder). Read only.

Layout in the file: `pre_bias` [d_in], `latent_bias` [d_sae], `encoder.weight` [d_sae, d_in], `decoder.weight`
[d_in, d_sae], `activation` (a class name) and `activation_state_dict` (k of TopK). With TopK, and only then, every row
is layer-normed first (arXiv 2406.04093, appendix A), which no weights can express: see `input_norm`.
"""

from pathlib import Path

from .files import Config, read_pt
from .weights import DictionaryWeights, ExchangeError

ACTIVATIONS = {"ReLU": "relu", "TopK": "topk"}


def read(path: Path, *, allow_layer_norm: bool) -> DictionaryWeights:
    """The dictionary of a `.pt` file. Raises ExchangeError naming file and field."""
    file = read_pt(path)
    fields = Config(path, file.data)
    architecture = fields.choice("activation", ACTIVATIONS, "ReLU")
    k = None
    if architecture == "topk":
        settings = fields.section("activation_state_dict")
        settings.choice("postact_fn", {"ReLU": "relu"})
        k = settings.get("k", int)
        if not allow_layer_norm:
            raise ExchangeError(
                f'{path}: activation "TopK" comes with a layer norm of every row, which cannot be folded into the '
                "weights; read it with allow_layer_norm=True and keep the input_norm of what you get"
            )
    d_sae, d_in = file.shape("encoder.weight", 2)
    W_enc = file.take("encoder.weight", (d_sae, d_in))
    if "decoder.linear.weight" in file:  # tied: the decoder is the encoder's transpose
        W_dec = file.take("decoder.linear.weight", (d_sae, d_in))
    else:
        W_dec = file.take("decoder.weight", (d_in, d_sae), transpose=True)
    tensors = {
        "W_enc": W_enc,
        "b_enc": file.take("latent_bias", (d_sae,)),
        "W_dec": W_dec,
        "b_dec": file.take("pre_bias", (d_in,)),
    }
    weights = DictionaryWeights(
        architecture=architecture,
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        k=k,
        tensors=tensors,
        subtract_b_dec=True,
        input_norm="layer_norm" if architecture == "topk" else "none",
    )
    return weights.validate(path)
