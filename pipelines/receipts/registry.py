"""Scorers by name and controls by code. A class is imported when it is asked for."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from saeql.sae.config import ConfigError, suggestion

from .tiers import TIERS

#: name -> module of this package and class in it; every class is built with `.of(run)`.
SCORERS: dict[str, tuple[str, str]] = {
    "predicates": ("predicate_scorer", "PredicateScorer"),
    "embedding": ("embedding_scorers", "EmbeddingScorer"),
    "embedding_word": ("embedding_scorers", "WordScorer"),
    "embedding_near": ("embedding_scorers", "NearScorer"),
    "embedding_window": ("embedding_scorers", "WindowScorer"),
    "detection": ("judge_scorers", "Detection"),
    "fuzzing": ("judge_scorers", "Fuzzing"),
    "simulation": ("judge_scorers", "Simulation"),
    "surprisal": ("surprisal", "Surprisal"),
}

#: Scorers that ask a language model about every row: controls that score many labels ask fewer of them.
COSTLY_SCORERS = frozenset({"detection", "fuzzing", "simulation", "surprisal", "intervention"})

#: code -> (module, class, tier), in the order in which they run.
CONTROLS: dict[str, tuple[str, str, str]] = {
    "C0": ("split_hygiene", "SplitHygiene", "fast"),
    "C1": ("metric_tests", "MetricTests", "fast"),
    "C2": ("true_null", "TrueNull", "full"),
    "C3": ("label_permutation", "LabelPermutation", "fast"),
    "C4": ("negative_ladder", "NegativeLadder", "fast"),
    "C5": ("token_baseline", "TokenBaseline", "fast"),
    "C6": ("random_dictionary", "RandomDictionary", "full"),
    "C7": ("frozen_baselines", "FrozenBaselines", "paper"),
    "C8": ("randomised_model", "RandomisedModel", "paper"),
    "C9": ("seed_stability", "SeedStability", "paper"),
    "C10": ("probes", "PlantedProbes", "full"),  # and C11, C12
    "C13": ("token_identity_control", "TokenIdentityControl", "full"),
    "C14": ("activation_range", "ActivationRange", "fast"),
    "C14b": ("second_corpus", "SecondCorpus", "paper"),
    "C15": ("scorer_health", "ScorerHealth", "fast"),
    "C16": ("planted", "PlantedSuite", "full"),
    "C17": ("absorption", "Absorption", "paper"),
    "L1": ("label_free", "LabelFree", "full"),
    "I1": ("intervention", "OutputIntervention", "full"),
}

#: Module and class that fill rung N3 (`examples.NearRows`), at the tiers that pay for it; None: the rung is missing.
NEAR_ROWS: tuple[str, str] | None = ("near_rows", "NearestInMeaning")


def scorers(names: Sequence[str]) -> list[Any]:
    """The classes of `names`, in their order. Raises ConfigError at a name that no scorer has."""
    for name in names:
        if name not in SCORERS:
            raise ConfigError(f"no scorer {name!r}: there is {', '.join(SCORERS)}{suggestion(name, tuple(SCORERS))}")
    return [_load(*SCORERS[name]) for name in names]


def controls(tier: str) -> list[Any]:
    """The classes of the controls that run at `tier`, those of the tiers before it included.

    Raises ConfigError where there is no such tier.
    """
    if tier not in TIERS:
        raise ConfigError(f"no tier {tier!r}: there is {', '.join(TIERS)}{suggestion(tier, TIERS)}")
    wanted = TIERS[: TIERS.index(tier) + 1]
    return [_load(module, name) for module, name, own in CONTROLS.values() if own in wanted]


def near_rows() -> Any | None:
    """The class that finds rows near in meaning, None where there is none."""
    return None if NEAR_ROWS is None else _load(*NEAR_ROWS)


def _load(module: str, name: str) -> Any:
    return getattr(import_module(f".{module}", __package__), name)
