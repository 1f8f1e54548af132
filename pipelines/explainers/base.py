"""What an explainer is: train rows in, candidate labels out. Choosing among candidates is not its business."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..predicates import Predicate
from ..progress import OnProgress
from ..split_rows import FeatureRows

#: 'lexical': about the row's own token; 'structural': about class, place or neighbours; 'semantic': words whose meaning
#: a scorer has to judge; 'output': about the tokens that the feature makes likelier.
KINDS = ("lexical", "structural", "semantic", "output")


@dataclass(frozen=True)
class Candidate:
    """One label that a feature may get. `predicate` is its executable form, where it has one."""

    label: str
    kind: str
    explainer: str
    predicate: Predicate | None = None


class Explainer(Protocol):
    """Proposes candidate labels from train rows alone."""

    name: ClassVar[str]

    def propose(
        self, rows: FeatureRows, features: Sequence[int], on_progress: OnProgress
    ) -> Mapping[int, list[Candidate]]:
        """Candidates by feature, best first by what train says; features without one may be missing.

        Reads `rows.train` only: a test poisons the other splits and expects the same candidates.
        """
        ...
