"""One dictionary while it learns: its optimizer state and counters, and one step on a batch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch

from saeql.kernels.fused_adam import AdamStep, Moments, adam_rows
from saeql.kernels.sparse_adam import sparse_adam
from saeql.kernels.sparse_grads import SparseGrads

from .config import TrainConfig
from .frozen import check_frozen, frozen_weights, keep_near
from .model import SparseAutoencoder
from .objective import LossTerms, loss_terms
from .resample import check_resampling, is_due, resample
from .sparse_step import sparse_step

#: What stands beside a parameter in a checkpoint, by the end of its name.
_BESIDE = ("first", "second", "average", "start")
_COUNTERS = ("steps", "skipped", "resampled", "seconds")


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
    seconds: float = 0.0  # spent in its steps
    resampled: int = 0  # dead latents that were given a new start, all in all
    moments: dict[str, Moments] = field(init=False)  # by parameter name
    averages: dict[str, torch.Tensor] = field(init=False)  # by parameter name, empty where weights are not averaged
    starts: dict[str, torch.Tensor] = field(init=False)  # by parameter name: rows that may not be left by far
    idle_tokens: torch.Tensor = field(init=False)  # [d_sae], rows since a latent fired
    window: _Window = field(default_factory=_Window)
    W_enc_cast: torch.Tensor | None = None  # W_enc in the dtype of the encoder's matmul, kept by the optimizer

    def __post_init__(self) -> None:
        check_resampling(self.dictionary, self.config)
        check_frozen(self.dictionary.config, self.config)
        freeze = self.dictionary.config.freeze
        self.is_fixed = freeze == "all"
        self.frozen = frozenset() if self.is_fixed else frozen_weights(freeze)
        named = dict(self.dictionary.named_parameters())
        parameters = {n: p for n, p in named.items() if not self.is_fixed and n not in self.frozen}
        self.starts = {"W_dec": named["W_dec"].data.clone()} if freeze == "soft_decoder" else {}
        dtype = getattr(torch, self.config.moments_dtype)
        self.moments = {name: Moments.like(p.data, dtype) for name, p in parameters.items()}
        averaged = parameters if self.config.ema_decay is not None else {}
        self.averages = {name: p.data.clone() for name, p in averaged.items()}
        device = self.dictionary.W_enc.device
        self.idle_tokens = torch.zeros(self.dictionary.d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def take_start(self) -> None:
        """Note where the weights stand before the first step: they may have been set since this learner was made."""
        for name, start in self.starts.items():
            start.copy_(torch.nn.functional.normalize(self.dictionary.get_parameter(name).data, dim=1))
        for name in {"W_enc", "W_dec"} & self.averages.keys():
            self.averages[name].copy_(self.dictionary.get_parameter(name).data)

    @property
    def num_latents(self) -> int:
        """d_sae of the whole dictionary, those of other ranks included."""
        return self.dictionary.d_sae * self.dictionary.comm.feature_size

    def step(
        self, rows: torch.Tensor, lr_share: float, sparsity_share: float, matmul_dtype: torch.dtype | None
    ) -> bool:
        """Learn from rows [N, columns]. False, with nothing changed but the count, where the loss is not finite."""
        x = rows[:, self.reads]
        y = x if self.reads == self.writes else rows[:, self.writes]
        dead = (self.idle_tokens >= self.config.dead_after_tokens).nonzero().squeeze(1)
        buffers = {name: b.clone() for name, b in self.dictionary.named_buffers()}
        adam = AdamStep(self.steps + 1, self.config.peak_lr(self.num_latents) * lr_share, *self.config.adam_betas)
        if self.dictionary.selects:
            learned = self._sparse_step(x, y, dead, adam, matmul_dtype)
        else:
            learned = self._autograd_step(x, y, dead, adam, sparsity_share, matmul_dtype)
        if not learned:
            for name, buffer in self.dictionary.named_buffers():
                buffer.copy_(buffers[name])
            self.skipped += 1
            return False
        self.steps += 1
        for name, start in self.starts.items():
            keep_near(self.dictionary.get_parameter(name).data, start)
        for name, average in self.averages.items():
            average.lerp_(self.dictionary.get_parameter(name).data, 1 - cast(float, self.config.ema_decay))
        if is_due(self.steps, self.config):
            self.resampled += resample(self, x, y)
        return True

    def _sparse_step(
        self, x: torch.Tensor, y: torch.Tensor, dead: torch.Tensor, adam: AdamStep, matmul_dtype: torch.dtype | None
    ) -> bool:
        """Loss, gradients and update without autograd; False where the loss is not finite."""
        dictionary, config = self.dictionary, self.config
        if matmul_dtype not in (None, dictionary.W_enc.dtype) and self.W_enc_cast is None:
            self.W_enc_cast = dictionary.W_enc.data.to(matmul_dtype)
        step = sparse_step(
            dictionary, x, y, dead,
            auxk_coefficient=config.auxk_coefficient, matmul_dtype=matmul_dtype, W_enc_cast=self.W_enc_cast,
        )  # fmt: skip
        if not self._count(step.terms, step.num_active, len(x)):
            return False
        if dictionary.comm.data_size > 1:
            self._update(dict(zip(("W_enc", "W_dec"), step.weights.dense(), strict=True)), step.others, adam)
        else:
            self._update_sparse(step.weights, step.others, adam)
        self._see(step.fired, len(x))
        return True

    def _update_sparse(self, weights: SparseGrads, others: dict[str, torch.Tensor], adam: AdamStep) -> None:
        """Apply the gradients of both weights as they are summed, those of the other parameters, clipped as one."""
        dictionary, moments = self.dictionary, self.moments
        if self.config.max_grad_norm is not None:
            learns = ("W_enc" not in self.frozen, "W_dec" not in self.frozen)
            scale = self._clip_scale(weights.square_norm(learns), others)
            weights, others = weights.scaled(scale), {name: g * scale for name, g in others.items()}
        sparse_adam(
            weights, dictionary.W_enc.data, moments.get("W_enc"), dictionary.W_dec.data, moments.get("W_dec"), adam,
            copies=(self.W_enc_cast, None),
        )  # fmt: skip
        for name, grad in others.items():
            adam_rows(dictionary.get_parameter(name).data, grad, moments[name], adam)

    def _update(self, rows: dict[str, torch.Tensor], others: dict[str, torch.Tensor], adam: AdamStep) -> None:
        """The same for gradients in memory: `rows` of this rank's rows alone, `others` of all rows already."""
        rows, others = ({n: g for n, g in grads.items() if n not in self.frozen} for grads in (rows, others))
        self.dictionary.comm.sum_data(*rows.values())
        scale = None
        if self.config.max_grad_norm is not None:
            squares = torch.zeros((), device=self.idle_tokens.device)
            for grad in rows.values():
                squares += grad.float().square().sum()
            scale = self._clip_scale(squares, others)
        for name, grad in {**rows, **others}.items():
            unit, parameter = name == "W_dec", self.dictionary.get_parameter(name)
            if scale is not None:
                grad.mul_(scale)
            adam_rows(parameter.data, grad, self.moments[name], adam, project=unit, renormalize=unit)
        if self.W_enc_cast is not None:
            self.W_enc_cast.copy_(self.dictionary.W_enc.data)

    def _clip_scale(self, squares: torch.Tensor, others: dict[str, torch.Tensor]) -> torch.Tensor:
        """What gradients are multiplied with; `squares` is the sum of squares of those that ranks hold parts of."""
        squares = squares.clone()
        for name, grad in others.items():
            if name in self.dictionary.by_latent:
                squares += grad.float().square().sum()
        self.dictionary.comm.sum_features(squares)
        for name, grad in others.items():
            if name not in self.dictionary.by_latent:
                squares += grad.float().square().sum()
        return (cast(float, self.config.max_grad_norm) / (squares.sqrt() + 1e-6)).clamp_max(1.0)

    def _autograd_step(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        dead: torch.Tensor,
        adam: AdamStep,
        sparsity_share: float,
        matmul_dtype: torch.dtype | None,
    ) -> bool:
        """The same for a loss that autograd has to take apart."""
        dictionary, config = self.dictionary, self.config
        terms, outcome = loss_terms(
            dictionary, x, y, dead,
            auxk_coefficient=config.auxk_coefficient, sparsity_share=sparsity_share, matmul_dtype=matmul_dtype,
        )  # fmt: skip
        if not self._count(terms, outcome.num_active, len(x)):
            return False
        for parameter in dictionary.parameters():
            parameter.grad = None
        terms.total.backward()
        # a loss that does not reach a parameter leaves it without gradient
        grads = {name: p.grad for name, p in dictionary.named_parameters() if p.grad is not None}
        dictionary.comm.mean_data(*grads.values())
        self._update({}, grads, adam)
        for parameter in dictionary.parameters():  # of many dictionaries on one stream, one has gradients at a time
            parameter.grad = None
        self._see(outcome.fired, len(x))
        return True

    def _see(self, fired: torch.Tensor, num_rows: int) -> None:
        comm = self.dictionary.comm
        if comm.data_size > 1:
            anywhere = torch.zeros_like(self.idle_tokens, dtype=torch.uint8)
            anywhere[fired] = 1
            comm.max_data(anywhere)
            fired = anywhere.nonzero()[:, 0]
        self.idle_tokens += num_rows * comm.data_size
        self.idle_tokens[fired] = 0

    def _count(self, terms: LossTerms, num_active: torch.Tensor, num_rows: int) -> bool:
        """Add to the window; False, with nothing added, where the loss is not finite."""
        comm, num_active = self.dictionary.comm, num_active.double() * self.dictionary.comm.data_size
        comm.sum_features(num_active)
        numbers = (terms.total, terms.reconstruction, terms.sparsity, terms.auxiliary, num_active)
        stacked = torch.stack([number.detach().double() for number in numbers])
        comm.mean_data(stacked)
        total, *parts = stacked.tolist()  # one transfer
        if not math.isfinite(total):
            return False
        window = self.window
        window.reconstruction += parts[0]
        window.sparsity += parts[1]
        window.auxiliary += parts[2]
        window.num_active += parts[3]
        window.num_rows += num_rows * comm.data_size
        window.num_steps += 1
        return True

    def log_line(self) -> dict[str, Any]:
        """Means since the last call, which starts a new count; empty where no step was taken."""
        window, self.window = self.window, _Window()
        if window.num_steps == 0:
            return {}
        comm, num_dead = self.dictionary.comm, int((self.idle_tokens >= self.config.dead_after_tokens).sum())
        return {
            "fvu": window.reconstruction / window.num_steps,
            "l0": window.num_active / window.num_rows,
            "dead_share": comm.count_features(num_dead, self.idle_tokens.device) / self.num_latents,
            "sparsity_loss": window.sparsity / window.num_steps,
            "auxk_loss": window.auxiliary / window.num_steps,
            "skipped_batches": self.skipped,
            **({"resampled": self.resampled} if self.config.resample_every_steps else {}),
        }

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged weights in place of the last ones, decoder rows at unit norm again."""
        for name, parameter in self.dictionary.named_parameters():
            if name in self.averages:
                parameter.copy_(self.averages[name])
        if "W_dec" in self.averages:
            self.dictionary.W_dec.div_(self.dictionary.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30))

    # --- checkpoint ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that changes while learning, by name; the tensors themselves, to be read or copied into."""
        found = {**dict(self.dictionary.named_buffers()), "idle_tokens": self.idle_tokens}
        for name, parameter in self.dictionary.named_parameters():
            found[name] = parameter.data
            for moment, tensor in self.moments[name]._asdict().items() if name in self.moments else ():
                found[f"{name}.{moment}"] = tensor
        found |= {f"{name}.start": tensor for name, tensor in self.starts.items()}
        found |= {f"{name}.average": tensor for name, tensor in self.averages.items()}
        return {f"{self.name}.{name}": tensor for name, tensor in found.items()}

    def sharded_tensors(self) -> frozenset[str]:
        """Names of those with a row for every latent: ranks may hold some rows each."""
        rows = {f"{self.name}.{name}" for name in (*self.dictionary.by_latent, "idle_tokens")}
        return frozenset(
            name
            for name in self.tensors()
            if name in rows or (name.rpartition(".")[0] in rows and name.rpartition(".")[2] in _BESIDE)
        )

    def state(self) -> dict[str, Any]:
        """Counters beside the tensors, and the sums since the last log line."""
        return {**{name: getattr(self, name) for name in _COUNTERS}, "window": asdict(self.window)}

    def load(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, Any]) -> None:
        """Take over what `tensors` and `state` gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        for name in _COUNTERS:
            setattr(self, name, counters[name])
        self.window = _Window(**counters.get("window", {}))
        self.W_enc_cast = None
