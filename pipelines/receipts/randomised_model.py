"""C8: what labels score on a dictionary of a model that has learned nothing.

The run's recipe on the same text, the model's weight matrices redrawn (Heap et al. 2025, arXiv 2501.17727: aggregate
scores can be equal there). A random network still tells tokens apart, so what counts are contextual features: those
that their token alone does not explain.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from .control import Control, Labelled
from .control_gaps import ControlPair, share_receipt
from .control_scores import FeatureScores
from .receipt import REPORTED, Receipt

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
        """By what is on disk of the run and its control runs."""
        return self.compare(labelled.run)

    def compare(self, run: "Run") -> list[Receipt]:
        """The gap on contextual features, which decides; that on all of them and the shares, which do not."""
        title, found = f"{self.code} {self.name}", []
        for kind in (KIND, *MORE_KINDS):
            pair, own = ControlPair(run, kind), title if kind == KIND else f"{title} {kind}"
            if pair.mine is None or pair.other is None:
                found += [pair.absent(own, pair.missing)] if kind == KIND else []
                continue
            mine, other = pair.mine, pair.other
            contextual = (scores.of(scores.is_labelled & ~scores.is_lexical) for scores in (mine, other))
            found += [
                pair.gap(own, *contextual, asked=kind == KIND),
                pair.gap(f"{own} all", mine.of(mine.is_labelled), other.of(other.is_labelled), asked=False),
                share_receipt(f"{own} labelled share", other, kind),
                _contextual_share(f"{own} contextual share", other, kind),
                _contextual_share(f"{own} contextual share of the run", mine, kind),
            ]
        return found


def _contextual_share(name: str, scores: FeatureScores, kind: str) -> Receipt:
    """Share of the alive features that have a label and are not lexical."""
    alive = int(scores.is_alive.sum())
    count = int((scores.is_alive & scores.is_labelled & ~scores.is_lexical).sum())
    return Receipt(
        control=name, value=count / alive if alive else None, verdict=REPORTED, n=alive, detail={"kind": kind}
    )


_: type[Control] = RandomisedModel
