"""C8: what labels score on a dictionary of a model that has learned nothing.

The run's recipe on the same text, the model's weight matrices redrawn (Heap et al. 2025, arXiv 2501.17727: aggregate
scores can be equal there). A random network still tells tokens apart, so what counts are contextual features: those
that their token alone does not explain.
"""

from typing import ClassVar

from .control import Control
from .control_gaps import BesideControlRuns, Trained
from .receipt import Receipt

#: The one that decides, and the one that is only reported where it was made.
KIND, MORE_KINDS = "randomised-model", ("randomised-all",)


class RandomisedModel(BesideControlRuns):
    """Labels of contextual features against those of the same recipe on a redrawn model."""

    code: ClassVar[str] = "C8"
    name: ClassVar[str] = "randomised model"
    tier: ClassVar[str] = "paper"

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
