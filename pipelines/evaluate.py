"""Evaluate: what the dictionary costs, measured on test documents only. Definitions are in `sae/metrics.py`.

Cross-entropy is read with the hook point's kept rows replaced, by the reconstruction, by the training mean, or by zero;
first positions and massive-norm rows pass unchanged in all three, as they do in training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from saeql.sae.hooks import edit
from saeql.sae.metrics import VarianceUnexplained, bootstrap_ratio, ce_recovered, dead_share
from saeql.sae.model import SparseAutoencoder
from saeql.store.evidence import Evidence
from saeql.store.shards import ShardReader

from .harvest import HarvestInfo
from .models import LanguageModel
from .progress import progress
from .sources import ShardSource, window_column


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is measured."""

    ce_windows: int = 64
    """Test windows on which cross-entropy is read, spread evenly over the test documents; 0 takes all."""
    batch_windows: int = 8
    """Windows of one forward pass."""
    num_bootstrap: int = 2000
    """Draws of documents behind every interval."""


#: Replacement of kept rows [n, d] at the hook point; None leaves the model as it is.
Replacement = Callable[[torch.Tensor], torch.Tensor] | None


def evaluate_dictionary(
    dictionary: SparseAutoencoder,
    name: str,
    language_model: LanguageModel,
    activations: Path,
    info: HarvestInfo,
    evidence: Evidence,
    config: EvaluateConfig,
    *,
    seed: int = 0,
) -> pa.Table:
    """Measure the dictionary on the test split; writes and returns the evidence table metrics."""
    dictionary = dictionary.to(language_model.device)
    rows = _reconstruction_metrics(dictionary, activations / "test", info, config, seed)
    mean = training_mean(activations / "train", info).to(language_model.device)
    rows += _ce_metrics(dictionary, language_model, activations / "test", info, mean, config, seed)
    table = pa.Table.from_pylist([{"dictionary": name, "split": "test", **row} for row in rows])
    evidence.write("metrics", table)
    return evidence.read("metrics")


def training_mean(folder: Path, info: HarvestInfo) -> torch.Tensor:
    """Mean [d_in] of the kept training rows."""
    total, count = torch.zeros(info.d_in, dtype=torch.float64), 0
    for batch in ShardSource(folder, batch_tokens=8192, norm_limit=info.norm_limit).batches():
        total += batch.acts.float().sum(0).double()
        count += len(batch.acts)
    return (total / count).float()


def _row(metric: str, value: float, n: int, interval: tuple[float, float] | None = None) -> dict:
    low, high = interval if interval else (None, None)
    return {"metric": metric, "value": value, "n": n, "low": low, "high": high}


@torch.no_grad()
def _reconstruction_metrics(
    dictionary: SparseAutoencoder, folder: Path, info: HarvestInfo, config: EvaluateConfig, seed: int
) -> list[dict]:
    """fvu with and without the rows that are left out, l0, dead share."""
    device = dictionary.W_enc.device
    kept, everything = VarianceUnexplained(info.d_in), VarianceUnexplained(info.d_in)
    fired = torch.zeros(dictionary.d_sae, dtype=torch.int64)
    num_active = 0
    by_document: dict[int, list[VarianceUnexplained]] = {}
    source = ShardSource(folder, batch_tokens=4096, norm_limit=float("inf"), first_positions=True, device=device)
    for batch in source.batches():
        x = batch.acts.float()
        latents = dictionary.encode(x)
        x_hat = dictionary.decode(latents)
        everything.update(x, x_hat)
        keep = (batch.positions > 0).to(device) & (x.norm(dim=1) <= info.norm_limit)
        kept.update(x[keep], x_hat[keep])
        values = latents.values[keep]
        num_active += int((values > 0).sum())
        fired += torch.bincount(latents.indices[keep][values > 0].long().cpu(), minlength=dictionary.d_sae)
        owners = batch.document_ids[keep.cpu()]
        for document in owners.unique().tolist():
            chosen = (owners == document).to(device)
            meter = VarianceUnexplained(info.d_in)
            meter.update(x[keep][chosen], x_hat[keep][chosen])
            by_document.setdefault(document, []).append(meter)
    # variance about the common mean, so that the interval belongs to the same ratio as the value
    residual = np.array([sum(m.residual for m in meters) for meters in by_document.values()])
    share = np.array([sum(m.count for m in meters) for meters in by_document.values()]) / max(kept.count, 1)
    interval = bootstrap_ratio(residual, share * kept.total, num_draws=config.num_bootstrap, seed=seed)
    return [
        _row("fvu", kept.value(), kept.count, interval),
        _row("fvu_all_rows", everything.value(), everything.count),
        _row("l0", num_active / max(kept.count, 1), kept.count),
        _row("dead_share", dead_share(fired), dictionary.d_sae),
    ]


