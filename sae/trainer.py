"""Training: several dictionaries learn from ONE stream of activations, each step sparse from end to end.

Rows are centred and scaled to unit variance per coordinate on their way in; `finish` folds both into the weights, so
that what is saved works on raw activations.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from saeql.kernels.fused_adam import AdamStep, Moments, adam_rows

from .checkpoint import Checkpoint, CheckpointError, load_latest, save_checkpoint
from .config import TrainConfig, to_dict
from .metrics import dead_share
from .model import SparseAutoencoder, geometric_median
from .objective import loss_terms
from .stream import ActivationSource, Cursor

#: Called with one line of metrics.
LogLine = Callable[[dict[str, Any]], None]


class TrainingError(RuntimeError):
    """Training cannot go on: its data or its loss is not finite."""


@dataclass(frozen=True)
class InputScaling:
    """How raw activations become training rows: `(x - mean) * scale`."""

    mean: torch.Tensor  # [d_in]
    scale: float

    @classmethod
    def measure(cls, rows: torch.Tensor) -> "InputScaling":
        """Mean of rows [N, d_in] and the scale that gives them unit variance per coordinate on average."""
        rows = rows.float()
        mean = rows.mean(0)
        variance = float((rows - mean).square().mean())
        if not math.isfinite(variance) or variance == 0:
            raise TrainingError(f"the first {len(rows)} rows have variance {variance}: nothing to learn from")
        return cls(mean, 1 / math.sqrt(variance))

    def apply(self, acts: torch.Tensor) -> torch.Tensor:
        """Training rows of raw activations [N, d_in], float32."""
        return acts.float().sub_(self.mean).mul_(self.scale)


@dataclass
class _Learner:
    """One dictionary with its optimizer state and counters."""

    name: str
    dictionary: SparseAutoencoder
    moments: dict[str, Moments]  # by parameter name
    idle_tokens: torch.Tensor  # [d_sae], rows since the latent last fired
    window: "_Window" = field(default_factory=lambda: _Window())


@dataclass
class _Window:
    """Sums between two log lines."""

    reconstruction: float = 0.0
    auxiliary: float = 0.0
    num_active: float = 0.0
    num_rows: int = 0
    num_steps: int = 0


class Trainer:
    """Trains `dictionaries` (by name) on `source`; checkpoints under `folder` where one is given."""

    def __init__(
        self,
        config: TrainConfig,
        dictionaries: dict[str, SparseAutoencoder],
        source: ActivationSource,
        *,
        folder: Path | None = None,
        on_log: LogLine | None = None,
        on_step: Callable[[int], None] | None = None,
        matmul_dtype: torch.dtype | None = None,
    ):
        self.config, self.source, self.folder = config, source, folder
        self.on_log, self.on_step, self.matmul_dtype = on_log, on_step, matmul_dtype
        self.step = 0
        self.cursor = Cursor()
        self.scaling: InputScaling | None = None
        self.learners = [_learner(name, d) for name, d in dictionaries.items()]

    # --- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to `num_steps` from wherever this trainer stands. Raises TrainingError on rows that are not finite."""
        if self.scaling is None:
            self._measure_input()
        if self.step >= self.config.num_steps:
            return
        started, first = time.monotonic(), self.step
        for batch in self.source.batches(self.cursor):
            assert self.scaling is not None
            x = self.scaling.apply(batch.acts)
            self.train_step(x)
            self.cursor = batch.cursor
            if self.on_step:
                self.on_step(1)
            if self.step % self.config.log_every_steps == 0 or self.step == self.config.num_steps:
                self._log(time.monotonic() - started, first)
            done = self.step >= self.config.num_steps
            if self.folder and (done or self.step % self.config.checkpoint_every_steps == 0):
                self.save()
            if done:
                return

    def finish(self) -> None:
        """Fold centring and scaling into every dictionary: afterwards they work on raw activations."""
        assert self.scaling is not None, "fit() comes first"
        for learner in self.learners:
            learner.dictionary.fold_input(self.scaling.mean, self.scaling.scale)

    def _measure_input(self) -> None:
        rows, count = [], 0
        for batch in self.source.batches(Cursor()):
            rows.append(batch.acts.float())
            count += len(batch.acts)
            if count >= self.config.init_tokens:
                break
        first = torch.cat(rows)[: self.config.init_tokens]
        self.scaling = InputScaling.measure(first)
        start = self.scaling.apply(first.clone())
        centre = geometric_median(start) if self.config.b_dec_init == "geometric_median" else start.mean(0)
        for learner in self.learners:
            learner.dictionary.b_dec.data.copy_(centre)

    # --- one step ------------------------------------------------------------------------------------------------

    def train_step(self, x: torch.Tensor) -> None:
        """One optimizer step of every dictionary on scaled rows x [N, d_in]."""
        lr_share = learning_rate_share(self.step, self.config)
        for learner in self.learners:
            self._learn(learner, x, self.config.peak_lr(learner.dictionary.d_sae) * lr_share)
        self.step += 1

    def _learn(self, learner: _Learner, x: torch.Tensor, lr: float) -> None:
        dictionary, config = learner.dictionary, self.config
        dead = (learner.idle_tokens >= config.dead_after_tokens).nonzero().squeeze(1)
        terms, latents, _ = loss_terms(
            dictionary, x, dead, auxk_coefficient=config.auxk_coefficient, matmul_dtype=self.matmul_dtype
        )
        total = float(terms.total.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss of {learner.name} is {total} at step {self.step}: the activations hold values that are not "
                f"finite, or train.lr ({lr:.2g}) is too high"
            )
        for parameter in dictionary.parameters():
            parameter.grad = None
        terms.total.backward()
        adam = AdamStep(self.step + 1, lr, *config.adam_betas)
        for name, parameter in dictionary.named_parameters():
            assert parameter.grad is not None, name
            unit_norm = name == "W_dec"
            moments = learner.moments[name]
            adam_rows(parameter.data, parameter.grad, moments, adam, project=unit_norm, renormalize=unit_norm)
        active = latents.values.detach() > 0
        learner.idle_tokens += len(x)
        learner.idle_tokens[latents.indices[active].long()] = 0
        window = learner.window
        window.reconstruction += float(terms.reconstruction.detach())
        window.auxiliary += float(terms.auxiliary.detach())
        window.num_active += float(active.sum())
        window.num_rows += len(x)
        window.num_steps += 1

    def _log(self, seconds: float, first: int) -> None:
        rate = (self.step - first) * self.config.batch_tokens / max(seconds, 1e-9)
        for learner in self.learners:
            window, learner.window = learner.window, _Window()
            if self.on_log is None or window.num_steps == 0:
                continue
            idle = (learner.idle_tokens < self.config.dead_after_tokens).long()
            self.on_log(
                {
                    "dictionary": learner.name,
                    "step": self.step,
                    "tokens": self.step * self.config.batch_tokens,
                    "fvu": window.reconstruction / window.num_steps,
                    "l0": window.num_active / window.num_rows,
                    "dead_share": dead_share(idle),
                    "auxk_loss": window.auxiliary / window.num_steps,
                    "lr": self.config.peak_lr(learner.dictionary.d_sae)
                    * learning_rate_share(self.step - 1, self.config),
                    "tokens_per_second": round(rate, 1),
                }
            )

    # --- resume --------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of everything that a resume needs."""
        assert self.folder is not None and self.scaling is not None
        tensors = {"scaling.mean": self.scaling.mean}
        state: dict[str, Any] = {
            "config": to_dict(self.config),
            "scale": self.scaling.scale,
            "cursor": self.cursor.state(),
        }
        for learner in self.learners:
            prefix = learner.name
            for name, parameter in learner.dictionary.named_parameters():
                tensors[f"{prefix}.{name}"] = parameter.data
                for moment, tensor in learner.moments[name]._asdict().items():
                    tensors[f"{prefix}.{name}.{moment}"] = tensor
            tensors[f"{prefix}.idle_tokens"] = learner.idle_tokens
        return save_checkpoint(self.folder, Checkpoint(self.step, tensors, state))

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False where there is none.

        Raises CheckpointError where it is damaged or was written under another training configuration.
        """
        checkpoint = load_latest(self.folder) if self.folder else None
        if checkpoint is None:
            return False
        for key, value in to_dict(self.config).items():
            if checkpoint.state["config"].get(key) != value:
                raise CheckpointError(
                    f"{self.folder}: the checkpoint was trained with {key} = {checkpoint.state['config'].get(key)}, "
                    f"this run asks for {value}"
                )
        tensors = checkpoint.tensors
        self.scaling = InputScaling(tensors["scaling.mean"], checkpoint.state["scale"])
        for learner in self.learners:
            for name, parameter in learner.dictionary.named_parameters():
                key = f"{learner.name}.{name}"
                if key not in tensors or tensors[key].shape != parameter.shape:
                    raise CheckpointError(f"{self.folder}: the checkpoint does not hold {key} {tuple(parameter.shape)}")
                parameter.data.copy_(tensors[key])
                for moment, tensor in learner.moments[name]._asdict().items():
                    tensor.copy_(tensors[f"{key}.{moment}"])
            learner.idle_tokens.copy_(tensors[f"{learner.name}.idle_tokens"])
        self.step, self.cursor = checkpoint.step, Cursor.from_state(checkpoint.state["cursor"])
        return True


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, plateau, linear decay to 0 over the last share."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_share * config.num_steps
    decay = min(1.0, (config.num_steps - step) / decay_steps) if decay_steps else 1.0
    return warmup * decay


def _learner(name: str, dictionary: SparseAutoencoder) -> _Learner:
    moments = {key: Moments.like(p.data) for key, p in dictionary.named_parameters()}
    idle = torch.zeros(dictionary.d_sae, dtype=torch.int64, device=dictionary.W_enc.device)
    return _Learner(name, dictionary, moments, idle)
