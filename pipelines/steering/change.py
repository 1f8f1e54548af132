"""The arithmetic of edits at one hook point: h -> h', all edits of the place at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saeql.sae.model import SparseAutoencoder

from .edits import DIRECTION_MODES, LATENT_MODES, Edit, FeatureScale
from .positions import Place


@dataclass(frozen=True)
class PlacedEdit:
    """An edit with what it needs at one hook point."""

    edit: Edit
    row: torch.Tensor  # [d] what the feature writes there per unit of activation
    scale: FeatureScale
    median_norm: float


class Change:
    """h' = h + what all edits of one hook point add, by token.

    Edits of activations and additions see the same h, read once; then directions are replaced, capped and taken out, in
    the order given. Tokens that no edit touches come back as they were, bit for bit.
    """

    def __init__(
        self, edits: Sequence[PlacedEdit], dictionary: SparseAutoencoder | None, place: Place, *, keep_error: bool
    ):
        """`dictionary` reads the hook point; None where no edit reads activations. See `Steerer.applied`."""
        self.place, self.dictionary, self.keep_error = place, dictionary, keep_error
        self.sums = [e for e in edits if e.edit.mode == "add" or e.edit.mode in LATENT_MODES]
        self.projections = [e for e in edits if e.edit.mode in DIRECTION_MODES]
        assert dictionary is not None or (keep_error and all(e.edit.mode == "add" for e in self.sums))

    def __call__(self, acts: torch.Tensor) -> torch.Tensor | None:
        """acts [B, T, d] -> changed, or None where no token is."""
        factors = [(e, self._factor(e.edit, acts)) for e in (*self.sums, *self.projections)]
        touched = self._touched([factor for _, factor in factors], acts)
        if touched is False:
            return None
        flat = acts.reshape(-1, acts.shape[-1])
        rows = flat[touched] if isinstance(touched, torch.Tensor) else flat
        rows = rows.to(torch.promote_types(acts.dtype, torch.float32))
        at: dict[int, torch.Tensor | float] = {
            id(e): f[touched] if isinstance(f, torch.Tensor) and isinstance(touched, torch.Tensor) else f
            for e, f in factors
        }
        new = self._summed(rows, at)
        for placed in self.projections:
            new = new + at[id(placed)] * _projection(placed, new)
        if not isinstance(touched, torch.Tensor):
            return new.to(acts.dtype).reshape(acts.shape)
        out = flat.clone()
        out[touched] = new.to(acts.dtype)
        return out.reshape(acts.shape)

    def _factor(self, edit: Edit, acts: torch.Tensor) -> torch.Tensor | float:
        factor = self.place.factors(edit.positions, edit.schedule, acts.shape)
        if isinstance(factor, torch.Tensor):
            return (edit.amount * factor).reshape(-1, 1).to(acts.device)  # [B * T, 1]
        return edit.amount * factor

    def _touched(self, factors: list[torch.Tensor | float], acts: torch.Tensor) -> torch.Tensor | bool:
        """[B * T] bool tokens that an edit changes; True: all, False: none."""
        if any(isinstance(f, float) and f != 0 for f in factors):
            return True
        some = torch.zeros(acts.shape[0] * acts.shape[1], dtype=torch.bool, device=acts.device)
        for factor in factors:
            if isinstance(factor, torch.Tensor):
                some |= factor[:, 0] != 0
        return some if bool(some.any()) else False

    def _summed(self, rows: torch.Tensor, at: dict[int, torch.Tensor | float]) -> torch.Tensor:
        """rows [N, d] with additions and changed activations."""
        base, latents = rows, None
        if self.dictionary is not None and (not self.keep_error or any(e.edit.mode != "add" for e in self.sums)):
            latents = self.dictionary.encode(rows.float())
            base = rows if self.keep_error else self.dictionary.decode(latents)
        for placed in self.sums:
            edit = placed.edit
            if edit.mode == "add":
                step = _addition(placed)
            else:
                assert latents is not None
                old = (latents.values * (latents.indices == edit.feature)).sum(1, keepdim=True)  # [N, 1]
                step = (_goal(placed, old) - old) * placed.row
            base = base + at[id(placed)] * step
        return base


def _addition(placed: PlacedEdit) -> torch.Tensor:
    if placed.edit.unit == "norm":
        return placed.median_norm * placed.row / placed.row.norm()
    return (placed.scale.p99 if placed.edit.unit == "p99" else 1.0) * placed.row


def _goal(placed: PlacedEdit, old: torch.Tensor) -> torch.Tensor | float:
    """The activation that an edit leads to, of `old` [N, 1]."""
    mode = placed.edit.mode
    if mode == "clamp":
        return placed.edit.goal * placed.scale.p99
    if mode == "scale":
        return placed.edit.goal * old
    return placed.scale.mean if mode == "ablate_mean" else 0.0


def _projection(placed: PlacedEdit, rows: torch.Tensor) -> torch.Tensor:
    """What brings the component of rows [N, d] along the direction to its goal."""
    direction = placed.row / placed.row.norm()
    direction = direction.to(rows.dtype)
    component = rows @ direction  # [N]
    goal = placed.edit.goal * placed.median_norm
    if placed.edit.mode == "cap":
        move = goal - component.clamp_min(goal)
    else:
        move = (goal if placed.edit.mode == "replace" else 0.0) - component
    return move[:, None] * direction
