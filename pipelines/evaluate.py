"""Evaluate: what the dictionary costs, measured on test documents only. Definitions are in `sae/metrics.py`.

Cross-entropy is read with the hook point's kept rows replaced, by the reconstruction, by the training mean, or by zero;
first positions and massive-norm rows pass unchanged in all three, as they do in training.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from saeql.sae.hooks import Capture, capture, edit
from saeql.sae.metrics import VarianceUnexplained, bootstrap_ratio, ce_recovered, dead_share
from saeql.sae.model import SparseAutoencoder
from saeql.sae.trainer import Places, columns_of
from saeql.store.records import METRICS
from saeql.store.shards import ShardReader

from .harvest import HarvestInfo, open_source, shard_folder
from .models import LanguageModel
from .progress import progress
from .sources import window_column


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is measured."""

    ce_windows: int = 64
    """Test windows on which cross-entropy is read, spread evenly over the test documents; 0 takes all."""
    batch_windows: int = 8
    """Windows of one forward pass."""
    num_bootstrap: int = 2000
    """Draws of documents behind every interval."""


#: New rows [n, d_out] from the kept rows [n, d_in] that are read and those that are replaced.
Replacement = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Evaluator:
    """Measures dictionaries on test documents; what does not depend on the dictionary is measured once."""

    def __init__(
        self,
        language_model: LanguageModel,
        activations: Path,
        info: HarvestInfo,
        config: EvaluateConfig,
        *,
        seed: int = 0,
    ):
        self.lm, self.activations, self.info = language_model, activations, info
        self.config, self.seed = config, seed
        self._baselines: dict[str, dict[str, CrossEntropy]] = {}

    def metrics(self, dictionary: SparseAutoencoder, places: Places) -> list[dict[str, Any]]:
        """Rows metric, value, n, low, high. Cross-entropy is left out for crosscoders, which write several places."""
        dictionary = dictionary.to(self.lm.device)
        rows = self._reconstruction(dictionary, places)
        if len(places.writes) == 1:
            rows += self._cross_entropy(dictionary, places.reads[0], places.writes[0])
        return rows

    @torch.no_grad()
    def _reconstruction(self, dictionary: SparseAutoencoder, places: Places) -> list[dict]:
        """fvu of what is written, with and without the rows that are left out; l0; dead share."""
        device, info = self.lm.device, self.info
        names = tuple(dict.fromkeys((*places.reads, *places.writes)))
        source = open_source(self.activations, "test", info, names, 4096, device, first_positions=True)
        source.norm_limits = dict.fromkeys(names, float("inf"))
        reads, writes = columns_of(source.widths, places.reads), columns_of(source.widths, places.writes)
        meters = _Meters(dictionary)
        for batch in source.batches():
            acts = batch.acts.float()
            keep = (batch.positions > 0).to(device) & self._within(acts, source.widths)
            meters.update(acts[:, reads], acts[:, writes], keep, batch.document_ids.to(device))
        return meters.rows(self.config.num_bootstrap, self.seed)

    def _within(self, acts: torch.Tensor, widths: dict[str, int]) -> torch.Tensor:
        """Rows [N] that are massive at none of the hook points."""
        parts = acts.split(list(widths.values()), dim=1)
        inside = [p.norm(dim=1) <= self.info.norm_limit(name) for p, name in zip(parts, widths, strict=True)]
        return torch.stack(inside).all(0)

    def _cross_entropy(self, dictionary: SparseAutoencoder, read: str, write: str) -> list[dict]:
        if write not in self._baselines:
            mean = training_mean(self.activations, self.info, write).to(self.lm.device)
            ablations: dict[str, Replacement] = {
                "mean": lambda _, y: mean.expand_as(y),
                "zero": lambda _, y: torch.zeros_like(y),
            }
            self._baselines[write] = self._measure(write, write, ablations)
        ce = {**self._baselines[write], **self._measure(read, write, {"spliced": lambda x, _: dictionary(x.float())})}
        base, spliced, draws = ce["model"], ce["spliced"], self.config.num_bootstrap
        n = int(base.count.sum())

        def interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
            return bootstrap_ratio(above, below, num_draws=draws, seed=self.seed)

        rows = [_row(f"ce_{name}", ce[name].mean, n) for name in ("model", "spliced", "mean", "zero")]
        increase = interval(spliced.total - base.total, base.count)
        rows.append(_row("ce_increase", spliced.mean - base.mean, n, increase))
        rows.append(_row("kl", float(spliced.kl.sum() / n), n, interval(spliced.kl, base.count)))
        for name, suffix in (("mean", ""), ("zero", "_zero")):
            ablated = ce[name]
            kept, lost = ablated.total - spliced.total, ablated.total - base.total
            recovered = ce_recovered(base.mean, spliced.mean, ablated.mean)
            rows.append(_row(f"ce_recovered{suffix}", recovered, n, interval(kept, lost)))
            kl_kept = interval(ablated.kl - spliced.kl, ablated.kl)
            rows.append(_row(f"kl_recovered{suffix}", float(1 - spliced.kl.sum() / ablated.kl.sum()), n, kl_kept))
        return rows

    @torch.no_grad()
    def _measure(self, read: str, write: str, replacements: dict[str, Replacement]) -> dict[str, "CrossEntropy"]:
        """Cross-entropy of the model as it is ("model") and under each replacement of its kept rows."""
        windows, owners = self._windows(write)
        losses = {name: np.zeros((len(windows), windows.shape[1] - 1)) for name in ("model", *replacements)}
        divergences = {name: np.zeros_like(loss) for name, loss in losses.items()}
        current: list[Replacement] = []
        with ExitStack() as stack:
            reader = stack.enter_context(capture(self.lm.model, [read]))
            splice = self._splice(read, write, reader, current)
            stack.enter_context(edit(self.lm.model, write, splice))
            advance = stack.enter_context(progress("evaluate", len(losses) * windows.size, "tok"))
            for start in range(0, len(windows), self.config.batch_windows):
                at = slice(start, start + self.config.batch_windows)
                ids = torch.from_numpy(windows[at]).long().to(self.lm.device)
                base = None
                for name in losses:
                    current[:] = [replacements[name]] if name in replacements else []
                    logits = self.lm.model(input_ids=ids, use_cache=False).logits[:, :-1]
                    base = logits if base is None else base
                    losses[name][at], divergences[name][at] = _compare(logits, base, ids)
                    advance(ids.numel())
        documents, inverse = np.unique(owners[:, 1:], return_inverse=True)
        count = np.bincount(inverse.ravel(), minlength=len(documents))
        sums = {
            name: [
                np.bincount(inverse.ravel(), values.ravel(), len(documents))
                for values in (losses[name], divergences[name])
            ]
            for name in losses
        }
        return {name: CrossEntropy(total, kl, count) for name, (total, kl) in sums.items()}

    def _windows(self, hook_point: str) -> tuple[np.ndarray, np.ndarray]:
        """Test windows [W, T] spread evenly over the documents, and the document of every token."""
        reader = ShardReader(shard_folder(self.activations, hook_point, "test"))
        every = window_column(reader, "token_ids")
        num = min(self.config.ce_windows or len(every), len(every))
        chosen = np.unique(np.linspace(0, len(every) - 1, num).round().astype(int))
        return every[chosen], window_column(reader, "document_ids")[chosen]

    def _splice(self, read: str, write: str, reader: Capture, current: list[Replacement]):
        """The edit that puts `current[0]` of what was read in place of the kept rows; none leaves everything."""

        def splice(acts: torch.Tensor) -> torch.Tensor:
            if not current:
                return acts
            x = acts if read == write else reader.acts[read]
            keep = acts.float().norm(dim=-1) <= self.info.norm_limit(write)
            keep &= x.float().norm(dim=-1) <= self.info.norm_limit(read)
            keep[:, 0] = False
            new = acts.clone()
            new[keep] = current[0](x[keep], acts[keep]).to(acts.dtype)
            return new

        return splice


