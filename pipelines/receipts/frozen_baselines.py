"""C7: what labels score where part of the dictionary stayed as it was drawn.

Three trainings of the run's own recipe: decoder frozen, decoder kept near its start, encoder frozen (Korznikov et al.
2026, arXiv 2602.14111). Beside them: how far the decoder rows of the run itself have turned from their start.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from saeql.sae.config import ConfigError
from saeql.sae.files import DictionaryError

from ..control_runs import find_control
from ..dictionaries import start_dictionary
from .beyond_labels import one_latent_gap, steering_gap
from .control import Control
from .control_gaps import BesideControlRuns, ControlPair, Trained
from .receipt import FAILED, PASSED, REPORTED, Receipt

if TYPE_CHECKING:
    from ..run import Run

KINDS = ("frozen-decoder", "soft-frozen", "frozen-encoder")
#: Of these one is asked to be above 0.
_HARDER = ("N2", "one latent", "steering")
_EDGES = np.linspace(-1, 1, 41)


class FrozenBaselines(BesideControlRuns):
    """Trained labels against those of dictionaries with frozen rows."""

    code: ClassVar[str] = "C7"
    name: ClassVar[str] = "frozen baselines"
    tier: ClassVar[str] = "paper"

    def compare(self, trained: Trained) -> list[Receipt]:
        """One receipt a baseline and kind of negatives, that of the best baseline, and the turn of decoder rows."""
        title = f"{self.code} {self.name}"
        found: list[Receipt] = []
        gaps: list[Receipt] = []
        asked: list[list[Receipt]] = []
        for kind in KINDS:
            pair = trained.pair(kind)
            if pair.scores is None:
                gaps.append(pair.absent(f"{title} {kind}", pair.missing))
                continue
            mine, other = pair.scores
            gaps.append(pair.gap(f"{title} {kind}", mine.of_labels(), other.of_labels()))
            asked.append(harder(pair, f"{title} {kind}"))
            found += [
                *asked[-1],
                pair.gap(f"{title} {kind} alive", mine.of_alive(), other.of_alive(), mean=True, asked=False),
                pair.labelled_shares(f"{title} {kind} labelled share"),
                pair.labelled_shares(f"{title} {kind} contextual share", contextual=True),
            ]
        best = _smallest(gaps)
        if best is not None:
            detail = {**best.detail, "measured": sum(gap.value is not None for gap in gaps)}
            found.append(replace(best, control=f"{title} best", detail=detail))
        if asked:
            found.append(_any_above(f"{title} N2, one latent or steering", asked))
        run = trained.run
        runs = [("", run), *((f" {kind}", find_control(run, kind)) for kind in KINDS)]
        return [*gaps, *found, *(turn(f"{title} cosine with start{end}", own) for end, own in runs if own is not None)]


def harder(pair: ControlPair, title: str) -> list[Receipt]:
    """What else is asked beside one baseline: labels against the same token, single latents, steering."""
    assert pair.scores is not None
    mine, other = pair.scores
    return [
        pair.gap(f"{title} N2", mine.of_same_token(), other.of_same_token()),
        one_latent_gap(pair, f"{title} one latent"),
        *steering_gap(pair, f"{title} steering"),
    ]


def _smallest(gaps: Sequence[Receipt]) -> Receipt | None:
    """That of the best baseline."""
    return min((gap for gap in gaps if gap.value is not None), key=lambda gap: gap.value or 0.0, default=None)


def _any_above(name: str, by_baseline: Sequence[Sequence[Receipt]]) -> Receipt:
    """How many of N2, one latent and steering have an interval above 0 beside the best baseline; asked is one.

    A question that was not put to every baseline counts by those that it was put to.
    """
    best = {
        what: _smallest([r for receipts in by_baseline for r in receipts if r.control.endswith(f" {what}")])
        for what in _HARDER
    }
    measured = {what: receipt for what, receipt in best.items() if receipt is not None}
    above = [what for what, receipt in measured.items() if receipt.verdict == PASSED]
    missing = [what for what in _HARDER if what not in measured]
    detail = {
        "above": above,
        "measured": {what: receipt.control for what, receipt in measured.items()},
        "not measured": missing,
        "card": f"above 0: {', '.join(above) or 'none'}" + (f"; not measured: {', '.join(missing)}" if missing else ""),
    }
    verdict = PASSED if above else FAILED if len(measured) == len(_HARDER) else REPORTED
    return Receipt(control=name, value=len(above), verdict=verdict, threshold=1, n=len(measured), detail=detail)


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
