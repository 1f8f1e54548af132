"""C15: is the scorer itself to be trusted? Missing and constant answers, labels that say nothing, reliability."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from ..explainers.base import Candidate
from .control import Labelled
from .receipt import REPORTED, Receipt, judged
from .sampler import luck
from .statistics import auroc, pearson, spearman, split_half
from .thresholds import THRESHOLDS

if TYPE_CHECKING:
    from ..run import Run

#: Features that labels saying nothing are scored on.
_BASELINE_FEATURES = 200
#: The same where every row is asked of a language model.
_COSTLY_BASELINE_FEATURES = 20
#: Seeds that examples are drawn with anew, and features that are.
RESEEDS = 3
_RESEEDED_FEATURES = 500


class ScorerHealth:
    """Numbers about the scores of all labels, none about a label alone."""

    code: ClassVar[str] = "C15"
    name: ClassVar[str] = "scorer health"
    tier: ClassVar[str] = "fast"

    def __init__(self, *, seed: int = 0):
        self.seed = seed

    @classmethod
    def of(cls, run: "Run") -> Self:
        """By `label.seed`."""
        return cls(seed=run.config.label.seed)

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Missing answers, constant answers, baselines, correlation with length, split-half reliability, reseeds."""
        scores = {f: s for f, s in labelled.scores.items() if len(s.get("N1", ())) and len(s["active"])}
        if not scores:
            detail = {"missing": "no label could be scored"}
            return [Receipt(control=f"{self.code} {self.name}", value=None, verdict=REPORTED, detail=detail)]
        aurocs = {f: auroc(s["active"], s["N1"]) for f, s in scores.items()}
        return [
            self._missing(scores),
            self._constant(scores),
            *self._baselines(labelled, sorted(scores)),
            self._length(labelled, aurocs),
            self._reliability(scores),
            *self._reseeds(labelled, sorted(scores)),
        ]

    def _receipt(self, what: str, value: float | None, n: int, bar: float, *, at_least: bool, **detail) -> Receipt:
        verdict = judged(value, bar, at_least=at_least)
        control = f"{self.code} {self.name} {what}"
        return Receipt(control=control, value=value, threshold=bar, n=n, verdict=verdict, detail=detail)

    def _missing(self, scores: dict[int, dict[str, np.ndarray]]) -> Receipt:
        """Share of NaN answers; each of them already counts as wrong."""
        every = np.concatenate([part for own in scores.values() for part in own.values()])
        share = float(np.isnan(every).mean())
        return self._receipt("missing answers", share, len(every), THRESHOLDS.failed_share, at_least=False)

    def _constant(self, scores: dict[int, dict[str, np.ndarray]]) -> Receipt:
        """Share of labels that get the same score on all rows: AUROC 1/2, and no credit."""
        same = [len(np.unique(np.concatenate([own["active"], own["N1"]]))) == 1 for own in scores.values()]
        share = float(np.mean(same))
        return self._receipt("constant answers", share, len(same), THRESHOLDS.constant_share, at_least=False)

    def _baselines(self, labelled: Labelled, features: list[int]) -> list[Receipt]:
        """Mean AUROC of labels that say nothing of a feature, over a sample of them."""
        order = np.argsort(luck(self.seed, "baseline", np.array(features)))
        costly = getattr(labelled.label_scorer, "is_costly", False)
        sample = [features[i] for i in order[: _COSTLY_BASELINE_FEATURES if costly else _BASELINE_FEATURES]]
        labels = [labelled.labels[f] for f in sample]
        longest = max(labels, key=lambda label: (len(label.label), label.label))
        nothing: list[tuple[str, Callable[[Candidate], Candidate | None]]] = [
            # words: a label that is executed has no empty form
            ("empty label", lambda own: None if own.predicate else Candidate("", own.kind, own.explainer)),
            ('label "text"', lambda own: None if own.predicate else Candidate("text", own.kind, own.explainer)),
            ("longest label", lambda own: longest if (own.predicate is None) == (longest.predicate is None) else None),
        ]
        out = []
        for name, make in nothing:
            asked = [(f, made) for f in sample if (made := make(labelled.labels[f])) and labelled.labels[f] != made]
            if not asked:
                continue
            examples = [labelled.examples[f] for f, _ in asked]
            rows = [np.concatenate([e.active, e.negatives["N1"]]) for e in examples]
            found = labelled.label_scorer.score([c for _, c in asked], rows, labelled.rows.test)
            sizes = [len(e.active) for e in examples]
            mean = float(np.mean([auroc(s[:size], s[size:]) for s, size in zip(found, sizes, strict=True)]))
            margin = THRESHOLDS.baseline_margin
            verdict = judged(abs(mean - 0.5), margin, at_least=False)
            out.append(
                Receipt(
                    control=f"{self.code} {self.name} {name}",
                    value=mean,
                    threshold=margin,
                    n=len(asked),
                    verdict=verdict,
                    detail={"label": asked[0][1].label},
                )
            )
        return out

    def _length(self, labelled: Labelled, aurocs: dict[int, float]) -> Receipt:
        """Rank correlation of a label's AUROC with its length: a scorer that likes long labels shows here."""
        r = spearman(np.array(list(aurocs.values())), np.array([len(labelled.labels[f].label) for f in aurocs]))
        control = f"{self.code} {self.name} length correlation"
        return Receipt(control=control, value=None if np.isnan(r) else r, n=len(aurocs), verdict=REPORTED)

    def _reliability(self, scores: dict[int, dict[str, np.ndarray]]) -> Receipt:
        """Split-half reliability of the AUROC, from every second example of each side."""
        halves = np.array(
            [[auroc(own["active"][i::2], own["N1"][i::2]) for i in (0, 1)] for own in scores.values()], np.float64
        )
        r = split_half(halves[:, 0], halves[:, 1])
        control = f"{self.code} {self.name} split-half"
        if np.isnan(r):
            detail = {"missing": "fewer than three labels, or all of them score the same"}
            return Receipt(control=control, value=None, n=len(halves), verdict=REPORTED, detail=detail)
        bar = THRESHOLDS.split_half
        return Receipt(control=control, value=r, threshold=bar, n=len(halves), verdict=judged(r, bar))

    def _reseeds(self, labelled: Labelled, features: list[int]) -> list[Receipt]:
        """Correlation over features of the AUROC on examples drawn with one seed and with another, of three."""
        if getattr(labelled.label_scorer, "is_costly", False):
            return []
        sample = [features[i] for i in np.argsort(luck(self.seed, "reseeds", np.array(features)))[:_RESEEDED_FEATURES]]
        drawn = [labelled.source.reseeded(self.seed + 1 + i).sample("test", sample) for i in range(RESEEDS)]
        sample = [f for f in sample if all(f in own and len(own[f].negatives.get("N1", ())) for own in drawn)]
        labels, found = [labelled.labels[f] for f in sample], []
        for own in drawn:
            rows = [np.concatenate([own[f].active, own[f].negatives["N1"]]) for f in sample]
            scores = labelled.label_scorer.score(labels, rows, labelled.rows.test)
            sizes = [len(own[f].active) for f in sample]
            found.append([auroc(s[:size], s[size:]) for s, size in zip(scores, sizes, strict=True)])
        by_seed, control = np.array(found), f"{self.code} {self.name} reseeds"
        pairs = [pearson(by_seed[i], by_seed[j]) for i in range(RESEEDS) for j in range(i)]
        r = float(np.mean(pairs))
        if np.isnan(r):
            detail = {"missing": "fewer than two labels, or all of them score the same"}
            return [Receipt(control=control, value=None, n=len(sample), verdict=REPORTED, detail=detail)]
        detail = {"pairs": [round(p, 4) for p in pairs], "median_deviation": float(np.median(by_seed.std(0, ddof=1)))}
        bar = THRESHOLDS.split_half
        return [Receipt(control=control, value=r, threshold=bar, n=len(sample), verdict=judged(r, bar), detail=detail)]
