"""What a control is: a named check that the pipeline runs at a stated cost tier and that writes receipts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from ..explainers.base import Candidate
from ..split_rows import FeatureRows
from .examples import Examples
from .receipt import Receipt

if TYPE_CHECKING:
    from ..run import Run

#: Cost tiers; a tier runs the controls of those before it too.
TIERS = ("fast", "full", "paper")


class ReceiptError(ValueError):
    """A control that the rest rests on failed: no label of this run could be trusted."""


@dataclass(frozen=True)
class Labelled:
    """What controls look at: rows of a dictionary, their labels, the examples these are scored on."""

    run: "Run"
    rows: FeatureRows
    labels: Mapping[int, Candidate]  # features that have one
    examples: Mapping[int, Examples]  # test examples of features that can be scored
    tier: str


class Control(Protocol):
    """One check of `docs/receipts.md`."""

    code: ClassVar[str]  # 'C3'
    name: ClassVar[str]  # 'label permutation'
    tier: ClassVar[str]

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Raises ReceiptError where its failing ends the run (C0, C1)."""
        ...