@dataclass(frozen=True)
class _CrossEntropy:
    """Summed cross-entropy and number of predicted tokens by document [D]."""

    total: np.ndarray
    count: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.total.sum() / self.count.sum())


def _ce_metrics(
    dictionary: SparseAutoencoder,
    lm: LanguageModel,
    folder: Path,
    info: HarvestInfo,
    mean: torch.Tensor,
    config: EvaluateConfig,
    seed: int,
) -> list[dict]:
    reader = ShardReader(folder)
    every = window_column(reader, "token_ids")  # [W, T]
    num = min(config.ce_windows or len(every), len(every))
    chosen = np.unique(np.linspace(0, len(every) - 1, num).round().astype(int))
    windows, owners = every[chosen], window_column(reader, "document_ids")[chosen]
    replacements: dict[str, Replacement] = {
        "model": None,
        "spliced": lambda rows: dictionary(rows.float()).to(rows.dtype),
        "mean": lambda rows: mean.to(rows.dtype).expand_as(rows),
        "zero": lambda rows: torch.zeros_like(rows),
    }
    ce: dict[str, _CrossEntropy] = {}
    with progress("evaluate", len(replacements) * windows.size, "tok") as advance:
        for name, replacement in replacements.items():
            ce[name] = _cross_entropy(lm, windows, owners, replacement, info, config.batch_windows, advance)
    n = int(ce["model"].count.sum())
    base, spliced = ce["model"], ce["spliced"]
    rows = [_row(f"ce_{name}", value.mean, n) for name, value in ce.items()]
    increase = bootstrap_ratio(spliced.total - base.total, base.count, num_draws=config.num_bootstrap, seed=seed)
    rows.append(_row("ce_increase", spliced.mean - base.mean, n, increase))
    for name, metric in (("mean", "ce_recovered"), ("zero", "ce_recovered_zero")):
        kept, lost = ce[name].total - spliced.total, ce[name].total - base.total
        interval = bootstrap_ratio(kept, lost, num_draws=config.num_bootstrap, seed=seed)
        rows.append(_row(metric, ce_recovered(base.mean, spliced.mean, ce[name].mean), n, interval))
    return rows


@torch.no_grad()
def _cross_entropy(
    lm: LanguageModel,
    windows: np.ndarray,
    owners: np.ndarray,
    replacement: Replacement,
    info: HarvestInfo,
    batch_windows: int,
    advance: Callable[[int], None],
) -> _CrossEntropy:
    """Next-token cross-entropy (nats) of windows [W, T], summed by document, with kept rows replaced."""

    def splice(acts: torch.Tensor) -> torch.Tensor:
        if replacement is None:
            return acts
        keep = acts.float().norm(dim=-1) <= info.norm_limit
        keep[:, 0] = False
        new = acts.clone()
        new[keep] = replacement(acts[keep])
        return new

    losses = np.empty((len(windows), windows.shape[1] - 1))
    with edit(lm.model, info.identity.hook_point, splice):
        for start in range(0, len(windows), batch_windows):
            ids = torch.from_numpy(windows[start : start + batch_windows]).long().to(lm.device)
            logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1]
            for row in range(len(ids)):  # one window's float32 logits at a time
                loss = torch.nn.functional.cross_entropy(logits[row].float(), ids[row, 1:], reduction="none")
                losses[start + row] = loss.cpu().numpy()
            advance(ids.numel())
    documents, inverse = np.unique(owners[:, 1:], return_inverse=True)
    total = np.bincount(inverse.ravel(), losses.ravel(), len(documents))
    return _CrossEntropy(total, np.bincount(inverse.ravel(), minlength=len(documents)))
