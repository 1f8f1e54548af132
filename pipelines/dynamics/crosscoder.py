"""A crosscoder over the same text in two models: one latent space, and whose latent each one is.

Rows of both models stand side by side (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model
Diffing"). A latent's share is |d_tuned| / (|d_base| + |d_tuned|), each decoder part in units of its model's
activations: near 0 it is the base model's alone, near 1 the tuned model's. A crosscoder over the base model twice says
which shares training itself gives where nothing differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeql.sae.architectures import build
from saeql.sae.config import DictionaryConfig, TrainConfig
from saeql.sae.files import save_dictionary
from saeql.sae.model import SparseAutoencoder
from saeql.sae.trainer import Places, Trainer

from ..harvest import shard_folder
from ..ranks import rank_device
from ..run import Run
from ..sources import ShardSource
from ..train import matmul_dtype

BASE, TUNED = "base", "tuned"
#: Shares beyond these are of one model alone.
ONE_MODEL = (0.1, 0.9)


@dataclass(frozen=True)
class Crosscoder:
    """A trained crosscoder; arrays are [d_sae]."""

    dictionary: SparseAutoencoder
    share: np.ndarray
    cosine: np.ndarray  # between both decoder parts

    def summary(self, alive: np.ndarray) -> dict[str, Any]:
        """Numbers of latents that fire, by whose they are."""
        share = self.share[alive]
        shared = (share > ONE_MODEL[0]) & (share < ONE_MODEL[1])
        cosine = self.cosine[alive][shared]
        return {
            "alive": len(share),
            "base_only": int((share <= ONE_MODEL[0]).sum()),
            "tuned_only": int((share >= ONE_MODEL[1]).sum()),
            "shared": int(shared.sum()),
            "share_p5": float(np.quantile(share, 0.05)) if len(share) else None,
            "share_p95": float(np.quantile(share, 0.95)) if len(share) else None,
            "shared_cosine_median": float(np.median(cosine)) if len(cosine) else None,
        }


def both_models(first: Run, second: Run, split: str, batch_tokens: int, **options: Any) -> ShardSource:
    """Rows of two runs over the same text side by side, as hook points `base` and `tuned`."""
    runs = {BASE: first, TUNED: second}
    return ShardSource(
        {name: shard_folder(run.activations, run.spec.reads[0], split) for name, run in runs.items()},
        batch_tokens=batch_tokens,
        norm_limits={name: run.harvest_info.norm_limit(run.spec.reads[0]) for name, run in runs.items()},
        **options,
    )


def train_crosscoder(first: Run, second: Run, config: DictionaryConfig, train: TrainConfig, folder: Path) -> Crosscoder:
    """Train a crosscoder of the recipe's architecture and size, and save it as a dictionary."""
    device = rank_device(first.config.model.device)
    reads = (BASE, TUNED)
    config = replace(config, form="crosscoder", reads=reads, writes=reads, start_from="")
    source = both_models(
        first, second, "train", train.batch_tokens, shuffle_seed=first.config.seed, block_rows=train.shuffle_block_rows,
        buffer_bytes=train.shuffle_buffer_bytes, device=device,
    )  # fmt: skip
    trainer = Trainer(
        train,
        {"crosscoder": build(config, sum(source.widths.values()), seed=first.config.seed)},
        source,
        places={"crosscoder": Places(reads, reads)},
        matmul_dtype=matmul_dtype(train.matmul_dtype, device),
        device=device,
    )
    trainer.fit()
    dictionary = trainer.finish()["crosscoder"]
    runs = {BASE: first, TUNED: second}
    ours = {"crosscoder": {name: run.harvest_info.identity.model_name for name, run in runs.items()}}
    dictionary.metadata = {"model_name": second.harvest_info.identity.model_name, "saeql": ours}
    save_dictionary(dictionary, folder)
    norms = {name: run.harvest_info.median_norms[run.spec.reads[0]] for name, run in runs.items()}
    return Crosscoder(dictionary, *_compared(dictionary, source.widths, norms))


def _compared(
    dictionary: SparseAutoencoder, widths: Mapping[str, int], norms: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    parts = dictionary.W_dec.detach().float().cpu().split(list(widths.values()), dim=1)
    lengths = [part.norm(dim=1) / norms[name] for part, name in zip(parts, widths, strict=True)]
    share = lengths[1] / (lengths[0] + lengths[1]).clamp_min(1e-12)
    return share.numpy(), torch.nn.functional.cosine_similarity(parts[0], parts[1], dim=1).numpy()
