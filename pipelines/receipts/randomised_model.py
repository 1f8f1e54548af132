"""C8: what labels score on a dictionary of a model that has learned nothing.

The run's recipe on the same text, the model's weight matrices redrawn (Heap et al. 2025, arXiv 2501.17727: aggregate
scores can be equal there). A random network still tells tokens apart, so what counts are contextual features: those
that their token alone does not explain.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ..control_runs import is_control
from .control import Control, Labelled
from .control_gaps import Trained
from .receipt import Receipt

if TYPE_CHECKING:
    from ..run import Run

#: The one that decides, and the one that is only reported where it was made.
KIND, MORE_KINDS = "randomised-model", ("randomised-all",)


class RandomisedModel:
    """Labels of contextual features against those of the same recipe on a redrawn model."""

    code: ClassVar[str] = "C8"
    name: ClassVar[str] = "randomised model"
    tier: ClassVar[str] = "paper"

    @classmethod
    def of(cls, run: "Run") -> "RandomisedModel":
        """Needs nothing but the run."""
        return cls()

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Of labels that are just made, against the control runs on disk; none for a control run itself."""
        return [] if is_control(labelled.run) else self.compare(Trained(labelled.run, labelled))

    def compare(self, trained: Trained) -> list[Receipt]:
        """The gap on contextual features, which decides; that on all of them and the shares, which do not."""
        title, found = f"{self.code} {self.name}", []
        for kind in (KIND, *MORE_KINDS):
            pair, own = trained.pair(kind), title if kind == KIND else f"{title} {kind}"
            if pair.scores is None:
                found += [pair.absent(own, pair.missing)] if kind == KIND else []
                continue
            mine, other = pair.scores
            contextual = mine.of_labels(contextual=True), other.of_labels(contextual=True)
            found += [
                pair.gap(own, *contextual, asked=kind == KIND),
                pair.gap(f"{own} all", mine.of_labels(), other.of_labels(), asked=False),
                pair.labelled_shares(f"{own} labelled share"),
                pair.labelled_shares(f"{own} contextual share", contextual=True),
            ]
        return found


_: type[Control] = RandomisedModel