def _compare(logits: torch.Tensor, base: torch.Tensor, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Next-token cross-entropy of logits [B, T - 1, V] and their KL divergence from `base`, nats, [B, T - 1] each.

    One window's float32 logits at a time.
    """
    losses, divergences = [], []
    for row in range(len(ids)):
        log_p = logits[row].float().log_softmax(-1)
        losses.append(-log_p.gather(1, ids[row, 1:, None])[:, 0])
        if base is logits:
            divergences.append(torch.zeros_like(losses[-1]))
        else:
            reference = base[row].float().log_softmax(-1)
            divergences.append((reference.exp() * (reference - log_p)).sum(-1))
    return torch.stack(losses).cpu().numpy(), torch.stack(divergences).cpu().numpy()


@dataclass(frozen=True)
class CrossEntropy:
    """Summed cross-entropy and KL divergence from the model as it is (nats), and predicted tokens, by document [D]."""

    total: np.ndarray
    kl: np.ndarray
    count: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.total.sum() / self.count.sum())


class _Meters:
    """Streaming sums behind the reconstruction metrics."""

    def __init__(self, dictionary: SparseAutoencoder):
        self.dictionary, d_out = dictionary, dictionary.d_out
        self.kept, self.everything = VarianceUnexplained(d_out), VarianceUnexplained(d_out)
        self.fired = torch.zeros(dictionary.d_sae, dtype=torch.int64)
        self.num_active = 0
        self.errors: dict[int, tuple[float, int]] = {}  # squared error and rows by document

    def update(self, x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor, documents: torch.Tensor) -> None:
        """Rows x [N, d_in] with what is to be written, y [N, d_out]; `keep` [N] marks those that count."""
        latents = self.dictionary.encode(x)
        y_hat = self.dictionary.decode(latents, x)
        self.everything.update(y, y_hat)
        self.kept.update(y[keep], y_hat[keep])
        values = latents.values[keep]
        self.num_active += int((values > 0).sum())
        fired = latents.indices[keep][values > 0].long().cpu()
        self.fired += torch.bincount(fired, minlength=self.dictionary.d_sae)
        error = (y[keep] - y_hat[keep]).double().square().sum(1)
        for document in documents[keep].unique().tolist():
            mine = documents[keep] == document
            total, count = self.errors.get(document, (0.0, 0))
            self.errors[document] = (total + float(error[mine].sum()), count + int(mine.sum()))

    def rows(self, num_bootstrap: int, seed: int) -> list[dict]:
        """The metrics. Documents are drawn with the variance about the common mean shared out by their rows."""
        count = max(self.kept.count, 1)
        error, rows = (np.array(column) for column in zip(*self.errors.values(), strict=True))
        interval = bootstrap_ratio(error, rows / count * self.kept.total, num_draws=num_bootstrap, seed=seed)
        return [
            _row("fvu", self.kept.value(), self.kept.count, interval),
            _row("fvu_all_rows", self.everything.value(), self.everything.count),
            _row("l0", self.num_active / count, self.kept.count),
            _row("dead_share", dead_share(self.fired), self.dictionary.d_sae),
        ]


def training_mean(activations: Path, info: HarvestInfo, hook_point: str) -> torch.Tensor:
    """Mean [d] of the kept training rows at a hook point."""
    total, count = torch.zeros(info.widths[hook_point], dtype=torch.float64), 0
    for batch in open_source(activations, "train", info, (hook_point,), 8192).batches():
        total += batch.acts.float().sum(0).double()
        count += len(batch.acts)
    return (total / count).float()


def _row(metric: str, value: float, n: int, interval: tuple[float, float] | None = None) -> dict[str, Any]:
    low, high = interval if interval else (None, None)
    return {"metric": metric, "value": value, "n": n, "low": low, "high": high}


def metrics_table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of one dictionary as the evidence table metrics."""
    return pa.Table.from_pylist([{"dictionary": name, "split": "test", **row} for row in rows], schema=METRICS)
