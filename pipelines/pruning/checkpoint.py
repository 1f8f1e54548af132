"""A pruned model as an ordinary checkpoint of transformers.

Pruned heads stay in place with zeros in what reads them. Pruned neurons are cut out where every layer loses as many
and the configuration has one width for all: the checkpoint is smaller. Elsewhere they are zeroed like heads, what
makes them too. `pruning.json` beside the weights says which units are gone.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic import write_whole
from ..models import LanguageModel
from .units import Masks, PruneError, Units, by_input, taken_out

#: Keys of configurations that hold the number of neurons.
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")


def check_free(folder: Path) -> None:
    """Raises PruneError where a folder is in use."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PruneError(f"{folder} is in use: name a folder that is not there or empty")


def write_checkpoint(
    lm: LanguageModel, units: Sequence[Units], masks: Masks, folder: Path, about: dict[str, Any], *, cut: bool = True
) -> bool:
    """Write model and tokenizer to a folder that is not there or empty; whether neurons were cut out.

    Weights are written in the precision that the run holds them in. Raises PruneError where the folder is in use.
    """
    check_free(folder)
    with taken_out(units, masks):
        width = _common_width(lm.model, units, masks) if cut else None
        model = _cut(lm.model, units, masks, width) if width is not None else _zeroed(lm.model, units, masks)
        model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    gone = [
        {"layer": units[n].layer, "kind": units[n].kind, "units": np.flatnonzero(mask).tolist()}
        for n, mask in masks.items()
    ]
    record = {**about, "neurons": "cut out" if width is not None else "zeroed", "heads": "zeroed", "pruned": gone}
    write_whole(folder / "pruning.json", json.dumps(record, indent=1, default=str) + "\n")
    return width is not None


def _common_width(model: Any, units: Sequence[Units], masks: Masks) -> int | None:
    """Neurons of every layer afterwards; None where layers differ, or some are not pruned."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    left = [units[n].num - int(mask.sum()) for n, mask in masks.items() if units[n].kind == "mlp"]
    has_key = any(hasattr(model.config, key) for key in _WIDTHS)
    return left[0] if has_key and len(left) == layers and len(set(left)) == 1 and left[0] > 0 else None


def _zeroed(model: Any, units: Sequence[Units], masks: Masks) -> Any:
    """A copy in which what makes pruned neurons is zero too."""
    made = copy.deepcopy(model)
    for n, mask in masks.items():
        at = torch.from_numpy(np.flatnonzero(mask))
        for path in units[n].maker_paths:
            maker = made.get_submodule(path)
            rows = by_input(maker)
            rows[at.to(rows.device)] = 0
            if maker.bias is not None:
                maker.bias.data[at.to(rows.device)] = 0
    return made


def _cut(model: Any, units: Sequence[Units], masks: Masks, width: int) -> Any:
    """A model of the same class with `width` neurons in every layer."""
    config = copy.deepcopy(model.config)
    key = next(key for key in _WIDTHS if hasattr(config, key))
    setattr(config, key, width)
    state = dict(model.state_dict())
    for n, mask in masks.items():
        if units[n].kind != "mlp":
            continue
        kept = torch.from_numpy(np.flatnonzero(~mask)).to(units[n].columns.device)
        _keep(state, units[n].reader_path, units[n].reader, kept, inputs=True)
        for path, maker in zip(units[n].maker_paths, units[n].makers, strict=True):
            _keep(state, path, maker, kept, inputs=False)
    made = type(model)(config).to(model.dtype)
    made.load_state_dict(state)
    made.tie_weights()
    return made


def _keep(state: dict[str, torch.Tensor], path: str, module: Any, kept: torch.Tensor, *, inputs: bool) -> None:
    """Leave only some inputs, or outputs, of a projection in a state dictionary."""
    is_linear = isinstance(module, torch.nn.Linear)  # [out, in]; GPT-2's projections are [in, out]
    name = f"{path}.weight"
    state[name] = state[name].index_select(int(inputs == is_linear), kept)
    if not inputs and f"{path}.bias" in state:
        state[f"{path}.bias"] = state[f"{path}.bias"][kept]
