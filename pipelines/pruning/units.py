"""The units that can be pruned: MLP neurons and attention heads, as columns of what reads them.

A neuron is an input of its MLP's last projection, a head a slice of the inputs of the attention's output projection
(with grouped queries: a query head; its keys and values belong to others too). Zeroing these columns takes a unit out
exactly. GPT-2's projections hold their weights transposed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from saeql.sae.hook_points import layer_stack, text_config

KINDS = ("mlp", "heads")
#: Paths below a layer of (what reads the neurons, what makes them) and of what reads the heads, as families have them.
_NEURONS = (
    ("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")),  # Llama, Mistral, Qwen, Gemma, OLMo
    ("mlp.c_proj", ("mlp.c_fc",)),  # GPT-2
    ("mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",)),  # GPT-NeoX
    ("mlp.fc2", ("mlp.fc1",)),  # Phi
    ("fc2", ("fc1",)),  # OPT
)
_HEADS = ("self_attn.o_proj", "attn.c_proj", "attention.dense", "self_attn.dense", "self_attn.out_proj")


class PruneError(ValueError):
    """A model cannot be pruned, or not as asked."""


@dataclass(frozen=True)
class Units:
    """The neurons, or the heads, of one layer."""

    layer: int
    kind: str  # "mlp" | "heads"
    reader_path: str
    reader: Any  # nn.Linear, or the Conv1D of GPT-2
    makers: tuple[Any, ...]  # projections with a row for every neuron; none for heads
    maker_paths: tuple[str, ...]
    num: int
    width: int  # columns of a unit

    @property
    def columns(self) -> torch.Tensor:
        """[d_out, num * width] the reader's weights, a view of them."""
        return by_input(self.reader)

    def of_columns(self, squares: torch.Tensor) -> torch.Tensor:
        """[..., num * width] -> [..., num]: sums over the columns of every unit."""
        return squares.unflatten(-1, (self.num, self.width)).sum(-1)


def by_input(module: Any) -> torch.Tensor:
    """Weights [d_out, d_in] of a projection: a view that can be written to."""
    return module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T


def find_units(model: Any, kinds: Sequence[str]) -> list[Units]:
    """All units of a model, layer by layer.

    Raises PruneError for a model whose layers are built in a way that is not known here, or whose weights are
    quantised.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise PruneError(f"no kind of unit {(*unknown, '')[0]!r}: there is {', '.join(KINDS)} and both")
    path, layers = layer_stack(model)
    return [_units(model, f"{path}.{n}", n, layer, kind) for n, layer in enumerate(layers) for kind in kinds]


def _units(model: Any, here: str, n: int, layer: nn.Module, kind: str) -> Units:
    modules: dict[str, Any] = dict(layer.named_modules())
    if kind == "mlp":
        found = next(((r, m) for r, m in _NEURONS if r in modules and all(path in modules for path in m)), None)
        reader_path, maker_paths = found or ("", ())
        what = "MLP of one projection in and one out"
    else:
        reader_path, maker_paths = next((path for path in _HEADS if path in modules), ""), ()
        what = "attention with one output projection"
    if not reader_path:
        raise PruneError(f"{type(model).__name__}: layer {n} has no {what} that is known here, so it is not pruned")
    reader = modules[reader_path]
    weight = getattr(reader, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise PruneError(
            f"{type(model).__name__}: the weights of {here}.{reader_path} are quantised: prune it unquantised"
        )
    columns = by_input(reader).shape[1]
    num = columns if kind == "mlp" else int(text_config(model).num_attention_heads)
    if columns % num:
        raise PruneError(f"{here}.{reader_path} has {columns} inputs, which are no {num} heads")
    makers = tuple(modules[path] for path in maker_paths)
    wrong = next((path for path, maker in zip(maker_paths, makers, strict=True) if len(by_input(maker)) != num), None)
    if wrong:
        raise PruneError(f"{here}.{wrong} does not make one output for each of the {num} neurons")
    paths = tuple(f"{here}.{path}" for path in maker_paths)
    return Units(n, kind, f"{here}.{reader_path}", reader, makers, paths, num, columns // num)


#: By number of the entry in a list of `Units`: which of its units are taken out, [num] bool.
Masks = Mapping[int, np.ndarray]


@contextmanager
def taken_out(units: Sequence[Units], masks: Masks) -> Iterator[None]:
    """The model without some units for the length of the block; afterwards its weights are bit for bit as before."""
    saved = []
    try:
        for number, mask in masks.items():
            own = units[number]
            at = torch.from_numpy(np.flatnonzero(np.repeat(mask, own.width))).to(own.columns.device)
            saved.append((own, at, own.columns[:, at].clone()))
            own.columns[:, at] = 0
        yield
    finally:
        for own, at, before in saved:
            own.columns[:, at] = before


def num_weights(units: Sequence[Units], masks: Masks) -> int:
    """Parameters that stand for pruned units: columns of what reads them, and rows of what makes neurons."""
    total = 0
    for number, mask in masks.items():
        own = units[number]
        per_unit = own.columns.shape[0] * own.width
        for maker in own.makers:
            per_unit += by_input(maker).shape[1] + (getattr(maker, "bias", None) is not None)
        total += int(mask.sum()) * per_unit
    return total
