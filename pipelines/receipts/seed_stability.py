"""C9: which features another seed finds too.

Two trainings that differ in their seed are matched one to one (`matching.py`); a feature is shared where encoder and
decoder rows give the same partner and the decoder cosine is at least 0.7 (Paulo and Belrose 2025, arXiv 2501.16615).
A feature that only one seed found says something about the training, not about the model.
"""

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from saeql.sae.config import ConfigError

from ..compare import SHARED_COSINE, Pair, compare, find_compared
from ..control_runs import command, control_path, status
from ..dictionaries import start_dictionary
from .control import Control
from .control_gaps import BesideControlRuns, Trained
from .receipt import FAILED, PASSED, REPORTED, Receipt, judged
from .thresholds import THRESHOLDS

if TYPE_CHECKING:
    from ..run import Run

KIND = "second-seed"


class SeedStability(BesideControlRuns):
    """Features of a run beside those of a second seed."""

    code: ClassVar[str] = "C9"
    name: ClassVar[str] = "seed stability"
    tier: ClassVar[str] = "paper"

    def compare(self, trained: Trained) -> list[Receipt]:
        """The shared share with what chance gives, and every feature's own flag."""
        run = trained.run
        title, state = f"{self.code} {self.name}", status(run, KIND)
        other = control_path(run, KIND)
        if state in ("none", "begun", "harvest done") or state.startswith("out of date"):
            detail = {"missing": f"{state}: `{command(run, KIND)}` makes it", "kind": KIND}
            return [Receipt(control=title, value=None, verdict=FAILED, detail=detail)]
        found = compare(find_compared([str(run.path), str(other)]))
        pair = found.pairs[0]
        return [*self._whole(run, title, pair, found.dictionaries[0].density), *self._features(pair)]

    def _whole(self, run: "Run", title: str, pair: Pair, density: NDArray[np.float32] | None) -> list[Receipt]:
        summary, num = pair.summary, len(pair.matching.partner)
        least = THRESHOLDS.shared_share if num <= THRESHOLDS.wide else THRESHOLDS.shared_share_wide
        low, high = summary["shared_interval"]
        detail = {
            "kind": KIND,
            "method": summary["method"],
            "shared_cosine": SHARED_COSINE,
            "mean_max_cosine": summary["mean_max_cosine"],
            "nulls": summary["nulls"],
            "same_start": _starts_agree(run),
        }
        whole = Receipt(
            control=title, value=summary["shared_share"], verdict=judged(summary["shared_share"], least),
            threshold=least, n=num, low=low, high=high, detail=detail,
        )  # fmt: skip
        alive = summary.get("shared_share_of_alive")
        if alive is None or density is None:
            return [whole]
        return [
            whole,
            Receipt(control=f"{title} of alive features", value=alive, verdict=REPORTED, n=int((density > 0).sum())),
        ]

    def _features(self, pair: Pair) -> list[Receipt]:
        """Every feature's cosine with its partner; passed where it is shared."""
        m, name = pair.matching, f"{self.code} {self.name} of the feature"
        shared = m.shared(SHARED_COSINE)
        return [
            Receipt(
                control=name,
                value=float(m.decoder_cosine[feature]),
                threshold=SHARED_COSINE,
                feature=feature,
                n=1,
                verdict=PASSED if shared[feature] else FAILED,
                detail={"partner": int(m.partner[feature])},
            )
            for feature in range(len(m.partner))
        ]


def _starts_agree(run: "Run") -> bool:
    """Whether both trainings began with the same rows: then they share their dead latents for that reason alone."""
    from ..run import Run

    other = Run.open(control_path(run, KIND))
    widths = run.dictionary()
    try:
        rows = [start_dictionary(r.spec, widths.d_in, widths.d_out).W_dec for r in (run, other)]
    except ConfigError:
        return False
    with torch.no_grad():
        return bool(np.isclose(float((rows[0] * rows[1]).sum(1).mean()), 1.0, atol=0.01))


_: type[Control] = SeedStability
