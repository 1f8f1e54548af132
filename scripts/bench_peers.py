"""One full training step of each peer library that is installed, driven as its own trainer drives it.

Every factory returns `step(x)`, one optimizer step on x [rows, d_in] float32, for a top-k dictionary with Adam. `dead`
of a shape is the share of latents declared dead, so that auxiliary losses run. `autocast` is the mixed precision that
a library's own training loop offers; sparsify takes it by itself on a card. Where a library is missing, its factory
raises ImportError.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench_shapes import Shape

Step = Callable[[torch.Tensor], Any]


def saelens(shape: Shape, autocast: bool = False) -> Step:
    """SAELens's trainer with its top-k training class."""
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=shape.rows,
        lr_end=3e-4,
        autocast=autocast,
        dead_feature_window=1000,
        device=shape.device,
    )
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k, device=shape.device))
    trainer = SAETrainer(config, sae, iter([]))

    def step(x: torch.Tensor) -> None:
        if shape.num_dead:
            trainer.n_forward_passes_since_fired[: shape.num_dead] = 5000
        trainer.step(x)

    return step


def sparsify(shape: Shape) -> Step:
    """sparsify's coder under the steps that its trainer takes, with Adam in place of its default optimizer."""
    if shape.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    config = SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    coder = SparseCoder(shape.d_in, config, dtype=torch.float32, device=shape.device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4)
    dead = torch.arange(shape.d_sae, device=shape.device) < shape.num_dead
    fired = torch.zeros_like(dead)
    idle = torch.zeros(shape.d_sae, dtype=torch.long, device=shape.device)

    def step(x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x=x, y=x, dead_mask=dead if shape.num_dead else None)
        fired[out.latent_indices.flatten()] = True
        loss = out.fvu + out.auxk_loss / 32 if shape.num_dead else out.fvu
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        idle.add_(shape.rows)
        idle[fired] = 0
        fired.zero_()

    return step


def dictionary_learning(shape: Shape, autocast: bool = False) -> Step:
    """dictionary_learning's top-k trainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=shape.d_in,
        dict_size=shape.d_sae,
        k=shape.k,
        layer=0,
        lm_name="none",
        device=shape.device,
        lr=2e-4,
        warmup_steps=10,
    )
    taken = [0]

    def step(x: torch.Tensor) -> None:
        if shape.num_dead:
            trainer.num_tokens_since_fired[: shape.num_dead] = 10**8
        taken[0] += 1
        with torch.autocast(shape.device, torch.bfloat16, enabled=autocast):
            trainer.update(taken[0], x.bfloat16() if autocast else x)

    return step


#: The packages behind the names, for their versions.
PACKAGES = {"SAELens": "sae-lens", "sparsify (Adam)": "eai-sparsify", "dictionary_learning": "dictionary-learning"}


def peers(device: str) -> dict[str, Callable[[Shape], Step]]:
    """Each library's step as it is by default, and on a card in mixed precision too."""
    found: dict[str, Callable[[Shape], Step]] = {
        "SAELens": saelens,
        "sparsify (Adam)": sparsify,
        "dictionary_learning": dictionary_learning,
    }
    if device == "cuda":
        found["SAELens, bfloat16 autocast"] = partial(saelens, autocast=True)
        found["dictionary_learning, bfloat16 autocast"] = partial(dictionary_learning, autocast=True)
    return found
