"""What pruning costs: next-token loss, what is left of the chosen features, and a probe that was fitted before.

All on test documents, against the same model unpruned:

- `ce`: next-token cross-entropy in nats; `ce_increase` beside the unpruned model's, documents drawn together;
- `feature_fvu`: the chosen features' squared change on rows of windows where they are active, over their variance
  there; 0 keeps them as they were;
- `kept`: of the rows on which a chosen feature was active, the share on which it still is;
- `probe_auroc`: of a logistic probe at the hook point, fitted on the unpruned model's train rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saeql.sae.hooks import capture
from saeql.sae.metrics import Bootstrap, DocumentGroups, Estimate, ratio
from saeql.sae.model import SparseAutoencoder

from ..models import LanguageModel
from ..probing.activations import ModelRows
from ..probing.plans import ProbeSettings
from ..probing.probes import Fitted, LogisticRegression, choose
from ..probing.representations import ACTS, dense_rows, pooled
from ..probing.scores import TestDocuments, interval
from ..probing.sources import Asked, prepare
from ..probing.tasks import Cases, Task, TaskError
from ..probing.text import ProbedText
from .importance import active_values

if TYPE_CHECKING:
    from ..run import Run

_BATCH_WINDOWS = 8
#: Test windows that a probe of tokens is asked about: those with most of its cases.
_PROBE_WINDOWS = 48


@dataclass(frozen=True)
class TaskProbe:
    """A probe fitted on the unpruned model, and the test cases that it is asked about."""

    name: str
    hook_points: tuple[str, ...]
    fitted: Fitted
    text: ProbedText
    task: Task
    cases: Cases

    def scores(self, lm: LanguageModel) -> np.ndarray:
        """[n] log odds of the test cases with the model as it is now."""
        rows = self.cases.cases
        if self.task.level == "document":
            rows = np.sort(self.text.splits["test"].rows_of(rows)[0])
        source = ModelRows(lm, self.hook_points, self.text, {"test": rows})
        return self.fitted.log_odds(pooled(self.text, self.task, "test", self.cases, dense_rows(source)))


def fit_probe(run: "Run", task: str, level: str = "document") -> TaskProbe:
    """A logistic probe of a task at the hook point. Raises TaskError where the run has too few cases of it."""
    prepared = prepare(run, Asked(task=task, level=level), ProbeSettings(num_controls=0, num_twins=0))
    if len(prepared.plans) > 1:
        raise TaskError(f"task {task!r} is {len(prepared.plans)} tasks: name one")
    plan = prepared.plans[0]
    x = {s: prepared.shown.of(ACTS, plan.task, s, plan.drawn.of(s)) for s in ("train", "calibration")}
    y = {s: plan.drawn.of(s).y for s in x}
    fitted = choose(LogisticRegression(), x["train"], y["train"], x["calibration"], y["calibration"])[1]
    text, cases = prepared.shown.text, plan.drawn.test
    if plan.task.level == "token":
        cases = _in_few_windows(cases, text.splits["test"].token_ids.shape[1])
    return TaskProbe(plan.task.name, run.spec.reads, fitted, text, plan.task, cases)


def _in_few_windows(cases: Cases, width: int) -> Cases:
    """The cases in the windows that have most positive ones, then most."""
    windows, inverse, counts = np.unique(cases.cases // width, return_inverse=True, return_counts=True)
    positive = np.bincount(inverse, cases.y, len(windows))
    kept = np.isin(inverse, np.lexsort((-counts, -positive))[:_PROBE_WINDOWS])
    return Cases(cases.cases[kept], cases.y[kept], cases.documents[kept], cases.units[kept])


@dataclass(frozen=True)
class State:
    """What was measured with one set of units taken out."""

    losses: np.ndarray  # [G] summed over tokens, by group of documents
    values: np.ndarray  # [rows, F] activations of the chosen features
    scores: np.ndarray | None  # [n] of the probe


class Bench:
    """Measures a model again and again, on the same text."""

    def __init__(
        self,
        run: "Run",
        dictionary: SparseAutoencoder,
        features: Sequence[int],
        *,
        loss_windows: tuple[np.ndarray, np.ndarray],
        feature_windows: tuple[np.ndarray, np.ndarray],
        probe: TaskProbe | None,
    ):
        """Windows come with the document of every token, both [W, T]."""
        self.run, self.dictionary, self.features, self.probe = run, dictionary, list(features), probe
        self.lm: LanguageModel = run.language_model
        self.loss_windows, self.feature_windows = loss_windows[0], feature_windows[0]
        groups = DocumentGroups()
        self.owners = groups.of(loss_windows[1][:, 1:])
        self.loss_bootstrap = Bootstrap(len(groups))
        self.count = np.bincount(self.owners.ravel(), minlength=len(groups)).astype(np.float64)
        feature_groups = DocumentGroups()
        self.feature_owners = feature_groups.of(feature_windows[1][:, 1:]).ravel()
        self.feature_bootstrap = Bootstrap(len(feature_groups))
        self.before = self.state()

    @torch.no_grad()
    def state(self) -> State:
        """The model as it is now."""
        losses = np.zeros(len(self.count))
        for start in range(0, len(self.loss_windows), _BATCH_WINDOWS):
            at = slice(start, start + _BATCH_WINDOWS)
            ids = torch.from_numpy(self.loss_windows[at]).long().to(self.lm.input_device)
            logits = self.lm.model(input_ids=ids, use_cache=False).logits
            nats = torch.stack([
                torch.nn.functional.cross_entropy(own[:-1].float(), of[1:].to(own.device), reduction="none")
                for own, of in zip(logits, ids, strict=True)
            ])  # fmt: skip
            losses += np.bincount(self.owners[at].ravel(), nats.double().cpu().numpy().ravel(), len(losses))
        return State(losses, self._values(), self.probe.scores(self.lm) if self.probe else None)

    def _values(self) -> np.ndarray:
        reads, parts = list(self.run.spec.reads), []
        with capture(self.lm.model, reads, self.lm.device) as reader:
            for start in range(0, len(self.feature_windows), _BATCH_WINDOWS):
                ids = torch.from_numpy(self.feature_windows[start : start + _BATCH_WINDOWS]).long()
                acts = reader.run(ids.to(self.lm.input_device))
                x = torch.cat([acts[name].float() for name in reads], dim=-1)[:, 1:]  # the first position is no row
                parts.append(active_values(self.dictionary, x, self.features).flatten(0, 1).cpu().numpy())
        return np.concatenate(parts).astype(np.float64)

    def compared(self, after: State) -> dict[str, Any]:
        """Every number of the module's text, with 95 % intervals over documents."""
        n = int(self.count.sum())
        found: dict[str, Any] = {
            "ce": _plain(self.loss_bootstrap.estimate(ratio(after.losses, self.count), n)),
            "ce_increase": _plain(
                self.loss_bootstrap.estimate(ratio(after.losses - self.before.losses, self.count), n)
            ),
        }
        before, now = self.before.values, after.values
        active = before > 0
        found["feature_fvu"] = self._of_features(
            np.square(now - before).sum(1), np.square(before - before.mean(0)).sum(1), len(before)
        )
        found["kept"] = self._of_features((active & (now > 0)).sum(1), active.sum(1), int(active.sum()))
        if self.probe is not None and after.scores is not None:
            cases = self.probe.cases
            drawn = TestDocuments(cases.documents)
            auroc = interval(drawn.auroc(after.scores, cases.y, cases.documents))
            found["probe_auroc"] = {"value": auroc.value, "n": len(cases), "low": auroc.low, "high": auroc.high}
        return found

    def _of_features(self, numerator: np.ndarray, denominator: np.ndarray, n: int) -> dict[str, Any]:
        groups = self.feature_bootstrap.num_groups
        sums = [np.bincount(self.feature_owners, values, groups) for values in (numerator, denominator)]
        return _plain(self.feature_bootstrap.estimate(ratio(sums[0], sums[1]), n))


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "n": estimate.n, "low": estimate.low, "high": estimate.high}
