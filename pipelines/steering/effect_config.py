"""How steering effects are measured: strengths, how much text, how many directions to compare with."""

import math
from dataclasses import dataclass

from saeql.sae.config import ConfigError, check_least

from .edits import MAX_STRENGTH


@dataclass(frozen=True, kw_only=True)
class EffectConfig:
    """Raises ConfigError naming the field that does not hold."""

    strengths: tuple[float, ...] = (-0.3, -0.1, 0.1, 0.2, 0.3, 0.5)
    """Lengths of what is added, in median norms of the activations at the hook point; both signs."""
    random_directions: int = 32
    """Isotropic random directions, which z is about."""
    other_directions: int = 8
    """Random directions with the covariance of the activations; as many random rows of the dictionary."""
    tokens: int = 512
    """Test tokens, in windows of `window_tokens`, evenly spread."""
    window_tokens: int = 32
    """First tokens of each window."""
    choosing_tokens: int = 128
    """Calibration tokens that features are chosen on."""
    choosing_strength: float = 0.25
    """At which they are chosen, and rivals first measured where there are many features."""
    candidates: int = 3
    """Features measured on calibration text for each one chosen: those the logit lens puts first."""
    full_curves: int = 8
    """Up to so many features have every rival at every strength; beyond, rivals are measured next to the KL budget."""
    other_concepts: int = 16
    """Least number of other concepts that specificity is about."""
    prompts: int = 4
    """Openings that are continued with every method; 0: nothing is written."""
    prompt_tokens: int = 8
    """Tokens of an opening, from test text."""
    new_tokens: int = 20
    """Tokens written after each."""
    num_bootstrap: int = 1000
    """Draws of test documents behind each interval."""
    seed: int = 0
    """Seed of random directions, of sampling, and of draws."""
    any_strength: bool = False
    """Allow strengths at which models only break."""

    def __post_init__(self):
        if not self.strengths or not all(map(math.isfinite, self.strengths)) or max(self.strengths) <= 0:
            raise ConfigError(f"strengths must be finite and one of them above 0, not {list(self.strengths)}")
        limit = MAX_STRENGTH["norm"]
        beyond = next((s for s in self.strengths if abs(s) > limit), None)
        if beyond is not None and not self.any_strength:
            raise ConfigError(
                f"strength {beyond:g} is beyond {limit:g}, where a model only breaks; any_strength (--any-strength) "
                "allows it"
            )
        check_least(
            self, "", random_directions=2, other_directions=2, window_tokens=4, choosing_tokens=4, candidates=1,
            prompts=0, prompt_tokens=1, new_tokens=2, num_bootstrap=1, other_concepts=1,
        )  # fmt: skip
        if self.tokens < self.window_tokens:
            raise ConfigError(f"tokens must be at least one window of {self.window_tokens}, not {self.tokens}")
