"""What a feature does to predictions: the tokens it points to, and those that become likelier as it is amplified.

Two lists for every feature, as in Gur-Arieh et al. 2025 (arXiv 2501.08319):

- `output-lens` (their VocabProj): the tokens with the largest logits `W_U norm(d)`;
- `output-change` (their TokenChange): the tokens whose probability rises most when the feature is added at its hook
  point, mean over sampled train windows.

A list becomes a candidate where its tokens resemble each other more than those of random directions' lists do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch

from saeql.sae.config import ConfigError, check_above_zero, check_least

from ..lens_statistics import chance, coherence, frequent_tokens, lens_statistics
from ..output_effects import WritePlace, direction_effects
from ..output_labels import TokenTexts, raises_label
from ..progress import OnProgress
from ..split_rows import FeatureRows, read_token_ids, sample_windows
from .base import Candidate

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output-centric labels (`output` among the explainers): what is read, and how often the model is run."""

    label_tokens: int = 5
    """Tokens that a label names."""
    list_tokens: int = 10
    """Tokens of a list that is tested against chance."""
    min_count: int = 3
    """Times that the train text has a token which a list of the logit lens may name."""
    max_chance: float = 0.05
    """Share of random directions whose list is as coherent, above which a list makes no label."""
    random_directions: int = 256
    """Random directions of the logit lens's comparison."""
    change_features: int = 128
    """Features that are amplified, the first of those asked for; each is one pass over the windows. 0: none."""
    change_random: int = 32
    """Random directions that are amplified for comparison."""
    change_windows: int = 8
    """Train windows on which features are amplified."""
    change_tokens: int = 32
    """First tokens of them."""
    strength: float = 0.25
    """Length of what is added, in median norms of the activations at the hook point."""
    seed: int = 0
    """Seed of the random directions."""

    def __post_init__(self):
        check_least(
            self, "output_labels", label_tokens=1, list_tokens=2, min_count=1, random_directions=1,
            change_features=0, change_random=1, change_windows=1, change_tokens=2,
        )  # fmt: skip
        check_above_zero(self, "output_labels", "max_chance", "strength")
        if self.list_tokens < self.label_tokens:
            raise ConfigError(
                f"output_labels.list_tokens must be no less than output_labels.label_tokens ({self.label_tokens}), "
                f"got {self.list_tokens}"
            )


@dataclass(frozen=True)
class TokenList:
    """The tokens of one feature by one of the two ways."""

    explainer: str  # 'output-lens' | 'output-change'
    tokens: np.ndarray  # [k] ids, first the strongest
    coherence: float  # see `lens_statistics.coherence`
    chance: float  # p of that against random directions


class OutputExplainer:
    """Proposes output labels. Raises ModelError for an encoder, which predicts no next token."""

    name: ClassVar[str] = "output"

    def __init__(self, run: "Run", config: OutputConfig):
        self.run, self.config = run, config

    @classmethod
    def of(cls, run: "Run") -> Self:
        return cls(run, run.config.output_labels)

    def propose(
        self, rows: FeatureRows, features: Sequence[int], on_progress: OnProgress | None = None
    ) -> Mapping[int, list[Candidate]]:
        lists = self.lists(rows, features, on_progress)
        if not lists:
            return {}
        texts, out = TokenTexts(self.run.language_model), {}
        for feature, own in lists.items():
            found = [
                Candidate(raises_label(shown), "output", each.explainer)
                for each in own
                if each.chance <= self.config.max_chance
                and (shown := texts.shown(each.tokens, self.config.label_tokens))
            ]
            if found:
                out[feature] = list({c.label: c for c in found}.values())
        return out

    def lists(
        self, rows: FeatureRows, features: Sequence[int], on_progress: OnProgress | None = None
    ) -> dict[int, list[TokenList]]:
        """Both lists of every feature that has them, the amplified one first."""
        if not features:
            return {}
        place, config, features = WritePlace.of(self.run), self.config, list(features)
        decoder = self.run.dictionary().W_dec.detach()[features]
        random = place.random_directions(config.random_directions, config.seed)
        among = frequent_tokens(read_token_ids(self.run.evidence, rows.train), config.min_count)
        of_lens = lens_statistics(decoder, place.lm, config.list_tokens, among)
        null = lens_statistics(random, place.lm, config.list_tokens, among).coherence
        lens = self._lists("output-lens", of_lens.top, of_lens.coherence, null)
        changed = self._changed(place, decoder[: config.change_features], rows, among, on_progress)
        return {f: [*changed[i : i + 1], lens[i]] for i, f in enumerate(features)}

    def _changed(
        self,
        place: WritePlace,
        decoder: torch.Tensor,
        rows: FeatureRows,
        among: np.ndarray,
        on_progress: OnProgress | None,
    ) -> list[TokenList]:
        config = self.config
        if len(decoder) == 0:
            return []
        ids = read_token_ids(self.run.evidence, rows.train)
        windows = ids[sample_windows(ids, config.change_windows, config.change_tokens), : config.change_tokens]
        random = place.random_directions(config.change_random, config.seed + 1)
        effects = direction_effects(
            place,
            torch.cat([decoder.float().cpu(), random]),
            windows,
            [],
            strength=config.strength,
            num_risen=config.list_tokens,
            on_progress=on_progress,
        )
        similar = coherence(place.lm, effects.risen, among)
        n = len(decoder)
        return self._lists("output-change", effects.risen[:n], similar[:n], similar[n:])

    @staticmethod
    def _lists(explainer: str, tokens: np.ndarray, similar: np.ndarray, null: np.ndarray) -> list[TokenList]:
        p = chance(similar, null)
        return [TokenList(explainer, t, float(c), float(q)) for t, c, q in zip(tokens, similar, p, strict=True)]
