"""C2: the whole pipeline on features that mean nothing: their activations on random rows of the same split.

Whatever score labels of such features get is what the pipeline itself gives away.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from saeql.store.records import SPLITS

from ..explainers.base import Explainer
from ..explainers.registry import explainers
from ..label_config import LabelConfig
from ..split_rows import ActiveRows, FeatureRows, SplitRows
from .control import Labelled, ReceiptError
from .held_out import HeldOut
from .receipt import REPORTED, Receipt, judged
from .sampler import SampleConfig, luck
from .statistics import DocumentDraws, auroc
from .thresholds import THRESHOLDS

if TYPE_CHECKING:
    from ..run import Run


#: Null features for each that is needed: with thresholds off only two of five get a label that holds anywhere.
_SAMPLED = 3


class TrueNull:
    """Permutes positions, labels the null features as the run labels its own, and again with every threshold off."""

    code: ClassVar[str] = "C2"
    name: ClassVar[str] = "true null"
    tier: ClassVar[str] = "full"

    def __init__(self, config: LabelConfig, make_explainers: Callable[[LabelConfig], Sequence[Explainer]]):
        self.config, self._make_explainers = config, make_explainers

    @classmethod
    def of(cls, run: "Run") -> Self:
        """With the run's explainers."""

        def make(config: LabelConfig) -> Sequence[Explainer]:
            changed = type(run)(run.path, replace(run.config, label=config))
            return [made.of(changed) for made in explainers(config.explainers)]

        return cls(run.config.label, make)

    def check(self, labelled: Labelled) -> Sequence[Receipt]:
        """Share of null features that get a label, and mean AUROC and share significant of forced labels."""
        rows = null_rows(labelled.rows, self.config)
        if rows.num_features == 0:
            detail = {"missing": f"no feature has {self.config.min_active_rows} active rows on train and calibration"}
            return [Receipt(control=f"{self.code} {self.name}", value=None, verdict=REPORTED, detail=detail)]
        return [self._labelled_share(labelled, rows), *self._forced(labelled, rows)]

    def _label(self, labelled: Labelled, rows: FeatureRows, config: LabelConfig):
        from ..label import label_rows, labels_of  # which controls are part of

        held_out = HeldOut(rows, SampleConfig(num=config.num_examples, seed=config.seed))
        made = self._make_explainers(config)
        table = label_rows(rows, config, explainers=made, scorer=labelled.label_scorer, held_out=held_out)
        return labels_of(table), held_out

    def _labelled_share(self, labelled: Labelled, rows: FeatureRows) -> Receipt:
        labels, _ = self._label(labelled, rows, self.config)
        return self._share("labelled share", len(labels), rows.num_features)

    def _share(self, what: str, count: int, n: int) -> Receipt:
        rate = THRESHOLDS.null_significant
        most = rate + 2 * float(np.sqrt(rate * (1 - rate) / max(n, 1)))
        share = count / n if n else None
        verdict = judged(share, most, at_least=False) if n >= THRESHOLDS.null_features else REPORTED
        return Receipt(control=f"{self.code} {self.name} {what}", value=share, threshold=most, n=n, verdict=verdict)

    def _forced(self, labelled: Labelled, rows: FeatureRows) -> list[Receipt]:
        loose = replace(self.config, min_f1=0.0, min_lift=0.0, min_hits=1, min_auroc=0.0)
        labels, held_out = self._label(labelled, rows, loose)
        examples = held_out.sample("test", sorted(labels))
        examples = {f: e for f, e in examples.items() if len(e.negatives.get("N1", ()))}
        both = [np.concatenate([e.active, e.negatives["N1"]]) for e in examples.values()]
        found = labelled.label_scorer.score([labels[f] for f in examples], both, rows.test)
        draws = DocumentDraws(rows.test.num_documents, draws=self.config.num_bootstrap, seed=self.config.seed)
        documents, values, lows = rows.test.documents, [], []
        for e, scores in zip(examples.values(), found, strict=True):
            positive, negative = np.split(scores, [len(e.active)])
            values.append(auroc(positive, negative))
            low, _ = draws.interval(positive, documents[e.active], negative, documents[e.negatives["N1"]])
            lows.append(low)
        margin, n = THRESHOLDS.null_margin, len(values)
        mean = float(np.mean(values)) if values else None
        enough = n >= THRESHOLDS.null_features
        verdict = judged(abs(mean - 0.5) if mean is not None else None, margin, at_least=False) if enough else REPORTED
        error = float(np.std(values) / np.sqrt(n)) if n else None
        control = f"{self.code} {self.name} mean"
        return [
            Receipt(
                control=control,
                value=mean,
                threshold=margin,
                n=n,
                low=None if mean is None or error is None else mean - 1.96 * error,
                high=None if mean is None or error is None else mean + 1.96 * error,
                verdict=verdict,
                detail={"score": "AUROC against matched negatives (N1), thresholds off"},
            ),
            self._share("significant", int(np.sum(np.array(lows) > 0.5)), n),
        ]


def null_rows(rows: FeatureRows, config: LabelConfig) -> FeatureRows:
    """A sample of the features that are labelled at all, numbered anew, with their activations on random rows.

    Each keeps its activations, how many there are, and its split; only where they lie is drawn anew.
    """
    enough = np.minimum(rows.train.active.counts, rows.calibration.active.counts) >= config.min_active_rows
    enough &= rows.test.active.counts > 0
    able = np.flatnonzero(enough)
    chosen = able[np.argsort(luck(config.seed, "null features", able))[: _SAMPLED * THRESHOLDS.null_features]]
    chosen = np.sort(chosen)
    splits = {split: _permuted(rows.of(split), chosen, config.seed) for split in SPLITS}
    made = FeatureRows(rows.dictionary, rows.tau[chosen], **splits)
    for split in SPLITS:
        before, after = rows.of(split).active.counts[chosen], made.of(split).active.counts
        if not np.array_equal(before, after):
            raise ReceiptError(f"C2 true null: permuting the {split} split changed how often features are active")
    return made


def _permuted(split: SplitRows, chosen: np.ndarray, seed: int) -> SplitRows:
    """The `chosen` features with active and weak rows moved together to distinct random rows that count."""
    eligible = np.flatnonzero(split.eligible)
    number = np.full(split.active.num_features, -1)
    number[chosen] = np.arange(len(chosen))
    strong, weak = (a.where(number[a.features] >= 0) for a in (split.active, split.weak))
    num_strong, num_weak = strong.counts, weak.counts
    new: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for feature in chosen:
        generator = np.random.default_rng([seed, int(feature), SPLITS.index(split.split)])
        sizes = num_strong[feature], num_weak[feature]
        drawn = generator.choice(eligible, sum(sizes), replace=False).astype(np.int32)
        new[0].append(np.sort(drawn[: sizes[0]]))
        new[1].append(np.sort(drawn[sizes[0] :]))
    active, faint = (
        ActiveRows(
            number[old.features].astype(np.int32),
            np.concatenate(rows) if rows else np.zeros(0, np.int32),
            old.values,
            len(chosen),
        )
        for old, rows in zip((strong, weak), new, strict=True)
    )
    return replace(split, active=active, weak=faint)
