"""What is changed: modes, units, and which edits are refused.

`strength` is how much of a change is made; at 0 the model is as it was, bit for bit.

- `add`: h + strength * unit * d. Unit "norm": the median activation norm at the hook point, d of norm 1, so that
  features are comparable (0.1 to 0.5 is useful; beyond 1 text falls apart). Unit "p99": the 99th percentile of the
  feature's own active values on training documents, d as the dictionary has it. Unit "raw": d as it is, for steering
  vectors that were read off activations.

The other modes move towards a goal, `strength` 1 (the default there) all the way:

- `clamp`: the feature's activation is `to` times its p99;
- `scale`: the feature's activation is `to` times what it is;
- `ablate`: the feature's activation is 0;
- `ablate_mean`: the feature's activation is its mean over all training rows;
- `replace`: the component of h along d is `to` times the median norm, what is orthogonal to d stays;
- `cap`: the component of h along d is at most `to` times the median norm;
- `ablate_direction`: the component of h along d is 0 (Arditi et al. 2024, arXiv:2406.11717).

The first four read the dictionary and change only what the feature writes: h + (new - old) d.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .positions import Positions, Schedule, check_positions, schedule_factor
from .vectors import SteeringVector

LATENT_MODES = ("clamp", "scale", "ablate", "ablate_mean")
DIRECTION_MODES = ("replace", "cap", "ablate_direction")
MODES = ("add", *LATENT_MODES, *DIRECTION_MODES)
UNITS = ("norm", "p99", "raw")
#: Beyond these a model only breaks; `any_strength` allows them.
MAX_STRENGTH = {"norm": 4.0, "p99": 40.0, "raw": 40.0, "share": 2.0}
MAX_TO = 40.0
_GOALS = {"clamp": 1.0, "scale": 0.0, "replace": 0.0, "cap": 0.0}


class SteerError(ValueError):
    """An edit names an unknown mode or a feature that does not exist, or cannot be made at this dictionary."""


@dataclass(frozen=True)
class Edit:
    """One change; see the module's text for modes and units."""

    feature: int | SteeringVector
    """Index of a feature; or a steering vector, for `add` and the modes of directions."""
    mode: str = "add"
    strength: float | None = None
    """None: 0.4 of the median norm (1 of the feature's p99) for `add`, all the way for the other modes."""
    to: float | None = None
    """Goal of clamp (default 1), scale, replace and cap (default 0)."""
    unit: str = "norm"
    """Unit of `add`: norm, p99 or raw."""
    positions: Positions = "all"
    """all, prompt, generated, or indices of tokens; negative ones count from the end of the prompt."""
    schedule: Schedule | Callable[[int], float] = "constant"
    """constant, fade:N, first:N or every:N tokens, or a function of the tokens since the first changed one."""
    any_strength: bool = False
    """Allow strengths at which models only break."""

    @property
    def amount(self) -> float:
        """`strength` with its default."""
        if self.strength is not None:
            return float(self.strength)
        return (0.4 if self.unit == "norm" else 1.0) if self.mode == "add" else 1.0

    @property
    def goal(self) -> float:
        """`to` with its default."""
        return float(self.to) if self.to is not None else _GOALS.get(self.mode, 0.0)

    @property
    def target(self) -> str:
        """What is changed, in words."""
        return f"feature {self.feature}" if isinstance(self.feature, int) else f"vector {self.feature.name}"

    def describe(self) -> str:
        """In a few words: 'feature 12, add 0.4 norm'."""
        words = [f"{self.target}, {self.mode}"]
        if self.mode in _GOALS:
            words.append(f"to {self.goal:g}")
        if self.mode == "add":
            words.append(f"{self.amount:g} {self.unit}")
        elif self.amount != 1:
            words.append(f"by {self.amount:g}")
        if self.positions != "all":
            words.append(f"at {self.positions}")
        if self.schedule != "constant":
            words.append(f"{self.schedule}")
        return " ".join(words)

    def check(self) -> None:
        """Raises SteerError naming the field that does not hold."""
        if self.mode not in MODES:
            raise SteerError(f"no steering mode {self.mode!r}: there is {', '.join(MODES)}")
        if not isinstance(self.feature, int) and (self.mode in LATENT_MODES or self.unit == "p99"):
            raise SteerError(
                f"{self.target} is a direction without activations: use add with unit norm or raw, "
                f"{', '.join(DIRECTION_MODES)}"
            )
        if self.unit not in UNITS:
            raise SteerError(f"no unit {self.unit!r}: there is {', '.join(UNITS)}")
        if self.to is not None and self.mode not in _GOALS:
            raise SteerError(f"mode {self.mode} has no goal: leave `to` out, or use {', '.join(_GOALS)}")
        for name, value in (("strength", self.amount), ("to", self.goal)):
            if not math.isfinite(value):
                raise SteerError(f"{name} of {self.target} must be a finite number, not {value}")
        limit = MAX_STRENGTH[self.unit if self.mode == "add" else "share"]
        if not self.any_strength and abs(self.amount) > limit:
            raise SteerError(
                f"strength {self.amount:g} of {self.target} is beyond {limit:g}, where a model only breaks; "
                "any_strength (--any-strength) allows it"
            )
        if not self.any_strength and abs(self.goal) > MAX_TO:
            raise SteerError(
                f"to = {self.goal:g} of {self.target} is beyond {MAX_TO:g}, where a model only breaks; "
                "any_strength (--any-strength) allows it"
            )
        try:
            check_positions(self.positions)
            schedule_factor(self.schedule, 0)
        except ValueError as error:
            raise SteerError(str(error)) from None


@dataclass(frozen=True)
class FeatureScale:
    """What a feature does on training documents: the units of its edits."""

    p99: float
    """99th percentile of its active values; 0 where it never fired."""
    mean: float
    """Mean over all rows, active or not."""
