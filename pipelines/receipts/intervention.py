"""Does a feature do what its output label says? The label's tokens must become likelier when the feature is added.

`h' = h + strength c v` at the feature's hook point, c the median norm there, on test windows. A label is read from the
direction, so its own tokens rise almost by construction. What counts are tokens that mean the same and whose words are
not among those that were read. Their shift D = E[log p'(S) - log p(S)] is compared with that under random directions of
the same length: z = (D - mean of random) / (standard deviation of random).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from saeql.sae.config import check_above_zero, check_least
from saeql.sae.metrics import Bootstrap, DocumentGroups

from ..explainers.base import Candidate
from ..explainers.output import OutputExplainer
from ..lens_statistics import chance, frequent_tokens, lens_statistics, random_token_coherence
from ..output_effects import Effects, WritePlace, direction_effects
from ..output_labels import TokenTexts, raised_texts
from ..split_rows import FeatureRows, read_token_ids, sample_windows
from .control import Labelled
from .receipt import FAILED, PASSED, REPORTED, Receipt

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """Test of output labels by adding the feature: on how much, against what."""

    max_features: int = 96
    """Features tested: those with an output label first, then others whose tokens are more than chance."""
    strength: float = 0.25
    """Length of what is added, in median norms of the activations at the hook point."""
    windows: int = 8
    """Test windows."""
    window_tokens: int = 32
    """First tokens of them."""
    random_directions: int = 32
    """Random directions of the same length."""
    related_tokens: int = 10
    """Tokens of the label's meaning, other words than the label's, whose probability must rise."""
    min_z: float = 3.0
    """z that passes, with an interval above 0; more can be asked, less cannot."""
    num_bootstrap: int = 1000
    """Draws of test documents behind each interval."""
    seed: int = 0
    """Seed of random directions and draws."""

    def __post_init__(self):
        check_least(
            self, "intervention", max_features=0, windows=1, window_tokens=2, random_directions=2, related_tokens=1,
            num_bootstrap=1, min_z=3,
        )  # fmt: skip
        check_above_zero(self, "intervention", "strength")


@dataclass(frozen=True)
class OutputScore:
    """How far a feature moved one set of tokens, in nats, means over test positions."""

    shift: float
    random: float  # mean of the random directions
    others: float | None  # mean of the other features tested
    z: float
    low: float | None  # 95 % interval of z over test documents
    high: float | None


class OutputIntervention:
    """Tests output labels. Raises ModelError for an encoder, which predicts no next token."""

    code: ClassVar[str] = "I1"
    name: ClassVar[str] = "output intervention"
    tier: ClassVar[str] = "full"

    def __init__(self, run: "Run", config: InterventionConfig):
        self.run, self.config = run, config

    @classmethod
    def of(cls, run: "Run") -> Self:
        return cls(run, run.config.intervention)

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        place = WritePlace.of(self.run)
        labels = self._output_labels(labelled)
        control = f"{self.code} {self.name}"
        if not labels:
            why = {"reason": "no feature has a list of raised tokens that is more than chance"}
            return [Receipt(control=control, value=None, verdict=REPORTED, detail=why)]
        texts = TokenTexts(place.lm)
        text = read_token_ids(self.run.evidence, labelled.rows.train)
        among = frequent_tokens(text, self.run.config.output_labels.min_count)
        top, lens = self._lens(place, list(labels), among)
        own, related = self._token_sets(texts, labels, top, among)
        kept = [i for i, (o, r) in enumerate(zip(own, related, strict=True)) if o and r]
        labels = {f: c for i, (f, c) in enumerate(labels.items()) if i in kept}
        own, related, lens = [own[i] for i in kept], [related[i] for i in kept], [lens[i] for i in kept]
        if not labels:
            why = {"reason": "no label has tokens of this model, and others that mean the same"}
            return [Receipt(control=control, value=None, verdict=REPORTED, detail=why)]
        effects, groups, n = self._effects(place, labelled.rows, list(labels), own + related)
        scores = self._scores(effects, groups, len(labels))
        receipts = []
        for i, (feature, label) in enumerate(labels.items()):
            score, on_own = scores[len(labels) + i], scores[i]
            detail = {
                "label": label.label,
                "tokens": [texts.texts[t] for t in related[i]],
                "own_tokens_shift": round(on_own.shift, 4),
                "own_tokens_z": round(on_own.z, 2),
                "kl": round(float(effects.kl[i].mean()), 4),
                "strength": self.config.strength,
                "hook_points": list(place.writes),
                "lens": lens[i],
            }
            receipts.append(self._receipt(control, feature, score, n, detail))
        share = sum(r.verdict == PASSED for r in receipts) / len(receipts)
        kl = {"median_kl": round(float(np.median(effects.kl[: len(labels)].mean(-1))), 4)}
        kl["random_kl"] = round(float(np.median(effects.kl[len(labels) :].mean(-1))), 4)
        return [Receipt(control=control, value=share, n=len(receipts), verdict=REPORTED, detail=kl), *receipts]

    def _receipt(self, control: str, feature: int, score: OutputScore, n: int, detail: dict[str, Any]) -> Receipt:
        has_passed = score.z >= self.config.min_z and (score.low is None or score.low > 0)
        moved = {
            "shift": round(score.shift, 4),
            "random_shift": round(score.random, 4),
            "other_features_shift": None if score.others is None else round(score.others, 4),
        }
        return Receipt(
            control=control,
            feature=feature,
            value=score.z,
            threshold=self.config.min_z,
            n=n,
            low=score.low,
            high=score.high,
            verdict=PASSED if has_passed else FAILED,
            detail={**moved, **detail},
        )

    def _output_labels(self, labelled: Labelled) -> dict[int, Candidate]:
        """Output labels by feature, at most `max_features`; others than those given are read off the logit lens."""
        most = self.config.max_features
        found = {f: c for f, c in labelled.labels.items() if c.kind == "output"}
        alive = np.flatnonzero(labelled.rows.train.active.counts > 0)
        rest = [int(f) for f in alive if f not in found] if len(found) < most else []
        explainer = OutputExplainer(self.run, replace(self.run.config.output_labels, change_features=0))
        proposed = explainer.propose(labelled.rows, rest)
        found |= {f: own[0] for f, own in proposed.items()}
        return dict(list(found.items())[:most])

    def _token_sets(
        self, texts: TokenTexts, labels: Mapping[int, Candidate], read: np.ndarray, among: np.ndarray
    ) -> list[list[list[int]]]:
        """Ids of every label's own tokens; of tokens of its meaning that neither it nor `read` [n, k] names."""
        own = [texts.ids(raised_texts(c.label)) for c in labels.values()]
        num = self.config.related_tokens
        related = [texts.related(o, r.tolist(), num, among) for o, r in zip(own, read, strict=True)]
        return [own, related]

    def _lens(
        self, place: WritePlace, features: list[int], among: np.ndarray
    ) -> tuple[np.ndarray, list[dict[str, float]]]:
        """[n, k] tokens that the logit lens reads off the features, and its statistics beside those of chance."""
        config = self.run.config.output_labels
        found = lens_statistics(self.run.dictionary().W_dec.detach()[features], place.lm, config.list_tokens, among)
        random = place.random_directions(config.random_directions, self.config.seed)
        null = lens_statistics(random, place.lm, config.list_tokens, among)
        tokens = random_token_coherence(place.lm, config.list_tokens, config.random_directions, self.config.seed, among)
        columns = {
            "entropy": found.entropy,
            "entropy_p": chance(-found.entropy, -null.entropy),
            "kurtosis": found.kurtosis,
            "kurtosis_p": chance(found.kurtosis, null.kurtosis),
            "coherence": found.coherence,
            "coherence_p": chance(found.coherence, null.coherence),
            "coherence_p_random_tokens": chance(found.coherence, tokens),
        }
        rows = [{name: round(float(v[i]), 4) for name, v in columns.items()} for i in range(len(features))]
        return found.top, rows

    def _effects(
        self, place: WritePlace, rows: FeatureRows, features: list[int], token_sets: list[list[int]]
    ) -> tuple[Effects, np.ndarray, int]:
        """Effects of features and random directions, the document of every window, positions measured."""
        config = self.config
        ids = read_token_ids(self.run.evidence, rows.test)
        chosen = sample_windows(ids, config.windows, config.window_tokens)
        documents = rows.test.documents.reshape(rows.test.windows.tokens.shape)[chosen, 1]
        decoder = self.run.dictionary().W_dec.detach()[features].float().cpu()
        random = place.random_directions(config.random_directions, config.seed)
        effects = direction_effects(
            place,
            torch.cat([decoder, random]),
            ids[chosen, : config.window_tokens],
            token_sets,
            strength=config.strength,
        )
        return effects, DocumentGroups().of(documents), len(chosen) * (config.window_tokens - 1)

    def _scores(self, effects: Effects, groups: np.ndarray, num_features: int) -> list[OutputScore]:
        """A score for each token set; set s belongs to feature s modulo `num_features`."""
        size = int(groups.max()) + 1
        bootstrap = Bootstrap(size, self.config.num_bootstrap, self.config.seed)
        counts = np.bincount(groups, minlength=size)
        found = []
        for s in range(effects.shifts.shape[1]):
            own = s % num_features
            moved = np.stack([effects.shifts[own, s], *effects.shifts[num_features:, s]])  # [1 + R, W]
            sums = np.stack([np.bincount(groups, m, size) for m in moved])  # [1 + R, G]
            estimate = bootstrap.estimate(_z_of(sums, counts), size)
            means = moved.mean(-1)
            others = np.delete(effects.shifts[:num_features, s].mean(-1), own)
            found.append(
                OutputScore(
                    float(means[0]),
                    float(means[1:].mean()),
                    float(others.mean()) if len(others) else None,
                    estimate.value,
                    estimate.low,
                    estimate.high,
                )
            )
        return found


def _z_of(sums: np.ndarray, counts: np.ndarray):
    """Statistic of draws [B, G]: z of the first of the directions [1 + R] among the others, from sums by group."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        means = (weights @ sums.T) / (weights @ counts)[:, None]  # [B, 1 + R]
        spread = means[:, 1:].std(axis=1, ddof=1)
        return (means[:, 0] - means[:, 1:].mean(axis=1)) / np.maximum(spread, 1e-9)

    return statistic
