"""Evaluate: what a dictionary costs, measured on test documents only. Definitions are in `sae/metrics.py`.

Every metric comes twice. By itself it is about kept rows: first positions of windows and massive-norm rows are not
counted, and pass unchanged where cross-entropy is read, as they do in training. Under its name with `_all_rows` they
count, and are replaced like every other row. A crosscoder's hook points are replaced all at once, and each by itself
under the metric's name with `@<hook point>`; what it reads is always the untouched model's.
"""

import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from saeql.sae.config import check_least
from saeql.sae.metrics import Bootstrap, DocumentGroups, Estimate, RowMetrics, TokenLosses, ratio, splice_estimates
from saeql.sae.model import SparseAutoencoder
from saeql.sae.trainer import Places, columns_of
from saeql.store.records import METRICS
from saeql.store.shards import ShardReader

from .atomic import write_whole
from .harvest import HarvestInfo, open_source, shard_folder
from .models import LanguageModel
from .progress import progress
from .sources import ShardSource, window_column
from .splice import Splicer

ABLATIONS = ("mean", "zero")
ALL_ROWS = "_all_rows"
BASELINES_FOLDER = "baselines"
#: Logits that are compared at once in float32, on a CPU and on a GPU.
COMPARED_LOGITS = (2**20, 2**26)
#: Name of a metric that is a bin of the density histogram: share of latents between two densities.
HISTOGRAM_BIN = "density[{low:.1e},{high:.1e})"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is measured."""

    ce_windows: int = 64
    """Test windows on which cross-entropy is read, spread evenly over the test documents; 0 takes all."""
    batch_windows: int = 8
    """Windows of one forward pass."""
    batch_tokens: int = 4096
    """Stored rows encoded at once; no metric depends on it."""
    num_bootstrap: int = 2000
    """Draws of documents behind every interval."""

    def __post_init__(self):
        check_least(self, "evaluate", ce_windows=0, batch_windows=1, batch_tokens=1, num_bootstrap=1)


#: Activations [B, T, d] to be put in place, by hook point.
New = dict[str, torch.Tensor]


class Evaluator:
    """Measures dictionaries on test documents; what does not depend on the dictionary is measured once and kept beside
    the stored activations.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        activations: Path,
        info: HarvestInfo,
        config: EvaluateConfig,
        *,
        seed: int = 0,
    ):
        language_model.require_whole("evaluation")
        self.lm, self.activations, self.info = language_model, activations, info
        self.config, self.seed = config, seed
        self._baselines: dict[str, dict[str, TokenLosses]] = {}

    def metrics(self, dictionary: SparseAutoencoder, places: Places) -> list[dict[str, Any]]:
        """Rows metric, value, n, low, high; the density histogram is one row a bin. Encoders predict no next token."""
        dictionary = dictionary.to(self.lm.device)
        rows = self._reconstruction(dictionary, places)
        draws = {"num_draws": self.config.num_bootstrap, "seed": self.seed}
        found = rows.estimates(**draws) | (self._spliced(dictionary, places) if self.lm.is_causal else {})
        for low, high, share in rows.density_histogram(**draws):
            found[HISTOGRAM_BIN.format(low=low, high=high)] = share
        return [{"metric": name, **asdict(estimate)} for name, estimate in found.items()]

    # --- stored rows ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reconstruction(self, dictionary: SparseAutoencoder, places: Places) -> RowMetrics:
        source = self._every_row("test", _names(places), self.config.batch_tokens)
        widths = source.widths
        reads, writes = columns_of(widths, places.reads), columns_of(widths, places.writes)
        meter = RowMetrics(dictionary.d_out, dictionary.d_sae, parts=_parts(widths, places))
        for batch in source.batches():
            acts = batch.acts.float()
            keep = (batch.positions > 0).to(acts.device) & self._within(acts, widths)
            x = acts[:, reads]
            latents = dictionary.encode(x)
            meter.update(acts[:, writes], dictionary.decode(latents, x), latents, batch.document_ids, keep)
        return meter

    def _every_row(self, split: str, names: tuple[str, ...], batch_tokens: int) -> ShardSource:
        """All stored rows, those that are left out elsewhere too."""
        source = open_source(
            self.activations, split, self.info, names, batch_tokens, self.lm.device, first_positions=True
        )
        source.norm_limits = dict.fromkeys(names, float("inf"))
        return source

    def _within(self, acts: torch.Tensor, widths: dict[str, int]) -> torch.Tensor:
        """Rows of acts [..., columns] that are massive at none of the hook points."""
        parts = acts.split(list(widths.values()), dim=-1)
        inside = [p.norm(dim=-1) <= self.info.norm_limit(name) for p, name in zip(parts, widths, strict=True)]
        return torch.stack(inside).all(0)

    # --- predictions with activations replaced -------------------------------------------------------------------

    def _spliced(self, dictionary: SparseAutoencoder, places: Places) -> dict[str, Estimate]:
        losses = self._losses(dictionary, places)
        model = losses["model"]
        bootstrap = Bootstrap(len(model.count), self.config.num_bootstrap, self.seed)
        found = {"ce_model": bootstrap.estimate(ratio(model.ce, model.count), int(model.count.sum()))}
        for suffix in ("", ALL_ROWS, *(f"@{name}" for name in places.writes if len(places.writes) > 1)):
            ablated = {name: losses[name + suffix] for name in ABLATIONS}
            estimates = splice_estimates(model, losses[f"spliced{suffix}"], ablated, bootstrap)
            found |= {f"{name}{suffix}": estimate for name, estimate in estimates.items()}
        return found

    def _losses(self, dictionary: SparseAutoencoder, places: Places) -> dict[str, TokenLosses]:
        """Losses of the model as it is ("model") and under every replacement, baselines only where not known yet."""
        key = self._baseline_key(places)
        if key not in self._baselines and (stored := self._load_baselines(key)):
            self._baselines[key] = stored
        if key in self._baselines:
            return self._baselines[key] | self._measure(dictionary, places, None)
        losses = self._measure(dictionary, places, self._training_means(places.writes))
        self._baselines[key] = {name: value for name, value in losses.items() if not name.startswith("spliced")}
        self._save_baselines(key)
        return losses

    @torch.no_grad()
    def _measure(
        self, dictionary: SparseAutoencoder, places: Places, means: dict[str, dict[str, torch.Tensor]] | None
    ) -> dict[str, TokenLosses]:
        windows, owners = self._windows(places.writes[0])
        groups = DocumentGroups()
        owners = groups.of(owners[:, 1:])
        sums: dict[str, np.ndarray] = {}  # [2, G]: cross-entropy and divergence
        with (
            Splicer(self.lm.model, _names(places), places.writes, self.lm.device) as splicer,
            progress("evaluate", windows.size, "tok") as advance,
        ):
            for start in range(0, len(windows), self.config.batch_windows):
                at = slice(start, start + self.config.batch_windows)
                ids = torch.from_numpy(windows[at]).long().to(self.lm.input_device)
                for name, losses in self._batch_losses(splicer, ids, dictionary, places, means):
                    total = sums.setdefault(name, np.zeros((2, len(groups))))
                    for row, values in zip(total, losses, strict=True):
                        row += np.bincount(owners[at].ravel(), values.ravel(), len(groups))
                advance(ids.numel())
        count = np.bincount(owners.ravel(), minlength=len(groups))
        return {name: TokenLosses(ce, kl, count) for name, (ce, kl) in sums.items()}

    def _batch_losses(
        self,
        splicer: Splicer,
        ids: torch.Tensor,
        dictionary: SparseAutoencoder,
        places: Places,
        means: dict[str, dict[str, torch.Tensor]] | None,
    ) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        """Cross-entropy and divergence [B, T - 1] of ids [B, T] as they are ("model") and under every replacement.

        Two batches of logits are in memory at once: no name holds those of a replacement while the next ones come.
        """
        base, acts = splicer.run(ids)
        for name, new in self._replacements(dictionary, places, acts, means):
            yield name, compare_logits(splicer.again(new) if new else base, base, ids)

    def _replacements(
        self,
        dictionary: SparseAutoencoder,
        places: Places,
        acts: dict[str, torch.Tensor],
        means: dict[str, dict[str, torch.Tensor]] | None,
    ) -> Iterator[tuple[str, New]]:
        """What is put in place of activations [B, T, d] read from the model as it is; nothing for "model"."""
        widths = {name: acts[name].shape[-1] for name in _names(places)}
        keep = self._within(torch.cat([acts[name].float() for name in widths], -1), widths)
        keep[:, 0] = False
        x = torch.cat([acts[name] for name in places.reads], -1).float()
        y_hat = dictionary(x.flatten(0, 1)).view(*x.shape[:2], -1)
        parts = y_hat.split([widths[name] for name in places.writes], -1)
        whole = {"spliced": {suffix: dict(zip(places.writes, parts, strict=True)) for suffix in ("", ALL_ROWS)}}
        if means is not None:
            yield "model", {}
            whole["mean"] = means
            whole["zero"] = {s: {n: m.new_zeros(len(m)) for n, m in means[s].items()} for s in ("", ALL_ROWS)}
        for kind, rows in whole.items():
            every = {n: v.to(acts[n].dtype).expand_as(acts[n]) for n, v in rows[ALL_ROWS].items()}
            kept = {n: torch.where(keep[..., None], v.to(acts[n].dtype), acts[n]) for n, v in rows[""].items()}
            yield kind, kept
            yield kind + ALL_ROWS, every
            if len(places.writes) > 1:
                yield from ((f"{kind}@{name}", {name: kept[name]}) for name in kept)

    def _training_means(self, names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
        """Mean [d] of the training rows at every hook point: of kept rows (""), and of all rows."""
        source = self._every_row("train", names, 8192)
        widths = source.widths
        sums = {suffix: torch.zeros(sum(widths.values()), dtype=torch.float64) for suffix in ("", ALL_ROWS)}
        counts = dict.fromkeys(sums, 0)
        for batch in source.batches():
            acts = batch.acts.float()
            keep = (batch.positions > 0).to(acts.device) & self._within(acts, widths)
            for suffix, rows in (("", acts[keep]), (ALL_ROWS, acts)):
                sums[suffix] += rows.sum(0, dtype=torch.float64).cpu()
                counts[suffix] += len(rows)
        means = {suffix: (total / max(counts[suffix], 1)).float().to(self.lm.device) for suffix, total in sums.items()}
        return {
            suffix: dict(zip(widths, mean.split(list(widths.values())), strict=True)) for suffix, mean in means.items()
        }

    def _windows(self, hook_point: str) -> tuple[np.ndarray, np.ndarray]:
        """Test windows [W, T] spread evenly over the documents, and the document of every token."""
        reader = ShardReader(shard_folder(self.activations, hook_point, "test"))
        every = window_column(reader, "token_ids")
        num = min(self.config.ce_windows or len(every), len(every))
        chosen = np.unique(np.linspace(0, len(every) - 1, num).round().astype(int))
        return every[chosen], window_column(reader, "document_ids")[chosen]

    # --- what every dictionary of the same place shares ----------------------------------------------------------

    def _baseline_key(self, places: Places) -> str:
        """Name of the baselines of a place: all that their numbers depend on."""
        of = {
            "version": 1,
            "harvest": asdict(self.info),
            "rows_judged_at": sorted(_names(places)),
            "writes": places.writes,
            "ce_windows": self.config.ce_windows,
            "dtype": str(self.lm.model.dtype),
            "device": self.lm.device.type,
            "torch": torch.__version__,
        }
        return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]

    def _load_baselines(self, key: str) -> dict[str, TokenLosses] | None:
        file = self.activations / BASELINES_FOLDER / f"{key}.json"
        if not file.exists():
            return None
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {name: TokenLosses(*(np.array(column) for column in columns)) for name, columns in stored.items()}

    def _save_baselines(self, key: str) -> None:
        columns = {name: [c.tolist() for c in (v.ce, v.kl, v.count)] for name, v in self._baselines[key].items()}
        try:
            (self.activations / BASELINES_FOLDER).mkdir(exist_ok=True)
            write_whole(self.activations / BASELINES_FOLDER / f"{key}.json", json.dumps(columns) + "\n")
        except OSError as error:  # a run of somebody else's: the next evaluation measures them again
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise


