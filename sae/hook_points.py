"""Where a model can be read and changed: friendly names, module paths and globs -> concrete hook points.

Friendly names, for layer N (docs/hooks.md says what they mean for each family of models):

- `resid_pre.N`, `resid_post.N`: the residual stream that layer N reads and hands on;
- `attn_out.N`, `mlp_out.N`: what attention and MLP add to the residual stream, so after a norm that follows them;
- `mlp_in.N`: what its MLP reads, so after the norm before it.

Any other name is a module's dotted path: whole, relative to the model without its head, or relative to what holds the
layers (`model.layers.3.mlp` and `layers.3.mlp` are one). A path names the module's output; `PATH@in` names its input,
`PATH@out.1` the second entry of an output that is a tuple. In a glob, `*` stands for any one part of a name, or a piece
of one, `**` for any number of parts, `[0-3]` for one of these characters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import suggestion

KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")
_FRIENDLY = re.compile(rf"({'|'.join(KINDS)})\.(\d+)")
_MODULE = re.compile(r"(?P<path>[^@]*)(?:@(?P<side>in|out)(?:\.(?P<index>\d+))?)?")
#: TransformerLens's names below `blocks.N.`; what the MLP reads is named as its bridge to transformers models does.
_TRANSFORMER_LENS = {kind: f"hook_{kind}" for kind in KINDS} | {"mlp_in": "mlp.hook_in"}


class HookPointError(ValueError):
    """The model has no such hook point, or it is no place that gives one row a token; the message says which exist."""


@dataclass(frozen=True)
class HookPoint:
    """A place in a model: the input or the output of a module."""

    name: str
    module_path: str
    side: str  # "in" | "out"
    layer: int | None  # None for a place outside the layer stack
    index: int = 0  # entry of an output that is a tuple

    @property
    def transformer_lens_name(self) -> str:
        """TransformerLens's name of the same place, or the module path where it has none."""
        match = _FRIENDLY.fullmatch(self.name)
        return f"blocks.{match[2]}.{_TRANSFORMER_LENS[match[1]]}" if match else self.module_path


@dataclass(frozen=True)
class Anatomy:
    """Modules of a layer, as paths below it. None: the layer has no module for that place."""

    attn_out: str | None  # its output is what attention adds to the residual stream
    mlp_in: str | None  # its input is what the MLP reads
    mlp_out: str | None  # its output is what the MLP adds to the residual stream


_PLAIN = Anatomy("self_attn", "mlp", "mlp")
_SANDWICH = Anatomy("post_attention_layernorm", "mlp", "post_feedforward_layernorm")
_BERT = Anatomy("attention.output.dense", "intermediate", "output.dense")

#: By the configuration's model_type. Models that are not here are read by their structure.
ANATOMY = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "olmo"), _PLAIN),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _PLAIN),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _SANDWICH),
    "gpt2": Anatomy("attn", "mlp", "mlp"),
    "gpt_neox": Anatomy("attention", "mlp", "mlp"),
    "opt": Anatomy("self_attn", "fc1", "fc2"),
    "bloom": Anatomy("self_attention.dense", "mlp", "mlp.dense_4h_to_h"),  # its modules add the stream themselves
    "mpt": Anatomy("attn", "ffn", "ffn.down_proj"),  # likewise
    "bert": _BERT,
    "modernbert": Anatomy("attn", "mlp", "mlp"),
}
#: Read by structure: the first that the layer has. A norm after attention and MLP alike comes before the modules.
_ATTN_OUT = (
    "post_self_attn_layernorm", "attention.output.dense", "self_attn", "attn", "attention", "self_attention",
)  # fmt: skip
_MLPS = (
    ("mlp", "post_mlp_layernorm"), ("intermediate", "output.dense"), ("mlp", "mlp"), ("feed_forward", "feed_forward"),
    ("block_sparse_moe", "block_sparse_moe"), ("ffn", "ffn"), ("fc1", "fc2"),
)  # fmt: skip


def text_config(model: nn.Module) -> Any:
    """Configuration of the model's text part, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's layers: the shallowest ModuleList with `num_hidden_layers` entries.

    Raises HookPointError where there is none.
    """
    num_layers = getattr(text_config(model), "num_hidden_layers", None)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (num_layers is None or len(module) == num_layers)
    ]
    if not found:
        raise HookPointError(f"{type(model).__name__} has no stack of {num_layers} layers; name a module path instead")
    return min(found, key=lambda item: item[0].count("."))


def anatomy(model: nn.Module, layer: nn.Module) -> Anatomy:
    """Where attention and MLP are in `layer`: by the model's type, or by structure where that is unknown or differs."""
    paths = {path for path, _ in layer.named_modules()}
    known = ANATOMY.get(getattr(text_config(model), "model_type", ""))
    if known and {known.attn_out, known.mlp_in, known.mlp_out} <= paths:
        return known
    if {"post_attention_layernorm", "post_feedforward_layernorm", "mlp"} <= paths:
        return _SANDWICH
    mlp_in, mlp_out = next((pair for pair in _MLPS if paths.issuperset(pair)), (None, None))
    return Anatomy(next((path for path in _ATTN_OUT if path in paths), None), mlp_in, mlp_out)


