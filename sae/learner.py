"""One dictionary while it learns: its optimizer state and counters, and one step on a batch."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from saeql.kernels.fused_adam import AdamStep, Moments, adam_rows

from .config import TrainConfig
from .metrics import dead_share
from .model import SparseAutoencoder
from .objective import LossTerms, loss_terms


@dataclass
class _Window:
    """Sums between two log lines."""

    reconstruction: float = 0.0
    sparsity: float = 0.0
    auxiliary: float = 0.0
    num_active: float = 0.0
    num_rows: int = 0
    num_steps: int = 0


@dataclass
class Learner:
    """A dictionary with everything that a resume of its training needs.

    `reads` and `writes` are the columns of the stream that are its input and its target.
    """

    name: str
    dictionary: SparseAutoencoder
    config: TrainConfig
    reads: slice
    writes: slice
    steps: int = 0  # optimizer steps taken: skipped batches do not count
    skipped: int = 0
    moments: dict[str, Moments] = field(init=False)  # by parameter name
    averages: dict[str, torch.Tensor] = field(init=False)  # by parameter name, empty where weights are not averaged
    idle_tokens: torch.Tensor = field(init=False)  # [d_sae], rows since a latent fired
    window: _Window = field(default_factory=_Window)

    def __post_init__(self) -> None:
        parameters = dict(self.dictionary.named_parameters())
        self.moments = {name: Moments.like(p.data) for name, p in parameters.items()}
        averaged = parameters if self.config.ema_decay is not None else {}
        self.averages = {name: p.data.clone() for name, p in averaged.items()}
        device = self.dictionary.W_enc.device
        self.idle_tokens = torch.zeros(self.dictionary.d_sae, dtype=torch.int64, device=device)

    def step(
        self, rows: torch.Tensor, lr_share: float, sparsity_share: float, matmul_dtype: torch.dtype | None
    ) -> bool:
        """Learn from rows [N, columns]. False, with nothing changed but the count, where the loss is not finite."""
        x = rows[:, self.reads]
        y = x if self.reads == self.writes else rows[:, self.writes]
        dead = (self.idle_tokens >= self.config.dead_after_tokens).nonzero().squeeze(1)
        buffers = {name: b.clone() for name, b in self.dictionary.named_buffers()}
        terms, outcome = loss_terms(
            self.dictionary,
            x,
            y,
            dead,
            auxk_coefficient=self.config.auxk_coefficient,
            sparsity_share=sparsity_share,
            matmul_dtype=matmul_dtype,
        )
        if not math.isfinite(float(terms.total.detach())):
            for name, buffer in self.dictionary.named_buffers():
                buffer.copy_(buffers[name])
            self.skipped += 1
            return False
        for parameter in self.dictionary.parameters():
            parameter.grad = None
        terms.total.backward()
        self._update(self.config.peak_lr(self.dictionary.d_sae) * lr_share)
        self.idle_tokens += len(x)
        self.idle_tokens[outcome.fired] = 0
        self._count(terms, float(outcome.num_active), len(x))
        return True

    def _update(self, lr: float) -> None:
        """Clip, Adam with the decoder's rows kept on the unit sphere, weight average."""
        self._clip()
        self.steps += 1
        adam = AdamStep(self.steps, lr, *self.config.adam_betas)
        for name, parameter in self.dictionary.named_parameters():
            if parameter.grad is None:  # a loss that does not reach it
                continue
            unit_norm = name == "W_dec"
            adam_rows(
                parameter.data, parameter.grad, self.moments[name], adam, project=unit_norm, renormalize=unit_norm
            )
            if name in self.averages and self.config.ema_decay is not None:
                self.averages[name].lerp_(parameter.data, 1 - self.config.ema_decay)

    def _clip(self) -> None:
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.dictionary.parameters(), self.config.max_grad_norm)

    def _count(self, terms: LossTerms, num_active: float, num_rows: int) -> None:
        window = self.window
        window.reconstruction += float(terms.reconstruction.detach())
        window.sparsity += float(terms.sparsity.detach())
        window.auxiliary += float(terms.auxiliary.detach())
        window.num_active += num_active
        window.num_rows += num_rows
        window.num_steps += 1

    def log_line(self) -> dict[str, Any]:
        """Means since the last call, which starts a new count; empty where no step was taken."""
        window, self.window = self.window, _Window()
        if window.num_steps == 0:
            return {}
        alive = (self.idle_tokens < self.config.dead_after_tokens).long()
        return {
            "fvu": window.reconstruction / window.num_steps,
            "l0": window.num_active / window.num_rows,
            "dead_share": dead_share(alive),
            "sparsity_loss": window.sparsity / window.num_steps,
            "auxk_loss": window.auxiliary / window.num_steps,
            "skipped_batches": self.skipped,
        }

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged weights in place of the last ones, decoder rows at unit norm again."""
        for name, parameter in self.dictionary.named_parameters():
            if name in self.averages:
                parameter.copy_(self.averages[name])
        if self.averages:
            self.dictionary.W_dec.div_(self.dictionary.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30))

    # --- checkpoint ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that changes while learning, by name; the tensors themselves, to be read or copied into."""
        found = {**dict(self.dictionary.named_buffers()), "idle_tokens": self.idle_tokens}
        for name, parameter in self.dictionary.named_parameters():
            found[name] = parameter.data
            for moment, tensor in self.moments[name]._asdict().items():
                found[f"{name}.{moment}"] = tensor
        found |= {f"{name}.average": tensor for name, tensor in self.averages.items()}
        return {f"{self.name}.{name}": tensor for name, tensor in found.items()}

    def state(self) -> dict[str, int]:
        """Counters beside the tensors."""
        return {"steps": self.steps, "skipped": self.skipped}
