"""C7: what labels score where part of the dictionary stayed as it was drawn.

Three trainings of the run's own recipe: decoder frozen, decoder kept near its start, encoder frozen (Korznikov et al.
2026, arXiv 2602.14111). Beside them: how far the decoder rows of the run itself have turned from their start.
"""

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from saeql.sae.config import ConfigError
from saeql.sae.files import DictionaryError

from ..control_runs import find_control
from ..dictionaries import start_dictionary
from .control import Control
from .control_gaps import BesideControlRuns, Trained
from .receipt import REPORTED, Receipt

if TYPE_CHECKING:
    from ..run import Run

KINDS = ("frozen-decoder", "soft-frozen", "frozen-encoder")
_EDGES = np.linspace(-1, 1, 41)


class FrozenBaselines(BesideControlRuns):
    """Trained labels against those of dictionaries with frozen rows."""

    code: ClassVar[str] = "C7"
    name: ClassVar[str] = "frozen baselines"
    tier: ClassVar[str] = "paper"

    def compare(self, trained: Trained) -> list[Receipt]:
        """One receipt a baseline and kind of negatives, that of the best baseline, and the turn of decoder rows."""
        title, found, gaps = f"{self.code} {self.name}", [], []
        for kind in KINDS:
            pair = trained.pair(kind)
            if pair.scores is None:
                gaps.append(pair.absent(f"{title} {kind}", pair.missing))
                continue
            mine, other = pair.scores
            gaps.append(pair.gap(f"{title} {kind}", mine.of_labels(), other.of_labels()))
            found += [
                pair.gap(f"{title} {kind} N2", mine.of_same_token(), other.of_same_token()),
                pair.gap(f"{title} {kind} alive", mine.of_alive(), other.of_alive(), mean=True, asked=False),
                pair.labelled_shares(f"{title} {kind} labelled share"),
                pair.labelled_shares(f"{title} {kind} contextual share", contextual=True),
            ]
        measured = [(gap.value, gap) for gap in gaps if gap.value is not None]
        if measured:
            best = min(measured, key=lambda pair: pair[0])[1]
            found.append(
                Receipt(
                    control=f"{title} best", value=best.value, verdict=best.verdict, threshold=best.threshold,
                    n=best.n, low=best.low, high=best.high, detail={**best.detail, "measured": len(measured)},
                )
            )  # fmt: skip
        run = trained.run
        runs = [("", run), *((f" {kind}", find_control(run, kind)) for kind in KINDS)]
        return [*gaps, *found, *(turn(f"{title} cosine with start{end}", own) for end, own in runs if own is not None)]


def turn(name: str, run: "Run") -> Receipt:
    """Median cosine of a run's decoder rows with where they started, and the histogram of all of them."""
    try:
        trained = run.dictionary()
        if run.spec.config.start != "random":
            raise ConfigError(
                f'decoder rows started from the activations (dictionary.start = "{run.spec.config.start}")'
            )
        start = start_dictionary(run.spec, trained.d_in, trained.d_out)
    except (ConfigError, DictionaryError) as error:
        return Receipt(control=name, value=None, verdict=REPORTED, detail={"missing": str(error)})
    with torch.no_grad():
        cosines = torch.nn.functional.cosine_similarity(trained.W_dec, start.W_dec, dim=1).numpy()
    counts = np.histogram(np.clip(cosines, -1, 1), bins=_EDGES)[0]
    detail = {"edges": [round(float(e), 3) for e in _EDGES], "counts": counts.tolist()}
    low, high = (float(v) for v in np.percentile(cosines, (2.5, 97.5)))
    detail["share_at_least_0.8"] = float((cosines >= 0.8 - 1e-6).mean())
    detail["central_95"] = [low, high]
    return Receipt(control=name, value=float(np.median(cosines)), verdict=REPORTED, n=len(cosines), detail=detail)


_: type[Control] = FrozenBaselines
