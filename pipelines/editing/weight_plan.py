"""Which tensors of a checkpoint change for a set of edits, and which switches of its configuration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..model_build import skeleton
from ..model_config import ModelConfig, ModelError
from .affine import AffineChange, EditError
from .tensor_files import TensorFile
from .writers import Writer, is_conv1d, writer_of


@dataclass
class WeightPlan:
    """New tensors by the name that they have in the files, and configuration entries that must change with them."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    """For a tensor that no file has yet: the tensor in whose file it goes."""
    switches: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Planner:
    """Plans the tensors of one model: its modules, and the files that it was loaded from."""

    def __init__(self, model: Any, folder: Path, files: Mapping[str, TensorFile]):
        self.model, self.folder, self.files = model, folder, files
        self.file_of = {name: file for file in files.values() for name in file.entries}
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in self.config:
            raise EditError("this checkpoint is quantised: its weights are codes, which cannot hold an edit exactly")

    def plan(self, changes: Mapping[str, AffineChange]) -> WeightPlan:
        """The plan for changes by hook point. Raises EditError, saying why, where one cannot be held."""
        plan = WeightPlan()
        by_path: dict[str, list[tuple[AffineChange, bool]]] = {}
        order = sorted(
            changes, key=lambda name: not name.startswith(("mlp_out", "attn_out"))
        )  # streams come after parts
        for hook_point in order:
            change = changes[hook_point]
            writer = writer_of(self.model, hook_point, change)
            for number, path in enumerate(writer.paths):
                by_path.setdefault(path, []).append((change, number == 0))
            self._require_unshared(writer)
        for path, own in by_path.items():
            module = self.model.get_submodule(path)
            if isinstance(module, nn.Embedding):
                self._embedding(plan, path, own)
            else:
                self._projection(plan, path, module, own)
        return plan

    def _projection(
        self, plan: WeightPlan, path: str, module: nn.Module, own: Sequence[tuple[AffineChange, bool]]
    ) -> None:
        changes = [change for change, _ in own]
        if any(not change.is_shift for change in changes):
            name = self._file_name(f"{path}.weight")
            weight = self.file_of[name].tensor(name).float()
            rows = weight if is_conv1d(module) else weight.t()  # [in, d]
            for change in changes:
                rows = change.linear(rows.contiguous())
            plan.tensors[name] = (rows if is_conv1d(module) else rows.t()).contiguous()
        has_bias = getattr(module, "bias", None) is not None
        shifts = any(bool(change.offset.any()) for change in changes)
        if not has_bias and not shifts:
            return
        if not has_bias:
            self._switch_bias_on(plan, path)
        name = (
            self._file_name(f"{path}.bias") if has_bias else next(n for n in plan.beside if n.endswith(f"{path}.bias"))
        )
        bias = self.file_of[name].tensor(name).float() if has_bias else plan.tensors[name]
        for change in changes:
            bias = change(bias[None])[0]
        plan.tensors[name] = bias

    def _embedding(self, plan: WeightPlan, path: str, own: Sequence[tuple[AffineChange, bool]]) -> None:
        name = self._file_name(f"{path}.weight")
        before = self.file_of[name].tensor(name)
        rows = before.float()
        for change, is_first in own:
            rows = change(rows) if is_first else change.linear(rows)
        plan.tensors[name] = rows
        head = self.model.get_output_embeddings()
        if head is not None and head.weight is self.model.get_submodule(path).weight:
            head_path = next(p for p, module in self.model.named_modules() if module is head)
            plan.switches["tie_word_embeddings"] = False
            plan.tensors[f"{head_path}.weight"] = before
            if f"{head_path}.weight" not in self.file_of:
                plan.beside[f"{head_path}.weight"] = name
            plan.notes.append(
                "the embedding and the unembedding were one matrix: they are two now (tie_word_embeddings = false), "
                "the unembedding as it was"
            )

    def _switch_bias_on(self, plan: WeightPlan, path: str) -> None:
        """Let the model have a bias at `path`, all others that come with the switch zero."""
        before = dict(self.model.named_parameters(remove_duplicate=False))
        for switch in (key for key, value in self.config_with_defaults().items() if "bias" in key and value is False):
            shapes = self._shapes_with({**self.config, **plan.switches, switch: True})
            if f"{path}.bias" not in shapes or not before.keys() <= shapes.keys():
                continue
            added = [name for name in shapes if name not in before]
            plan.switches[switch] = True
            for name in added:
                sibling = self._file_name(f"{name.rpartition('.')[0]}.weight")
                mine = sibling.removesuffix("weight") + "bias"
                if mine not in plan.beside:
                    plan.tensors[mine], plan.beside[mine] = torch.zeros(shapes[name]), sibling
            plan.notes.append(
                f"{switch} = true in config.json: {len(added)} biases came with it, zero but those edited"
            )
            return
        raise EditError(
            f"{path} has no bias, and the configuration of this {type(self.model).__name__} has no switch for one: a "
            "vector cannot be added there; ablate_direction, which needs none, can be held"
        )

    def config_with_defaults(self) -> dict[str, Any]:
        """The model's configuration, entries that its file leaves out too."""
        return self.model.config.to_dict()

    def _shapes_with(self, config: dict[str, Any]) -> dict[str, torch.Size]:
        """Shapes of the parameters of the model that a configuration describes; none where it describes none."""
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            try:
                made = skeleton(Path(folder), ModelConfig(name=folder))
            except ModelError:
                return {}
        return {name: p.shape for name, p in made.named_parameters(remove_duplicate=False)}

    def _file_name(self, parameter: str) -> str:
        """The name that a parameter has in the files: whole, or without the path of the model below its head."""
        prefix = f"{self.model.base_model_prefix}."
        for name in (parameter, parameter.removeprefix(prefix), prefix + parameter):
            if name in self.file_of:
                return name
        raise EditError(f"the files of {self.folder} have no tensor {parameter}: they store this model in another form")

    def _require_unshared(self, writer: Writer) -> None:
        for path in writer.paths:
            weight = self.model.get_submodule(path).weight
            names = [n for n, p in self.model.named_parameters(remove_duplicate=False) if p is weight]
            head = self.model.get_output_embeddings()
            allowed = 2 if head is not None and head.weight is weight else 1
            if len(names) > allowed:
                raise EditError(f"{path} shares its weights with {names[1]}: an edit of one would be an edit of both")
