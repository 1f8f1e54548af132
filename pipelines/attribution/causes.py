"""What `why` finds: the causes of a prediction by feature, by token, and of all of a part at once."""

from dataclasses import dataclass

from .agreement import Agreement
from .target import Target


@dataclass(frozen=True)
class FeatureCause:
    """A feature on all of the prompt's tokens."""

    feature: int
    num_tokens: int
    """Tokens it is active on."""
    attribution: float
    """Sum over those tokens, in units of the target."""
    exact: float
    """What the target loses where the feature is 0 on all of them at once."""
    position: int
    """The token with the largest attribution."""


@dataclass(frozen=True)
class TokenCause:
    """A token of the prompt: what stands at the hook point there."""

    position: int
    token: str
    features: float
    """Sum of the features' attributions."""
    error: float
    """Attribution of what the dictionary does not explain."""
    feature: int | None
    """The feature with the largest attribution; None where none is active, as on a row that is left as it is."""


@dataclass(frozen=True)
class Pair:
    """One feature at one token."""

    feature: int
    position: int
    activation: float
    attribution: float
    exact: float | None
    """None where it was not ablated."""
    is_random: bool
    """Whether it is of the random sample (it may be among the strongest, too)."""


@dataclass(frozen=True)
class Whole:
    """All of one part at once: `features`, `skip` (of a skip transcoder), `error`, or `everything` but b_dec."""

    part: str
    attribution: float
    exact: float
    """What the target loses without it."""


@dataclass(frozen=True)
class Why:
    """What caused a prediction; all effects are in units of the target, above 0 what raised it."""

    tokens: list[str]
    target: Target
    value: float
    """Of the target."""
    probability: float
    """Of the target's token."""
    rank: int
    """Of the target's token, 1 for the likeliest."""
    steps: int
    features: list[FeatureCause]  # largest attribution first, up and down alike
    by_token: list[TokenCause]  # in the order of the prompt
    pairs: list[Pair]  # all features active on all tokens, largest attribution first
    wholes: list[Whole]
    agreements: list[Agreement]
