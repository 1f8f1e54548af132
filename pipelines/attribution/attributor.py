"""Attributor: which features of a prompt caused its next token, estimated by gradients and tested by ablation.

The attribution of feature j at token t is g_t . d_j z_j(t): the gradient of the target with respect to the activation
there, along what the feature writes; the reconstruction error is a part beside the features and stays in place (Marks
et al. 2024, "Sparse Feature Circuits", arXiv 2403.19647). With several steps the gradient is the mean over the
straight path from all parts at 0 to all as they are (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365).
The exact effect is the target less the target with z_j(t) = 0.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from saeql.sae.model import SparseAutoencoder

from ..models import LanguageModel, ModelIdentity
from ..splice import Splicer
from .agreement import Agreement, agreement
from .causes import FeatureCause, Pair, TokenCause, Whole, Why
from .parts import Parts, rows_read, take_apart
from .scene import Scene
from .target import Target, WhyError, choose_target, prompt_ids

MAX_STEPS = 256


class Attributor:
    """Explains predictions by a dictionary's features. The model should be in float32: effects are small differences.

    Raises WhyError for a crosscoder and for an encoder, ModelMismatch where the dictionary belongs to another model.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        dictionary: SparseAutoencoder,
        reads: Sequence[str],
        writes: Sequence[str],
        metadata: dict[str, Any],
    ):
        """`metadata` is the dictionary's own: identity, median norms, and which rows it did not learn from."""
        language_model.require_whole("attribution")
        if not language_model.is_causal:
            raise WhyError(f"{language_model.identity.model_name} is an encoder: it predicts no next token")
        if len(reads) != 1 or len(writes) != 1:
            raise WhyError(
                f"a crosscoder writes {len(writes)} hook points that depend on each other: attribution needs a "
                "dictionary that reads one and writes one"
            )
        if "identity" in metadata:
            identity = ModelIdentity(**metadata["identity"])
            identity.require(language_model.identity.at(tuple(reads)))
        self.lm, self.dictionary = language_model, dictionary.to(language_model.device)
        self.reads, self.writes, self.metadata = reads[0], writes[0], metadata

    def why(
        self,
        prompt: str | Sequence[int],
        token: str | None = None,
        *,
        against: str | None = None,
        measure: str = "logit",
        position: int = -1,
        steps: int = 1,
        top: int = 20,
        ablate: int = 50,
        seed: int = 0,
    ) -> Why:
        """What caused the prediction after `position` of a prompt: a text, or token ids as they are.

        The target is the `measure` of `token` (None: the model's likeliest), or its logit less that of `against`.
        Exact effects are measured of the `top` features, and of the `ablate` strongest pairs of a feature and a token
        with as many drawn at random.
        Raises WhyError for a prompt, position or token that there is not.
        """
        if not 1 <= steps <= MAX_STEPS or top < 1 or ablate < 0:
            raise WhyError(f"steps are 1 to {MAX_STEPS}, top at least 1, ablate at least 0")
        ids = prompt_ids(self.lm, prompt, position)
        names = list(dict.fromkeys((self.reads, self.writes)))
        with Splicer(self.lm.model, names, [self.writes], self.lm.device, last_only=True) as splicer:
            scene = Scene(splicer, torch.tensor([ids], device=self.lm.input_device))
            target = choose_target(self.lm, scene.logits, token, against, measure)
            keep = rows_read(scene.acts[self.writes], self.writes, self.metadata)
            keep &= rows_read(scene.acts[self.reads], self.reads, self.metadata)
            parts = take_apart(self.dictionary, scene.acts[self.reads], scene.acts[self.writes], keep)
            gradient = scene.gradient(self.writes, target, parts, steps)
            effects = _Effects(parts, gradient, top, ablate, seed)
            effects.measure(scene, self.writes, target)
        texts = self.lm.token_texts(ids)
        probabilities = scene.logits.softmax(-1)
        mine = probabilities[target.token_id]
        return Why(
            texts,
            target,
            float(target.of(scene.logits[None])[0]),
            float(mine),
            int((probabilities > mine).sum()) + 1,
            steps,
            effects.by_feature(),
            effects.by_token(texts),
            effects.pairs(),
            effects.wholes(),
            effects.agreements(),
        )


