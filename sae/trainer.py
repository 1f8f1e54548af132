"""Training: several dictionaries learn from ONE stream of activations.

The stream's columns are the hook points side by side; every dictionary reads and writes columns of its own choice, so
that autoencoders, transcoders and crosscoders of any architecture and width share one harvest. Columns are centred and
scaled to unit variance on their way in; `finish` folds both into the weights, so that what is saved works on raw
activations.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, CheckpointError, load_tensors, read_state, save_checkpoint
from .comm import ALONE, Comm, CommError
from .config import TrainConfig, to_dict
from .learner import Learner
from .model import SparseAutoencoder, geometric_median
from .sharding import gather_dictionary
from .start_rows import start_rows
from .stream import ActivationBatch, ActivationSource, Cursor

#: Called with one line of metrics.
LogLine = Callable[[dict[str, Any]], None]

_EVERYTHING = slice(None)
#: Keys of [train] that a resume may change: they do not move a weight.
_FREE_KEYS = ("feature_shards", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "rank_timeout_seconds")


class TrainingError(RuntimeError):
    """Training cannot go on: its data or its loss is not finite."""


@dataclass(frozen=True)
class InputScaling:
    """How raw columns become training rows: `(x - mean) * scale`, one scale for all columns of a hook point."""

    mean: torch.Tensor  # [columns]
    scale: torch.Tensor  # [columns]

    @classmethod
    def measure(cls, rows: torch.Tensor, widths: Mapping[str, int]) -> "InputScaling":
        """Mean of rows [N, columns], and the scales that give each hook point unit variance per coordinate on average.

        Raises TrainingError where a hook point does not vary or is not finite.
        """
        rows = rows.float()
        mean, scale, start = rows.mean(0), torch.ones(rows.shape[1], device=rows.device), 0
        for name, width in widths.items():
            columns = slice(start, start + width)
            variance = float((rows[:, columns] - mean[columns]).square().mean())
            if not math.isfinite(variance) or variance == 0:
                raise TrainingError(
                    f"the first {len(rows)} rows of {name} have variance {variance}: nothing to learn from, "
                    "or values that are not finite"
                )
            scale[columns] = 1 / math.sqrt(variance)
            start += width
        return cls(mean, scale)

    def apply(self, acts: torch.Tensor) -> torch.Tensor:
        """Training rows of raw activations [N, columns], float32."""
        return (acts.float() - self.mean).mul_(self.scale)


@dataclass(frozen=True)
class Places:
    """Hook points that a dictionary reads and writes; several that lie side by side make a crosscoder."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


