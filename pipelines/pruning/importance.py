"""How much a unit is worth, by method.

features    root mean square, over calibration windows, of what taking the unit out changes the chosen features'
            activations by, to first order: activation times gradient, summed over the window. Features count alike:
            each is divided by its own root mean square. Random signs in front of each feature and token keep changes
            from cancelling (Hutchinson 1989)
loss        the same of the next-token loss of whole windows (Molchanov et al. 2017, arXiv:1611.06440)
activation  norm of the unit's activations times norm of the weights that read it (Sun et al. 2023, arXiv:2306.11695,
            summed over a unit's weights)
magnitude   norm of the weights that read it
random      uniform numbers

Only units that the chosen features depend on are pruned, by any method: those before the hook point.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from saeql.sae.hooks import capture
from saeql.sae.model import SparseAutoencoder

from ..models import LanguageModel
from .units import Units

METHODS = ("features", "loss", "activation", "magnitude", "random")
#: Windows that gradients flow through at once.
BATCH_WINDOWS = 4

#: By entry of a list of units: [num] float64.
Scores = list[np.ndarray]


def feature_scores(
    lm: LanguageModel,
    dictionary: SparseAutoencoder,
    reads: Sequence[str],
    features: Sequence[int],
    units: Sequence[Units],
    windows: np.ndarray,
    *,
    draws: int = 2,
    seed: int = 0,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[Scores, list[bool]]:
    """Worth of every unit to the chosen features on windows [W, T]; and which entries they depend on at all."""
    generator = torch.Generator().manual_seed(seed)
    scale = _feature_scale(lm, dictionary, reads, features, windows)
    weight = dictionary.W_enc[list(features)].detach().float()  # [F, d]
    bias = dictionary.b_enc[list(features)].detach().float()

    def objective(ids: torch.Tensor) -> Iterator[torch.Tensor]:
        with capture(lm.model, list(reads), lm.device) as reader:
            acts = reader.run(ids)
        x = torch.cat([acts[name].float() for name in reads], dim=-1)
        active = active_values(dictionary, x.detach(), features) > 0  # [B, T, F]
        centred = x if dictionary.encoder_b_dec is None else x - dictionary.encoder_b_dec.detach()
        values = (centred @ weight.T + bias) * active / scale
        for _ in range(draws):
            signs = torch.randint(0, 2, values.shape, generator=generator).to(values) * 2 - 1
            yield (values * signs).sum()

    return _attributed(lm, units, windows, objective, advance)


def loss_scores(
    lm: LanguageModel,
    units: Sequence[Units],
    windows: np.ndarray,
    *,
    advance: Callable[[int], object] = lambda _: None,
) -> Scores:
    """Worth of every unit to the next-token loss on windows [W, T]."""

    def objective(ids: torch.Tensor) -> Iterator[torch.Tensor]:
        logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        yield torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="sum"
        )

    return _attributed(lm, units, windows, objective, advance)[0]


@torch.no_grad()
def activation_scores(lm: LanguageModel, units: Sequence[Units], windows: np.ndarray) -> Scores:
    """Norm of every unit's activations on windows [W, T] times the norm of the weights that read it."""
    squares = [torch.zeros(own.num * own.width, dtype=torch.float64) for own in units]
    with _inputs(units) as inputs:
        for start in range(0, len(windows), BATCH_WINDOWS):
            lm.model(input_ids=_ids(lm, windows[start : start + BATCH_WINDOWS]), use_cache=False)
            for number, found in inputs.items():
                squares[number] += found.flatten(0, -2).double().square().sum(0).cpu()
    return [
        own.of_columns(own.columns.double().square().sum(0).cpu() * seen).sqrt().numpy()
        for own, seen in zip(units, squares, strict=True)
    ]


def magnitude_scores(units: Sequence[Units]) -> Scores:
    """Norm of the weights that read every unit."""
    return [own.of_columns(own.columns.double().square().sum(0)).sqrt().cpu().numpy() for own in units]


def random_scores(units: Sequence[Units], seed: int) -> Scores:
    """Uniform numbers."""
    rng = np.random.default_rng(seed)
    return [rng.random(own.num) for own in units]


@torch.no_grad()
def active_values(dictionary: SparseAutoencoder, x: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
    """Activations [B, T, F] of chosen features on rows x [B, T, d_in]; 0 where they are not active."""
    latents = dictionary.encode(x.flatten(0, 1))
    asked = torch.tensor(list(features), device=x.device)
    found = [(latents.values.float() * (latents.indices == f)).sum(1) for f in asked]
    return torch.stack(found, dim=-1).view(*x.shape[:2], -1)


@torch.no_grad()
def _feature_scale(
    lm: LanguageModel, dictionary: SparseAutoencoder, reads: Sequence[str], features: Sequence[int], windows: np.ndarray
) -> torch.Tensor:
    """[F] root of the sum of squares of each feature over all windows; 1 where it is never active."""
    squares = torch.zeros(len(features), dtype=torch.float64)
    with capture(lm.model, list(reads), lm.device) as reader:
        for start in range(0, len(windows), BATCH_WINDOWS):
            acts = reader.run(_ids(lm, windows[start : start + BATCH_WINDOWS]))
            x = torch.cat([acts[name].float() for name in reads], dim=-1)
            squares += active_values(dictionary, x, features).double().square().sum((0, 1)).cpu()
    return torch.where(squares > 0, squares.sqrt(), 1.0).float().to(lm.device)


def _attributed(
    lm: LanguageModel,
    units: Sequence[Units],
    windows: np.ndarray,
    objective: Callable[[torch.Tensor], Iterator[torch.Tensor]],
    advance: Callable[[int], object],
) -> tuple[Scores, list[bool]]:
    """Root mean square over windows of activation times gradient, summed over a window's tokens."""
    squares = [np.zeros(own.num) for own in units]
    reached, count = [False] * len(units), 0
    with _frozen(lm.model), _inputs(units, with_gradient=True) as inputs, torch.enable_grad():
        for start in range(0, len(windows), BATCH_WINDOWS):
            inputs.clear()
            batch = windows[start : start + BATCH_WINDOWS]
            for total in objective(_ids(lm, batch)):
                numbers = list(inputs)
                gradients = torch.autograd.grad(
                    total, [inputs[n] for n in numbers], retain_graph=True, allow_unused=True
                )
                for n, gradient in zip(numbers, gradients, strict=True):
                    if gradient is None:
                        continue
                    reached[n] = True
                    change = inputs[n].detach().double() * gradient.double()
                    change = change.reshape(len(batch), -1, change.shape[-1]).sum(1)  # [B, columns]
                    squares[n] += units[n].of_columns(change).square().sum(0).cpu().numpy()
                count += len(batch)
            advance(len(batch))
    return [np.sqrt(total / max(count, 1)) for total in squares], reached


@contextmanager
def _inputs(units: Sequence[Units], *, with_gradient: bool = False) -> Iterator[dict[int, torch.Tensor]]:
    """What every reader is called with, by entry; with a gradient to ask for."""
    found: dict[int, torch.Tensor] = {}
    handles = []
    try:
        for number, own in enumerate(units):

            def note(_module: object, args: tuple[Any, ...], number: int = number) -> tuple[Any, ...] | None:
                if with_gradient and not args[0].requires_grad:
                    args = (args[0].detach().requires_grad_(True), *args[1:])
                found[number] = args[0]
                return args

            handles.append(own.reader.register_forward_pre_hook(note))
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside the block."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _ids(lm: LanguageModel, windows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(windows).long().to(lm.input_device)
