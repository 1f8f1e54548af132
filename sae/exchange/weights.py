"""`DictionaryWeights`: one dictionary as plain tensors, whatever library trained it and whatever file it came from.

Every reader returns one and every writer takes one, so n formats need 2n functions and not n^2. Names and layout are
ours: both weights feature-major, `W_enc` [d_sae, d_in] and `W_dec` [d_sae, d_out]. `encode_dense` and `decode_dense`
are the meaning of the fields: slow, dense, and the reference that converters and fast models are compared with.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = ("relu", "gated", "topk", "batchtopk", "jumprelu", "matryoshka")
FORMS = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder")
INPUT_NORMS = ("none", "layer_norm")
#: Added to the standard deviation by the layer norm of both libraries that have one (it is not under the root).
LAYER_NORM_EPS = 1e-5
GATED_VECTORS = ("b_gate", "r_mag", "b_mag")
#: Architectures whose latents are the same for a row whatever batch it comes in, given a threshold.
BATCH_ARCHITECTURES = ("batchtopk", "matryoshka")


class ExchangeError(ValueError):
    """A file of a dictionary is missing, damaged or not representable; the message names file and field."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DictionaryWeights:
    """One dictionary: kind, sizes, tensors (float32) and how its input is treated.

    With all switches at their defaults it works on raw activations:
    `z = activation(W_enc (x - b_dec if subtract_b_dec) + b_enc)` and `y = z W_dec + b_dec + W_skip x`.
    `folded()` brings the others to their defaults wherever that changes nothing.
    """

    architecture: str
    """One of ARCHITECTURES: which activation."""
    form: str = "autoencoder"
    """One of FORMS. A crosscoder's `d_in` and `d_out` count all of its sources and targets side by side."""
    d_in: int
    d_out: int
    d_sae: int
    k: int | None = None
    """Latents kept: of every row (topk), on average (batchtopk, matryoshka; there only a note where a threshold is)."""
    tensors: dict[str, Tensor]
    """W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; threshold [d_sae] (jumprelu, batchtopk,
    matryoshka); b_gate, r_mag, b_mag [d_sae] in place of b_enc (gated); W_skip [d_out, d_in] (skip_transcoder)."""
    subtract_b_dec: bool = False
    """The encoder reads x - b_dec."""
    rescale_by_decoder_norm: bool = False
    """Pre-activations are multiplied by the norms of the decoder rows, and latents divided by them when decoding."""
    input_scaling: float | None = None
    """The dictionary was trained on `input_scaling * x`."""
    output_scaling: float | None = None
    """It reconstructs `output_scaling * y`; unset means the same as `input_scaling`."""
    input_norm: str = "none"
    """"layer_norm": x is centred and divided by its standard deviation before, and y undone after. Cannot be folded."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """model_name, hook_name, hf_hook_name and whatever else the file says of the dictionary's origin."""

    def validate(self, source: object = "dictionary") -> "DictionaryWeights":
        """Itself. Raises ExchangeError naming `source` (a file) and the field that is wrong."""
        self._check_kind(source)
        shapes = self.shapes()
        for name, tensor in self.tensors.items():
            if name not in shapes:
                expected = ", ".join(shapes)
                raise ExchangeError(
                    f"{source}: a {self.architecture} {self.form} has no tensor {name}, only {expected}"
                )
            check_tensor(source, name, tensor, shapes[name])
            if tensor.dtype != torch.float32:
                raise ExchangeError(f"{source}: {name} is {tensor.dtype}, the container holds torch.float32")
        missing = [name for name in shapes if name not in self.tensors and name not in self._optional()]
        if missing:
            raise ExchangeError(f"{source}: a {self.architecture} {self.form} needs tensor {', '.join(missing)}")
        if self.architecture in BATCH_ARCHITECTURES and self.k is None and "threshold" not in self.tensors:
            raise ExchangeError(f"{source}: {self.architecture} needs k or a threshold")
        return self

    def _check_kind(self, source: object) -> None:
        check_choice(source, "architecture", self.architecture, ARCHITECTURES)
        check_choice(source, "form", self.form, FORMS)
        check_choice(source, "input_norm", self.input_norm, INPUT_NORMS)
        for name in ("d_in", "d_out", "d_sae"):
            if getattr(self, name) < 1:
                raise ExchangeError(f"{source}: {name} must be at least 1, got {getattr(self, name)}")
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise ExchangeError(f"{source}: k must lie between 1 and d_sae ({self.d_sae}), got {self.k}")
        if self.architecture == "topk" and self.k is None:
            raise ExchangeError(f"{source}: a topk dictionary needs k")
        if self.d_in != self.d_out and (self.form == "autoencoder" or self.subtract_b_dec):
            what = "subtract_b_dec" if self.subtract_b_dec else "an autoencoder"
            raise ExchangeError(f"{source}: {what} needs d_in = d_out, got {self.d_in} and {self.d_out}")
        for name in ("input_scaling", "output_scaling"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ExchangeError(f"{source}: {name} must be a positive number, got {value}")
        if self.input_norm != "none" and self.form != "autoencoder":
            raise ExchangeError(f"{source}: {self.input_norm} is defined for autoencoders, not for a {self.form}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that this kind of dictionary may hold."""
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (self.d_sae, self.d_in)}
        shapes |= dict.fromkeys(GATED_VECTORS if self.architecture == "gated" else ("b_enc",), (self.d_sae,))
        shapes |= {"W_dec": (self.d_sae, self.d_out), "b_dec": (self.d_out,)}
        if self.architecture in ("jumprelu", *BATCH_ARCHITECTURES):
            shapes["threshold"] = (self.d_sae,)
        if self.form == "skip_transcoder":
            shapes["W_skip"] = (self.d_out, self.d_in)
        return shapes

    def _optional(self) -> tuple[str, ...]:
        return ("threshold",) if self.architecture in BATCH_ARCHITECTURES else ()

    def encode_dense(self, x: Tensor) -> Tensor:
        """Latents [N, d_sae] of rows x [N, d_in], zeros included."""
        t = self.tensors
        if self.input_norm == "layer_norm":
            x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + LAYER_NORM_EPS)
        x = x * (self.input_scaling or 1.0)
        if self.subtract_b_dec:
            x = x - t["b_dec"]
        projected = x @ t["W_enc"].t()
        if self.architecture == "gated":
            magnitude = t["r_mag"].exp() * projected + t["b_mag"]
            return magnitude.relu() * (projected + t["b_gate"] > 0) * self._decoder_norms()
        pre = (projected + t["b_enc"]) * self._decoder_norms()
        if self.architecture == "topk":
            return _keep_largest(pre, self.k or 0)
        if "threshold" in t:
            return pre.relu() * (pre > t["threshold"])
        if self.architecture in BATCH_ARCHITECTURES:
            return _keep_largest(pre.reshape(1, -1), (self.k or 0) * len(pre)).reshape(pre.shape)
        return pre.relu()

    def decode_dense(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Output [N, d_out] of latents z [N, d_sae]; the input x [N, d_in] is needed by W_skip and by layer_norm."""
        t = self.tensors
        y = z / self._decoder_norms() @ t["W_dec"] + t["b_dec"]
        if "W_skip" in t:
            assert x is not None, "a skip transcoder decodes with its input"
            y = y + x * (self.input_scaling or 1.0) @ t["W_skip"].t()
        y = y / (self.output_scaling or self.input_scaling or 1.0)
        if self.input_norm == "layer_norm":
            assert x is not None, "layer_norm is undone with the input"
            y = y * x.std(1, keepdim=True) + x.mean(1, keepdim=True)
        return y

    def _decoder_norms(self) -> Tensor:
        ones = torch.ones((), dtype=torch.float32)
        return self.tensors["W_dec"].norm(dim=1) if self.rescale_by_decoder_norm else ones

    def folded(self, source: object = "dictionary") -> "DictionaryWeights":
        """The same function of raw activations without rescale_by_decoder_norm, input_scaling and output_scaling.

        Raises ExchangeError, naming `source`, for decoder rows of zero, which rescaling would divide by.
        """
        weights, t = self, dict(self.tensors)
        if self.rescale_by_decoder_norm:
            norms = t["W_dec"].norm(dim=1)
            if (norms == 0).any():
                row = int((norms == 0).nonzero()[0])
                raise ExchangeError(f"{source}: row {row} of W_dec is zero and cannot be rescaled by its norm")
            t["W_enc"], t["W_dec"] = t["W_enc"] * norms[:, None], t["W_dec"] / norms[:, None]
            t |= {name: t[name] * norms for name in ("b_enc", "b_gate", "b_mag") if name in t}
            weights = dataclasses.replace(self, tensors=t, rescale_by_decoder_norm=False)
        scale_in, scale_out = self.input_scaling or 1.0, self.output_scaling or self.input_scaling or 1.0
        if scale_in == scale_out == 1.0:
            return dataclasses.replace(weights, input_scaling=None, output_scaling=None)
        if scale_in != scale_out:
            weights = weights.with_subtraction(False)
        t = dict(weights.tensors)
        t["W_enc"], t["W_dec"] = t["W_enc"] * scale_in, t["W_dec"] / scale_out
        t["b_dec"] = t["b_dec"] / scale_out
        if "W_skip" in t:
            t["W_skip"] = t["W_skip"] * (scale_in / scale_out)
        return dataclasses.replace(weights, tensors=t, input_scaling=None, output_scaling=None)

    def with_subtraction(self, subtract: bool) -> "DictionaryWeights":
        """The same function with `subtract_b_dec` as asked: W_enc b_dec moves into or out of the encoder's biases.

        Raises ExchangeError where d_in and d_out differ.
        """
        if subtract == self.subtract_b_dec:
            return self
        if self.d_in != self.d_out:
            raise ExchangeError(f"subtract_b_dec needs d_in = d_out, got {self.d_in} and {self.d_out}")
        t = dict(self.tensors)
        shift = (t["W_enc"] @ t["b_dec"]) * (1.0 if subtract else -1.0)
        if self.architecture == "gated":
            t["b_gate"], t["b_mag"] = t["b_gate"] + shift, t["b_mag"] + t["r_mag"].exp() * shift
        else:
            t["b_enc"] = t["b_enc"] + shift
        return dataclasses.replace(self, tensors=t, subtract_b_dec=subtract)


def check_choice(source: object, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ExchangeError, naming `source` and the field `name`, where `value` is not one of `choices`."""
    if value not in choices:
        raise ExchangeError(f"{source}: unknown {name} {value!r}; there is {', '.join(choices)}")


def check_tensor(source: object, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ExchangeError, naming `source` and the tensor, where its shape differs or it holds NaN or infinity."""
    if tuple(tensor.shape) != shape:
        raise ExchangeError(f"{source}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not torch.isfinite(tensor).all():
        raise ExchangeError(f"{source}: {name} holds values that are not finite")


def _keep_largest(pre: Tensor, k: int) -> Tensor:
    """pre [N, M] clipped at zero, all but the k largest of every row set to zero."""
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())