class Trainer:
    """Trains `dictionaries` (by name) on `source`; checkpoints under `folder` where one is given.

    `places` says which hook points each dictionary reads and writes; without it each takes every column. `pretrained`
    names dictionaries that work on raw activations already and are trained further. `start_seeds` are for those whose
    rows start from the activations (`dictionary.start`). `belongs_to` names what the
    training depends on besides its configuration, such as the model's revision: a resume compares it. `should_stop` is
    asked before every step; where one rank says so, all stop at the same step, with a checkpoint.

    With several ranks, `source` gives each data rank its own rows: `batch_tokens` divided by their number in a batch;
    and `dictionaries` have this rank's latents, as `build` and `load_dictionary` make them for a `comm`.
    """

    def __init__(
        self,
        config: TrainConfig,
        dictionaries: Mapping[str, SparseAutoencoder],
        source: ActivationSource,
        *,
        places: Mapping[str, Places] | None = None,
        pretrained: Collection[str] = (),
        start_seeds: Mapping[str, int] | None = None,
        folder: Path | None = None,
        on_log: LogLine | None = None,
        on_step: Callable[[int], None] | None = None,
        matmul_dtype: torch.dtype | None = None,
        comm: Comm = ALONE,
        reshard: bool = False,
        device: torch.device | None = None,
        belongs_to: Mapping[str, Any] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.config, self.source, self.folder, self.comm, self.reshard = config, source, folder, comm, reshard
        self.belongs_to, self.should_stop = dict(belongs_to or {}), should_stop
        self.stopped = False  # `should_stop` ended the last fit
        self.saved_step: int | None = None
        self.best: dict[str, dict[str, float]] = {}  # lowest fvu between two log lines, and its step
        self.resharded: list[str] = []  # resumes on another number of ranks: from there on a run is no longer bit-exact
        self.on_log, self.on_step, self.matmul_dtype = on_log, on_step, matmul_dtype
        self.pretrained, self.start_seeds = frozenset(pretrained), dict(start_seeds or {})
        self.step = 0
        self.cursor = Cursor()
        self.scaling: InputScaling | None = None
        self.learners = []
        if comm.size > 1 and config.resample_every_steps:
            raise CommError("train.resample_every_steps works in one process only; leave it at 0 with several ranks")
        if config.batch_tokens % comm.data_size:
            raise CommError(
                f"train.batch_tokens {config.batch_tokens} is not a multiple of the {comm.data_size} data ranks"
            )
        for name, dictionary in dictionaries.items():
            if comm.feature_size > 1 and not dictionary.selects:
                raise CommError(
                    f"{name}: train.feature_shards above 1 needs topk or batchtopk, not {dictionary.architecture}"
                )
            if dictionary.comm.feature_size != comm.feature_size:
                raise CommError(f"{name} was not made for {comm.feature_size} feature shards: pass comm to `build`")
            part = dictionary.to(device or dictionary.W_enc.device)
            part.comm = comm
            at = (places or {}).get(name)
            reads, writes = (
                (columns_of(source.widths, at.reads), columns_of(source.widths, at.writes))
                if at
                else (_EVERYTHING, _EVERYTHING)
            )
            self.learners.append(Learner(name, part, config, reads, writes))

    # --- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to `num_steps` from wherever this trainer stands, or to where `should_stop` says so on any rank.

        Raises TrainingError where too much is not finite, or the rows of a rank end before.
        """
        self.stopped = False
        if self.scaling is None:
            self._measure_input()
        if self.step >= self.config.num_steps or all(learner.is_fixed for learner in self.learners):
            return
        started, first = time.monotonic(), self.step
        batches = iter(self.source.batches(self.cursor))
        while self.step < self.config.num_steps:
            batch = next(batches, None)
            self.stopped, ended = self.comm.any_of(self.should_stop(), batch is None)
            if self.stopped or ended:
                self._save_where_it_stands()
                if self.stopped:
                    return
                raise TrainingError(f"the rows end after step {self.step} of train.num_steps {self.config.num_steps}")
            assert batch is not None
            self._learn_from(batch)
            if self.step % self.config.log_every_steps == 0 or self.step == self.config.num_steps:
                self._log(time.monotonic() - started, first)
            if self.step % self.config.checkpoint_every_steps == 0 or self.step == self.config.num_steps:
                self._save_where_it_stands()

    def _learn_from(self, batch: ActivationBatch) -> None:
        assert self.scaling is not None
        own = self.config.batch_tokens // self.comm.data_size
        if self.comm.size > 1 and len(batch.acts) != own:
            raise TrainingError(f"a batch of {len(batch.acts)} rows where every data rank needs {own}")
        self.train_step(self.scaling.apply(batch.acts))
        self.cursor = batch.cursor
        if self.on_step:
            self.on_step(1)

    def _save_where_it_stands(self) -> None:
        if self.folder and self.step and self.saved_step != self.step:
            self.save()

    @torch.no_grad()
    def finish(self) -> dict[str, SparseAutoencoder]:
        """Take averaged weights, and fold centring and scaling in: afterwards dictionaries work on raw activations.

        Returns them by name. Those that ranks hold in parts are put together in the first one's host memory; the other
        ranks get none of them.
        """
        assert self.scaling is not None, "fit() comes first"
        mean, scale = self.scaling.mean, self.scaling.scale
        for learner in self.learners:
            learner.take_average()
            r, w = learner.reads, learner.writes
            learner.dictionary.fold_scaling(mean[r], scale[r], mean[w], scale[w])
        whole = {learner.name: gather_dictionary(learner.dictionary) for learner in self.learners}
        return {name: dictionary for name, dictionary in whole.items() if dictionary is not None}

    def _measure_input(self) -> None:
        rows, count, batches = [], 0, iter(self.source.batches(Cursor()))
        while count < self.config.init_tokens:
            batch = next(batches, None)
            if self.comm.any_of(batch is None)[0]:
                break
            assert batch is not None
            rows += self.comm.gather_data(batch.acts.float())  # in the order in which one process has them
            count += len(batch.acts) * self.comm.data_size
        if not rows:
            raise TrainingError("there are no rows to learn from")
        first = torch.cat(rows)[: self.config.init_tokens]
        del rows
        self.scaling = InputScaling.measure(first, self.source.widths)
        start = self.scaling.apply(first)
        centre = geometric_median(start) if self.config.b_dec_init == "geometric_median" else start.mean(0)
        for learner in self.learners:
            if learner.name in self.pretrained:
                self._unfold(learner)
            else:
                learner.dictionary.b_dec.data.copy_(centre[learner.writes])
                self._start_from_rows(learner, start[:, learner.reads])
            learner.take_start()

    @torch.no_grad()
    def _start_from_rows(self, learner: Learner, rows: torch.Tensor) -> None:
        """Put rows that the activations give in place of random ones, where `dictionary.start` says so."""
        dictionary, d_sae = learner.dictionary, learner.num_latents
        if dictionary.config.start == "random":
            return
        found = start_rows(dictionary.config.start, rows, d_sae, self.start_seeds.get(learner.name, 0))
        own = found if dictionary.comm.feature_size == 1 else found[dictionary.comm.shard(d_sae)]
        dictionary.W_dec.copy_(own)
        dictionary.W_enc.copy_(own * dictionary.encoder_start)

    def _unfold(self, learner: Learner) -> None:
        """Turn a dictionary of raw activations into one of scaled rows: folding with the inverse scaling."""
        assert self.scaling is not None
        r, w = learner.reads, learner.writes
        mean, scale = -self.scaling.mean * self.scaling.scale, 1 / self.scaling.scale
        learner.dictionary.fold_scaling(mean[r], scale[r], mean[w], scale[w])

    # --- one step ------------------------------------------------------------------------------------------------

    def train_step(self, rows: torch.Tensor) -> None:
        """One optimizer step of every dictionary on scaled rows [N, columns].

        A batch whose loss is not finite changes nothing in a dictionary: it is skipped and counted.
        """
        lr_share = learning_rate_share(self.step, self.config)
        warmup = self.config.sparsity_warmup_steps
        sparsity_share = min(1.0, (self.step + 1) / warmup) if warmup else 1.0
        self.step += 1
        for learner in self.learners:
            if learner.is_fixed:
                continue
            started = time.monotonic()
            learner.step(rows, lr_share, sparsity_share, self.matmul_dtype)
            learner.seconds += time.monotonic() - started
            if learner.skipped > max(1, self.config.max_skipped_share * self.config.num_steps):
                raise TrainingError(
                    f"{learner.name}: {learner.skipped} of {self.step} batches were not finite, more than "
                    f"train.max_skipped_share ({self.config.max_skipped_share:g}) allows: the activations hold values "
                    "that are not finite, or train.lr is too high"
                )

    def _log(self, seconds: float, first: int) -> None:
        rate = (self.step - first) * self.config.batch_tokens / max(seconds, 1e-9)
        lr_share = learning_rate_share(self.step - 1, self.config)
        for learner in self.learners:
            line = learner.log_line()
            if line and line["fvu"] < self.best.get(learner.name, {"fvu": math.inf})["fvu"]:
                self.best[learner.name] = {"fvu": line["fvu"], "step": self.step}
            if self.on_log and line:
                tokens = self.step * self.config.batch_tokens
                head = {"dictionary": learner.name, "step": self.step, "tokens": tokens}
                lr = self.config.peak_lr(learner.num_latents) * lr_share
                end = {"resharded": len(self.resharded)} if self.resharded else {}
                self.on_log({**head, **line, "lr": lr, "tokens_per_second": round(rate, 1), **end})

    def _checked_state(self) -> dict[str, Any] | None:
        """State of the newest checkpoint, if it is of this training."""
        state = read_state(self.folder) if self.folder else None
        if state is None:
            return None
        before, now = state["config"], to_dict(self.config)
        changed = [
            (f"train.{key}", before.get(key), now.get(key)) for key in {**before, **now} if key not in _FREE_KEYS
        ]
        origin = state.get("belongs_to", {})
        changed += [(key, origin.get(key), self.belongs_to.get(key)) for key in {**origin, **self.belongs_to}]
        for key, old, new in changed:
            if old != new:
                raise CheckpointError(
                    f"{self.folder}: the checkpoint was trained with {key} = {old}, this run asks for {new}; "
                    "remove the folder to train anew"
                )

        return {**state, "resharded": [*state["resharded"], *self._check_ranks(state["ranks"], state["step"])]}

    def _check_ranks(self, before: list[int], step: int) -> list[str]:
        now = [self.comm.data_size, self.comm.feature_size]
        if before == now:
            return []
        change = f"from {before[0]} x {before[1]} to {now[0]} x {now[1]} ranks (data x feature)"
        if not self.reshard:
            raise CheckpointError(
                f"{self.folder}: the checkpoint cannot go on bit for bit {change}; --reshard goes on all the same"
            )
        return [f"step {step}: {change}"]

    # --- resume --------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of everything that a resume needs."""
        assert self.folder is not None and self.scaling is not None
        tensors = {"scaling.mean": self.scaling.mean, "scaling.scale": self.scaling.scale}
        for learner in self.learners:
            tensors |= learner.tensors()
        state = {
            "config": to_dict(self.config),
            "belongs_to": self.belongs_to,
            "cursors": self.comm.gather_objects(self.cursor.state()),
            "resharded": self.resharded,
            "best": self.best,
            "learners": {learner.name: learner.state() for learner in self.learners},
        }
        sharded = frozenset().union(*(learner.sharded_tensors() for learner in self.learners))
        made = Checkpoint(self.step, tensors, state, sharded)
        path = save_checkpoint(self.folder, made, comm=self.comm, keep=self.config.keep_checkpoints)
        self.saved_step = self.step
        return path

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False where there is none.

        Raises CheckpointError where it is damaged, was written under another training configuration or on other rows.
        """
        state = self.comm.on_first(self._checked_state)
        if state is None:
            return False
        self.resharded = state["resharded"]
        scaling = {f"scaling.{name}": torch.empty(sum(self.source.widths.values())) for name in ("mean", "scale")}
        wanted, sharded = dict(scaling), set()
        for learner in self.learners:
            wanted |= learner.tensors()
            sharded |= learner.sharded_tensors()
        tensors = load_tensors(state, wanted, sharded, self.comm)
        device = self.learners[0].dictionary.W_enc.device
        self.scaling = InputScaling(tensors["scaling.mean"].to(device), tensors["scaling.scale"].to(device))
        for learner in self.learners:
            learner.load(tensors, state["learners"][learner.name])
        self.step, cursors = state["step"], [Cursor.from_state(cursor) for cursor in state["cursors"]]
        self.saved_step, self.best = self.step, state.get("best", {})
        if len(cursors) == self.comm.data_size:
            self.cursor = cursors[self.comm.data_rank]
        elif all(
            cursor == cursors[0] for cursor in cursors
        ):  # ranks that share out one stream of batches stand at the same place in it
            self.cursor = cursors[0]
        else:  # other ranks read other rows: all begin the next epoch
            self.cursor = Cursor(max(cursor.epoch for cursor in cursors) + 1)
        return True


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, plateau, linear decay to 0 over the last share."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_share * config.num_steps
    decay = min(1.0, (config.num_steps - step) / decay_steps) if decay_steps else 1.0
    return warmup * decay


def columns_of(widths: Mapping[str, int], names: tuple[str, ...]) -> slice:
    """Columns of hook points that lie side by side. Raises ValueError where they do not or one is missing."""
    order = list(widths)
    missing = [name for name in names if name not in widths]
    if missing:
        raise ValueError(f"hook point {missing[0]} is not in the stream, which has {', '.join(order)}")
    first = order.index(names[0])
    if order[first : first + len(names)] != list(names):
        raise ValueError(f"hook points {', '.join(names)} do not lie side by side in the stream ({', '.join(order)})")
    start = sum(widths[name] for name in order[:first])
    return slice(start, start + sum(widths[name] for name in names))
