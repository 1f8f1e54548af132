"""A dictionary of features: weights, initialisation, the forward pass, and its folder on disk.

In memory both weights are feature-major, `W_enc` [d_sae, d_in] and `W_dec` [d_sae, d_in], because kernels read rows.
The transpose to the field's layout, `W_enc` [d_in, d_sae], happens in one place: `save` and `load`.

On disk a dictionary is `cfg.json` and `sae_weights.safetensors` with the keys that SAELens 6 reads, plus our own keys
under `metadata`. It works on raw activations: input scaling and centring are folded into the weights before saving.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from saeql.kernels.autograd import SparseLatents, sparse_decode

from .config import ConfigError, DictionaryConfig

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"
#: SAELens drops all metadata of a dictionary that does not name a version of at least 6.
SAELENS_VERSION = "6.54.12"


class DictionaryError(ValueError):
    """A dictionary folder is missing, damaged, or its config and weights disagree; the message names file and field."""


class SparseAutoencoder(nn.Module):
    """Base of all architectures: parameters, decode, folding and files. Subclasses define `encode`."""

    architecture: str = ""

    def __init__(self, config: DictionaryConfig, d_in: int):
        super().__init__()
        self.config, self.d_in = config, d_in
        self.metadata: dict[str, Any] = {}
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.config.d_sae

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Random unit decoder rows, and an encoder that starts as their transpose (arXiv 2406.04093, appendix A.1)."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.d_sae, self.d_in, generator=generator)
        self.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc.copy_(self.W_dec)

    def encode(self, x: torch.Tensor, *, matmul_dtype: torch.dtype | None = None) -> SparseLatents:
        """Sparse latents of rows x [N, d_in]; values are >= 0."""
        raise NotImplementedError

    def encode_subset(self, x: torch.Tensor, latents: torch.Tensor, k: int) -> SparseLatents:
        """Like `encode` with k of the latents [m] only; indices count within the subset. For auxiliary losses."""
        raise NotImplementedError

    def decode(self, latents: SparseLatents) -> torch.Tensor:
        """Reconstruction [N, d_in]."""
        return sparse_decode(latents, self.W_dec, self.b_dec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction of rows x [N, d_in]."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fold_input(self, mean: torch.Tensor, scale: float) -> None:
        """Turn a dictionary of `(x - mean) * scale` into one of x, with the decoder rows left at unit norm.

        Latents come out divided by `scale`: `scale * z(x)` was a latent of the scaled input.
        """
        self.b_dec.copy_(self.b_dec / scale + mean)
        self.b_enc.div_(scale)

    def saelens_config(self) -> dict[str, Any]:
        """The keys SAELens 6 reads."""
        return {
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.config.k,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "rescale_acts_by_decoder_norm": False,
            "metadata": {"sae_lens_version": SAELENS_VERSION, **self.metadata},
        }

    def save(self, folder: str | Path, *, density: torch.Tensor | None = None) -> Path:
        """Write the dictionary folder; `density` [d_sae] (share of rows) becomes SAELens's log10 sparsity file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            "W_enc": self.W_enc.detach().t(),
            "b_enc": self.b_enc.detach(),
            "W_dec": self.W_dec.detach(),
            "b_dec": self.b_dec.detach(),
        }
        _write_safetensors(folder / WEIGHTS_FILE, weights)
        if density is not None:
            _write_safetensors(folder / SPARSITY_FILE, {"sparsity": torch.log10(density.float() + 1e-10)})
        temporary = folder / f"{CONFIG_FILE}.tmp.{os.getpid()}"
        temporary.write_text(json.dumps(self.saelens_config(), indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / CONFIG_FILE)
        return folder

    @staticmethod
    def load(folder: str | Path) -> "SparseAutoencoder":
        """Read a dictionary folder. Raises DictionaryError naming the file and field that is wrong."""
        folder = Path(folder)
        config = read_config(folder)
        dictionary = _from_config(folder, config)
        weights = _read_safetensors(folder / WEIGHTS_FILE)
        d_in, d_sae = dictionary.d_in, dictionary.d_sae
        shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        for name, shape in shapes.items():
            if name not in weights:
                raise DictionaryError(f"{folder / WEIGHTS_FILE} has no tensor {name}")
            if tuple(weights[name].shape) != shape:
                found = tuple(weights[name].shape)
                raise DictionaryError(f"{folder / WEIGHTS_FILE}: {name} has shape {found}, {CONFIG_FILE} says {shape}")
            if not torch.isfinite(weights[name]).all():
                raise DictionaryError(f"{folder / WEIGHTS_FILE}: {name} holds values that are not finite")
        weights["W_enc"] = weights["W_enc"].t().contiguous()
        dictionary.load_state_dict({name: weights[name].float() for name in shapes})
        dictionary.metadata = {k: v for k, v in config.get("metadata", {}).items() if k != "sae_lens_version"}
        return dictionary


def read_config(folder: str | Path) -> dict[str, Any]:
    """cfg.json of a dictionary folder. Raises DictionaryError where it is missing or not a JSON object."""
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DictionaryError(f"no dictionary in {folder}: {CONFIG_FILE} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DictionaryError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DictionaryError(f"{path} is not a JSON object")
    return config


def _from_config(folder: Path, config: dict[str, Any]) -> SparseAutoencoder:
    from .architectures import architecture

    path = folder / CONFIG_FILE
    for key in ("architecture", "d_in", "d_sae", "k"):
        if key not in config:
            raise DictionaryError(f'{path} has no key "{key}"')
    expected = {
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise DictionaryError(f"{path}: {key} = {config[key]!r} is not supported, only {value!r}")
    try:
        settings = DictionaryConfig(architecture=config["architecture"], d_sae=int(config["d_sae"]), k=int(config["k"]))
        return architecture(settings.architecture)(settings, int(config["d_in"]))
    except (ConfigError, TypeError, ValueError) as error:
        raise DictionaryError(f"{path}: {error}") from None


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, temporary)
    temporary.replace(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DictionaryError(f"{path} is missing") from None
    except SafetensorError as error:
        raise DictionaryError(f"{path} is damaged: {error}") from None


@torch.no_grad()
def geometric_median(rows: torch.Tensor, *, num_steps: int = 50, tolerance: float = 1e-6) -> torch.Tensor:
    """Point [d] with the least sum of distances to rows [N, d] (Weiszfeld's iteration)."""
    point = rows.mean(0)
    for _ in range(num_steps):
        weights = 1 / (rows - point).norm(dim=1).clamp_min(1e-8)
        new = (weights[:, None] * rows).sum(0) / weights.sum()
        moved = float((new - point).norm())
        point = new
        if moved <= tolerance * math.sqrt(rows.shape[1]):
            break
    return point