class _Effects:
    """Attributions of one prompt, and the exact effects of those that are tested."""

    def __init__(self, parts: Parts, gradient: torch.Tensor, top: int, ablate: int, seed: int):
        self.parts, self.gradient = parts, gradient
        along = (gradient @ parts.W_dec.t())[parts.positions, parts.features]
        self.estimates = (along * parts.values).cpu()  # [E]
        self.positions, self.features = parts.positions.cpu(), parts.features.cpu()
        self.order = self.estimates.abs().argsort(descending=True, stable=True)
        self.strongest: list[int] = self.order[:ablate].tolist()
        drawn = torch.randperm(len(self.order), generator=torch.Generator().manual_seed(seed))
        self.drawn: list[int] = drawn[:ablate].tolist()
        self.sums = torch.zeros(len(parts.W_dec)).index_add(0, self.features, self.estimates)
        found = self.features.unique()
        self.best: list[int] = found[self.sums[found].abs().argsort(descending=True, stable=True)][:top].tolist()
        self.own = {feature: (self.features == feature).nonzero()[:, 0] for feature in self.best}
        named = {"features": parts.explained, "skip": parts.skip, "error": parts.error, "everything": parts.whole}
        self.given = {name: part for name, part in named.items() if part is not None}
        self.exact_pair: dict[int, float] = {}
        self.exact_feature: dict[int, float] = {}
        self.exact_whole: dict[str, float] = {}

    def measure(self, scene: Scene, name: str, target: Target) -> None:
        """Exact effects: of all of each part, of single pairs, of the best features on all their tokens."""
        parts, single = self.parts, list(dict.fromkeys((*self.strongest, *self.drawn)))
        groups = [torch.tensor([entry]) for entry in single] + [self.own[feature] for feature in self.best]
        new = chain(
            (parts.acts,),
            (parts.acts - part for part in self.given.values()),
            (parts.without(group.to(parts.acts.device)) for group in groups),
        )
        values = scene.values(name, target, new, 1 + len(self.given) + len(groups)).double()
        lost = iter((values[0] - values[1:]).tolist())
        self.exact_whole = {part: next(lost) for part in self.given}
        self.exact_pair = {entry: next(lost) for entry in single}
        self.exact_feature = {feature: next(lost) for feature in self.best}

    def by_feature(self) -> list[FeatureCause]:
        causes = []
        for feature in self.best:
            own = self.own[feature]
            strongest = own[self.estimates[own].abs().argmax()]
            place, attribution = int(self.positions[strongest]), float(self.sums[feature])
            causes.append(FeatureCause(feature, len(own), attribution, self.exact_feature[feature], place))
        return causes

    def by_token(self, texts: list[str]) -> list[TokenCause]:
        sums = torch.zeros(len(texts)).index_add(0, self.positions, self.estimates).tolist()
        error = (self.gradient * self.parts.error).sum(1).tolist()
        best: dict[int, int] = {}
        for entry in self.order.tolist():
            best.setdefault(int(self.positions[entry]), int(self.features[entry]))
        return [TokenCause(t, text, sums[t], error[t], best.get(t)) for t, text in enumerate(texts)]

    def pairs(self) -> list[Pair]:
        drawn = set(self.drawn)
        features, positions = self.features.tolist(), self.positions.tolist()
        values, estimates = self.parts.values.tolist(), self.estimates.tolist()
        return [
            Pair(features[e], positions[e], values[e], estimates[e], self.exact_pair.get(e), e in drawn)
            for e in self.order.tolist()
        ]

    def wholes(self) -> list[Whole]:
        return [
            Whole(name, float((self.gradient * part).sum()), self.exact_whole[name])
            for name, part in self.given.items()
        ]

    def agreements(self) -> list[Agreement]:
        samples = {"strongest": self.strongest, "random": self.drawn, "both": list(self.exact_pair)}
        return [
            agreement(name, self.estimates[some].tolist(), [self.exact_pair[entry] for entry in some])
            for name, some in samples.items()
        ]
