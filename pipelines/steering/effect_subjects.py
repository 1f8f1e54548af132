"""Which features or vectors an effect is asked of, and the concept of each; features chosen by their output score.

The output score of a feature is z of the shift of its choosing words on calibration text, among random directions of
the same length (after Arad et al. 2025, arXiv:2505.20063: features that write what they are about steer best).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..output_effects import WritePlace
from ..output_labels import TokenTexts
from ..progress import OnProgress
from ..split_rows import FeatureRows, read_feature_rows, read_token_ids, sample_windows
from .concept_words import Concept, ConceptError, Stems, concept_of_words, concepts_of_features
from .edits import SteerError
from .effect_config import EffectConfig
from .kept_passes import KeptPasses
from .rival_directions import own_lens_scores
from .selection import check_top, chosen_features
from .vectors import SteeringVector

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class Asked:
    """What is asked about; `top` alone chooses features by output score."""

    features: tuple[int, ...] = ()
    search: str | None = None
    where: str | None = None
    top: int | None = None
    words: tuple[str, ...] = ()
    vectors: tuple[SteeringVector, ...] = ()


@dataclass(frozen=True)
class Subject:
    """One direction [d_out] and the concept that it is measured on."""

    name: str
    feature: int | None
    direction: torch.Tensor
    concept: Concept
    score: float | None = None
    """Output score, of features that were chosen by it."""


class Ground:
    """What all questions about a run's steering effects need, loaded on first use.

    Raises ModelError for an encoder, which predicts no next token.
    """

    def __init__(self, run: "Run", config: EffectConfig, kept: KeptPasses | None = None):
        self.run, self.config = run, config
        self.kept = kept or KeptPasses()
        self.place = WritePlace.of(run)

    @cached_property
    def rows(self) -> FeatureRows:
        """Where features are active."""
        return read_feature_rows(
            self.run.evidence, self.run.spec.name, active_fraction=self.run.config.label.active_fraction
        )

    @cached_property
    def stems(self) -> Stems:
        """Tokens by word."""
        return Stems(TokenTexts(self.place.lm))

    @cached_property
    def decoder(self) -> torch.Tensor:
        """[d_sae, d_out] float32."""
        return self.run.dictionary().W_dec.detach().float().cpu()

    @cached_property
    def concepts(self) -> dict[int, Concept]:
        """Of all features that have one, from train text."""
        train = self.rows.train
        ids = read_token_ids(self.run.evidence, train)
        alive = np.flatnonzero(train.active.counts > 0).tolist()
        return concepts_of_features(self.stems, train, ids, alive)

    def windows(self, split: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """[W, T] token ids of a split, evenly spread, and the document of each window.

        Raises SteerError where the split has no window that is long enough.
        """
        rows, length = self.rows.of(split), self.config.window_tokens
        ids = read_token_ids(self.run.evidence, rows)
        chosen = sample_windows(ids, max(1, tokens // length), length)
        if not len(chosen):
            raise SteerError(f"the {split} split has no window of {length} tokens: harvest more text")
        documents = rows.documents.reshape(rows.windows.tokens.shape)[chosen, 1]
        return ids[chosen, :length], documents


def subjects_of(ground: Ground, asked: Asked, on_progress: OnProgress | None = None) -> list[Subject]:
    """The subjects of a question. Raises SteerError where it names no feature, one that is not there, or no concept."""
    if asked.top is not None:
        check_top(asked.top)
    given = concept_of_words(ground.stems, asked.words) if asked.words else None
    found = [_of_vector(ground, vector, given) for vector in asked.vectors]
    features = _named(ground, asked)
    if features:
        found += _of_features(ground, features, given)
    elif not asked.vectors or asked.top is not None:
        if asked.top is None and given is None:
            raise SteerError(
                "name what is measured: --feature, --search, --where, --top N, --words or a --vector with --words"
            )
        found += best_features(ground, asked.top or 1, given, on_progress)
    return found


def _named(ground: Ground, asked: Asked) -> list[int]:
    d_sae = len(ground.decoder)
    wrong = next((f for f in asked.features if not 0 <= f < d_sae), None)
    if wrong is not None:
        raise SteerError(f"no feature {wrong}: this dictionary has features 0 to {d_sae - 1}")
    if asked.search is None and asked.where is None:
        return list(dict.fromkeys(asked.features))
    with ground.run.store() as store:
        found = chosen_features(
            store,
            [str(f) for f in asked.features],
            search=asked.search,
            where=asked.where,
            top=1 if asked.top is None else asked.top,
            dictionary=ground.run.spec.name,
        )
    return list(dict.fromkeys(found))


def _of_features(ground: Ground, features: Sequence[int], given: Concept | None) -> list[Subject]:
    concepts = {f: given or ground.concepts.get(f) for f in features}
    found = [Subject(f"feature {f}", f, ground.decoder[f], c) for f, c in concepts.items() if c is not None]
    if not found:
        raise ConceptError(
            f"feature {', '.join(map(str, features))}: too few words follow it in train text more often than "
            "elsewhere, so there is nothing to measure it on: give --words"
        )
    return found


def _of_vector(ground: Ground, vector: SteeringVector, given: Concept | None) -> Subject:
    if given is None:
        raise ConceptError(f"vector {vector.name} does not say what it is about: give --words")
    lm, writes = ground.place.lm, ground.place.writes
    if vector.model_sha256 and vector.model_sha256 != lm.identity.model_sha256:
        raise SteerError(f"vector {vector.name} was made with {vector.model_name}, not {lm.identity.model_name}")
    parts = []
    for hook_point, width in writes.items():
        row = vector.rows.get(hook_point)
        if row is None or len(row) != width:
            has = ", ".join(f"{p} [{len(r)}]" for p, r in vector.rows.items())
            raise SteerError(f"vector {vector.name} has {has}: effects are measured at {hook_point} [{width}]")
        parts.append(row.float())
    direction = torch.cat(parts)
    if not bool(torch.isfinite(direction).all()) or float(direction.norm()) == 0:
        raise SteerError(f"vector {vector.name} is zero or not finite: it cannot steer")
    return Subject(f"vector {vector.name}", None, direction, given)


def best_features(
    ground: Ground, num: int, given: Concept | None, on_progress: OnProgress | None = None
) -> list[Subject]:
    """The `num` features with the best output score on calibration text, best first.

    All with a concept are ranked by the logit lens of their choosing words; `candidates` times `num` of them are added
    to the model. A concept `given` is that of all features, and needs two words.
    """
    if given is not None and not given.choosing:
        raise ConceptError("features are chosen on other words than those that measure: give --words two or more")
    if given is not None:
        alive = np.flatnonzero(ground.rows.train.active.counts > 0).tolist()
        concepts = dict.fromkeys(alive, given)
    else:
        concepts = ground.concepts
    if not concepts:
        raise ConceptError("no feature of this dictionary has enough words of its own in the train text: give --words")
    config, features = ground.config, np.array(list(concepts))
    choosing = [concepts[f].choosing for f in features.tolist()]
    lens = own_lens_scores(ground.decoder[torch.from_numpy(features)], ground.place.lm, choosing)
    order = np.argsort(-lens, kind="stable")[: config.candidates * num]
    features = features[order]
    choosing = [choosing[i] for i in order.tolist()]
    windows, _ = ground.windows("calibration", config.choosing_tokens)
    random = ground.place.random_directions(config.random_directions, config.seed + 2)
    effects = ground.kept.effects(
        ground.place,
        torch.cat([ground.decoder[torch.from_numpy(features)], random]),
        windows,
        choosing,
        strength=config.choosing_strength,
        on_progress=on_progress,
    )
    n = len(features)
    shifts = effects.shifts.mean(-1)  # [n + R, S]
    null = shifts[n:]
    scores = (shifts[np.arange(n), np.arange(n)] - null.mean(0)) / np.maximum(null.std(0, ddof=1), 1e-9)
    best = np.argsort(-scores, kind="stable")[:num]
    return [
        Subject(f"feature {f}", f, ground.decoder[f], concepts[f], float(scores[i]))
        for i, f in zip(best.tolist(), features[best].tolist(), strict=True)
    ]
