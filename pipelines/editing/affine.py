"""Edits as maps h -> A h + u: the ones that weights can hold, and why the others cannot be held."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..steering.change import Change, PlacedEdit
from ..steering.edits import LATENT_MODES, Edit
from ..steering.positions import Place


class EditError(ValueError):
    """An edit that weights cannot hold exactly, or that cannot be made in this model; the message says why."""


def require_affine(edit: Edit) -> None:
    """Raise EditError unless an edit is one map h -> A h + u at every token."""
    possible = "weights can hold add, replace and ablate_direction"
    if edit.mode in LATENT_MODES:
        raise EditError(
            f"{edit.mode} depends on the activation of {edit.target}, which the dictionary's encoder computes with a "
            f"threshold: no weights of this model do that; {possible}"
        )
    if edit.mode == "cap":
        raise EditError(f"cap changes only rows beyond a limit, which no weights of this model do; {possible}")
    if edit.positions != "all":
        raise EditError(f"positions {edit.positions!r}: weights act alike on every token, so only all can be held")
    if edit.schedule != "constant":
        raise EditError(f"schedule {edit.schedule!r}: weights act alike at every step, so only constant can be held")


@dataclass(frozen=True)
class AffineChange:
    """h -> A h + u at one hook point, all its edits at once: the arithmetic of steering itself, on rows of weights."""

    offset: torch.Tensor  # [d] float32, u
    projections: tuple[PlacedEdit, ...]  # of A: what they take out, in order

    @classmethod
    def of(cls, placed: Sequence[PlacedEdit]) -> "AffineChange":
        """Raises EditError for an edit that is none."""
        for one in placed:
            require_affine(one.edit)
        width = len(placed[0].row)
        offset = _changed(placed, torch.zeros(1, width))[0]
        taken = (one for one in placed if one.edit.mode != "add")
        pure = (replace(one, edit=replace(one.edit, mode="ablate_direction", to=None)) for one in taken)
        return cls(offset, tuple(pure))

    @property
    def is_shift(self) -> bool:
        """Whether A is the identity."""
        return not self.projections

    def linear(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [N, d] float32 -> A rows."""
        return _changed(self.projections, rows) if self.projections else rows

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [N, d] float32 -> A rows + u."""
        return self.linear(rows) + self.offset


def _changed(placed: Sequence[PlacedEdit], rows: torch.Tensor) -> torch.Tensor:
    new = Change(placed, None, Place(), keep_error=True)(rows[None])
    return rows if new is None else new[0]
