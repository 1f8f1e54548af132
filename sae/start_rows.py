"""Decoder rows that are taken from the activations or their basis: where `dictionary.start` is not "random"."""

import torch

from .config import ConfigError


@torch.no_grad()
def start_rows(kind: str, rows: torch.Tensor, d_sae: int, seed: int) -> torch.Tensor:
    """Unit rows [d_sae, d] of a kind, from centred training rows [N, d].

    - "random_covariance": Gaussian rows with the covariance of the activations;
    - "neurons": the coordinates themselves, each in both directions, as many as fit drawn by the seed;
    - "pca": the principal directions of the activations, each in both directions, those of most variance first.

    Raises ConfigError where there are fewer directions of a kind than d_sae.
    """
    d = rows.shape[1]
    if kind in ("neurons", "pca") and d_sae > 2 * d:
        raise ConfigError(
            f'dictionary.start = "{kind}" has {2 * d} directions, two for each of {d} coordinates: '
            f"dictionary.d_sae {d_sae} is more"
        )
    generator = torch.Generator().manual_seed(seed)
    centred = (rows - rows.mean(0)).float().cpu()
    if kind == "random_covariance":
        root = torch.linalg.qr(centred, mode="r").R  # root' root = centred' centred
        found = torch.randn(d_sae, len(root), generator=generator) @ root
    elif kind == "neurons":
        chosen = torch.randperm(2 * d, generator=generator)[:d_sae]
        found = torch.cat([torch.eye(d), -torch.eye(d)])[chosen]
    else:
        assert kind == "pca", kind
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)  # rows, most variance first
        found = torch.stack([directions, -directions], dim=1).reshape(2 * d, d)[:d_sae]
    return torch.nn.functional.normalize(found, dim=1).to(rows.device)