def hook_points(model: nn.Module) -> list[str]:
    """Friendly names of all hook points of the model, in layer order."""
    path, layers = layer_stack(model)
    return [name for n, layer in enumerate(layers) for name in _layer_points(model, f"{path}.{n}", n, layer)]


def resolve(model: nn.Module, name: str) -> HookPoint:
    """Hook point `name`. Raises HookPointError, listing those that exist, where the model has none of that name."""
    match = _FRIENDLY.fullmatch(name)
    if match:
        (path, layers), n = layer_stack(model), int(match[2])
        point = _layer_points(model, f"{path}.{n}", n, layers[n]).get(name) if n < len(layers) else None
    else:
        point = _module_point(model, name)
    if point is None:
        raise HookPointError(_unknown(model, name))
    return point


def resolve_all(model: nn.Module, pattern: str) -> list[HookPoint]:
    """Hook points that a name or glob stands for, in the model's order; none twice.

    A glob's hook points are named in the glob's own style: `layers.*.mlp` gives `layers.0.mlp` and so on.
    Raises HookPointError where there is none.
    """
    if not is_glob(pattern):
        return [resolve(model, pattern)]
    names = matching(pattern, hook_points(model))
    if not names:
        path, at, side = pattern.partition("@")
        for paths in _path_styles(model):
            names = [found + at + side for found in matching(path, paths)]
            if names:
                break
    if not names:
        raise HookPointError(_unknown(model, pattern))
    return [resolve(model, name) for name in names]


def is_glob(name: str) -> bool:
    """Whether a name stands for several: it holds `*`, `?` or `[`."""
    return any(c in name for c in "*?[")


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Those of dotted `names` that a glob matches, in their order."""
    pieces = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    text = "".join(wild.get(p) or (p.replace("[!", "[^") if p.startswith("[") else re.escape(p)) for p in pieces)
    return [name for name in names if re.fullmatch(text, name)]


def _layer_points(model: nn.Module, here: str, n: int, layer: nn.Module) -> dict[str, HookPoint]:
    """Friendly names of layer `n`, whose path is `here`."""
    parts = anatomy(model, layer)
    places = (
        ("resid_pre", "", "in"),
        ("resid_post", "", "out"),
        ("attn_out", parts.attn_out, "out"),
        ("mlp_in", parts.mlp_in, "in"),
        ("mlp_out", parts.mlp_out, "out"),
    )
    points = [HookPoint(f"{k}.{n}", f"{here}.{path}".strip("."), s, n) for k, path, s in places if path is not None]
    return {point.name: point for point in points}


def _module_point(model: nn.Module, name: str) -> HookPoint | None:
    match = _MODULE.fullmatch(name)
    if not match or not match["path"] or (match["side"] == "in" and match["index"]):
        return None
    modules = dict(model.named_modules())
    for prefix in _prefixes(model):
        path = prefix + match["path"]
        if path in modules:
            return HookPoint(name, path, match["side"] or "out", _layer_of(model, path), int(match["index"] or 0))
    return None


def _layer_of(model: nn.Module, path: str) -> int | None:
    try:
        stack, _ = layer_stack(model)
    except HookPointError:
        return None
    inner = re.match(rf"{re.escape(stack)}\.(\d+)(\.|$)", path)
    return int(inner[1]) if inner else None


def _prefixes(model: nn.Module) -> list[str]:
    """What a module path may leave out: nothing, the path of the model without its head, that of the layers' holder."""
    trunk = getattr(model, "base_model", model)
    prefixes = ["", *(f"{path}." for path, module in model.named_modules() if module is trunk and path)]
    try:
        holder = layer_stack(model)[0].rpartition(".")[0]
    except HookPointError:
        return prefixes
    return list(dict.fromkeys([*prefixes, f"{holder}." if holder else ""]))


def _path_styles(model: nn.Module) -> list[list[str]]:
    """All module paths with each of the prefixes left out."""
    paths = [path for path, _ in model.named_modules() if path]
    return [[p.removeprefix(prefix) for p in paths if p.startswith(prefix)] for prefix in _prefixes(model)]


def _unknown(model: nn.Module, name: str) -> str:
    known = hook_points(model)
    path, layers = layer_stack(model)
    kinds = [kind for kind in KINDS if any(k.startswith(f"{kind}.") for k in known)]
    listing = ", ".join(f"{kind}.0 to {kind}.{len(layers) - 1}" for kind in kinds)
    modules = [p for style in _path_styles(model) for p in style]
    close = "" if is_glob(name) else suggestion(name, known) or suggestion(name.partition("@")[0], modules)
    return (
        f'no hook point "{name}" in this {type(model).__name__}{close}'
        f"; it has {listing}, and every module path (such as {path}.0); `saeql hooks MODEL` lists them"
    )
