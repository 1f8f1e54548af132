"""A model whose weight matrices are drawn anew: what a dictionary finds in a network that has learned nothing.

After Heap et al. 2025, "Sparse Autoencoders Can Interpret Randomly Initialized Transformers", arXiv 2501.17727: every
matrix keeps its mean and standard deviation and nothing else. Each tensor's draw depends on the seed and its name
alone, so a truncated model has the first layers of the whole one.
"""

import hashlib
from typing import Any

import torch

from .model_config import ModelConfig, ModelError


@torch.no_grad()
def randomise(model: Any, config: ModelConfig) -> None:
    """Redraw the weights of a loaded model in place, as `config.randomise` says.

    Norms and biases (tensors of one dimension) are kept; embeddings and the unembedding only with "weights".
    Raises ModelError where a tensor is not of plain numbers in memory.
    """
    kept = set() if config.randomise == "all" else _embeddings(model)
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or id(weight) in kept:
            continue
        if not weight.is_floating_point() or weight.device.type == "meta":
            raise ModelError(f"model.randomise: {name} of {config.name} is {weight.dtype} on {weight.device}")
        values = weight.float()
        generator = torch.Generator().manual_seed(_seed(name, config.randomise_seed))
        drawn = torch.randn(weight.shape, generator=generator)
        weight.copy_(drawn.to(weight.device) * values.std() + values.mean())


def randomised_name(config: ModelConfig) -> str:
    """The model's name, which also says what was redrawn."""
    if config.randomise == "none":
        return config.name
    return f"{config.name} (randomised: {config.randomise}, seed {config.randomise_seed})"


def randomised_sha256(model_sha256: str, config: ModelConfig) -> str:
    """Hash of the model that is worked with: of its files, and of what was redrawn."""
    if config.randomise == "none":
        return model_sha256
    return hashlib.sha256(f"{model_sha256} {config.randomise} {config.randomise_seed}".encode()).hexdigest()


def _embeddings(model: Any) -> set[int]:
    """Ids of the parameters of embeddings (of positions too) and of the unembedding."""
    found = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    return found if head is None else found | {id(p) for p in head.parameters()}


def _seed(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