def _names(places: Places) -> tuple[str, ...]:
    """Hook points that are read or written, none twice."""
    return tuple(dict.fromkeys((*places.reads, *places.writes)))


def _parts(widths: dict[str, int], places: Places) -> dict[str, slice]:
    """Columns of y at each hook point that is written, where there are several."""
    if len(places.writes) == 1:
        return {}
    ends = np.cumsum([widths[name] for name in places.writes]).tolist()
    return {name: slice(end - widths[name], end) for name, end in zip(places.writes, ends, strict=True)}


def compare_logits(logits: torch.Tensor, base: torch.Tensor, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Next-token cross-entropy of logits [B, T, V] and their KL divergence from `base`, nats, [B, T - 1] each.

    `COMPARED_LOGITS` in float32 at a time: blocks as large as a window's would stay with the C library's allocator.
    """
    size, vocabulary = (len(ids), ids.shape[1] - 1), logits.shape[-1]
    losses, divergences = (torch.empty(size, device=logits.device) for _ in range(2))
    block = max(1, COMPARED_LOGITS[logits.is_cuda] // vocabulary)
    for row in range(len(ids)):
        for start in range(0, size[1], block):
            at = slice(start, min(start + block, size[1]))
            log_p = logits[row, at].float().log_softmax(-1)
            losses[row, at] = -log_p.gather(1, ids[row, 1:][at, None])[:, 0]
            reference = base[row, at].float().log_softmax(-1)
            divergences[row, at] = (reference.exp() * (reference - log_p)).sum(-1)
    return losses.cpu().numpy(), divergences.cpu().numpy()


def metrics_table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of one dictionary as the evidence table metrics."""
    return pa.Table.from_pylist([{"dictionary": name, "split": "test", **row} for row in rows], schema=METRICS)
