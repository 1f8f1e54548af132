"""Explainers by the name that `label.explainers` and `--explainer` take. A class is imported when it is asked for."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from saeql.sae.config import suggestion

#: name -> module of this package and class in it; every class is built with `.of(run)`.
EXPLAINERS: dict[str, tuple[str, str]] = {
    "predicates": ("predicates", "PredicateExplainer"),
    "label_bank": ("label_bank", "LabelBank"),
    "ngrams": ("ngrams", "NGramExplainer"),
    "output": ("output", "OutputExplainer"),
    "word_list": ("language_model", "WordList"),
    "max_activation": ("language_model", "MaxActivation"),
    "contrastive": ("language_model", "Contrastive"),
}


def explainers(names: Sequence[str]) -> list[Any]:
    """The classes of `names`, in their order. Raises ValueError at a name that no explainer has."""
    for name in names:
        if name not in EXPLAINERS:
            raise ValueError(
                f"no explainer {name!r}: there is {', '.join(EXPLAINERS)}{suggestion(name, tuple(EXPLAINERS))}"
            )
    return [getattr(import_module(f".{EXPLAINERS[n][0]}", __package__), EXPLAINERS[n][1]) for n in names]
