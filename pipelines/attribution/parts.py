"""What stands at a dictionary's hook point on a prompt, part by part: h = b_dec + features + skip + error."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from saeql.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Parts:
    """The rows of one prompt at the hook point that a dictionary writes; E features are active on them, by token.

    Only rows that dictionaries learn from are taken apart: the first position and rows of massive norm stay in place.
    """

    acts: torch.Tensor  # [T, d] float32, as the model has them
    read: torch.Tensor  # [T] bool: rows that are taken apart
    positions: torch.Tensor  # [E] of the active features
    features: torch.Tensor  # [E]
    values: torch.Tensor  # [E] their activations, above 0
    W_dec: torch.Tensor  # [d_sae, d]
    explained: torch.Tensor  # [T, d] sum of the features' contributions; this and what follows are 0 where not `read`
    skip: torch.Tensor | None  # [T, d] what a skip transcoder passes on linearly
    error: torch.Tensor  # [T, d] what the dictionary does not explain

    @property
    def whole(self) -> torch.Tensor:
        """[T, d] all of it, less b_dec."""
        return self.explained + self.error + (0 if self.skip is None else self.skip)

    def without(self, entries: torch.Tensor) -> torch.Tensor:
        """[T, d] the activations with these of the E active features (numbers [n]) at 0, all else in place."""
        gone = self.values[entries, None] * self.W_dec[self.features[entries]]
        return self.acts.index_add(0, self.positions[entries], -gone)


def rows_read(acts: torch.Tensor, name: str, metadata: Mapping) -> torch.Tensor:
    """[T] bool: rows of acts [T, d] that a dictionary with this metadata learnt from: not the first, none massive."""
    norms = acts.norm(dim=-1)
    median = metadata.get("median_norms", {}).get(name)
    keep = norms <= metadata["massive_norm_multiple"] * median if median else torch.ones_like(norms, dtype=torch.bool)
    keep[0] = False
    return keep


@torch.no_grad()
def take_apart(dictionary: SparseAutoencoder, read: torch.Tensor, written: torch.Tensor, keep: torch.Tensor) -> Parts:
    """The parts of activations `written` [T, d_out] by a dictionary that reads `read` [T, d_in], on the rows `keep`."""
    rows = keep.nonzero()[:, 0]
    x = read[rows]
    latents = dictionary.encode(x)
    active = latents.values > 0
    skip = None
    explained, error = torch.zeros_like(written), torch.zeros_like(written)
    rebuilt = dictionary.decode(latents, x)
    error[rows] = written[rows] - rebuilt
    explained[rows] = rebuilt - dictionary.b_dec
    if dictionary.W_skip is not None:
        skip = torch.zeros_like(written)
        skip[rows] = x @ dictionary.W_skip.t()
        explained = explained - skip
    places = rows[:, None].expand_as(latents.indices)
    found = places[active], latents.indices[active].long(), latents.values[active]
    return Parts(written, keep, *found, dictionary.W_dec.detach(), explained, skip, error)
