"""Strict configuration: frozen dataclass default < TOML file < `--section.key value`.

A component's config is a frozen dataclass beside its owner; this file turns mappings into them and holds the two that
belong to training. Nothing here imports torch. Unknown keys and values of the wrong type are errors that name the key.
"""

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

ConfigT = TypeVar("ConfigT")

#: What a dictionary reads and writes: the same place, another place (with or without a linear path beside), several.
#: Where decoder rows start, and what of a dictionary does not learn.
STARTS = ("random", "random_covariance", "neurons", "pca")
FREEZES = ("none", "decoder", "soft_decoder", "encoder", "all")

FORMS = ("autoencoder", "transcoder", "skip_transcoder", "crosscoder")


class ConfigError(ValueError):
    """A configuration names an unknown key or holds a value that does not fit; the message names the key."""


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """Shape and kind of one dictionary."""

    architecture: str = "topk"
    """topk, batchtopk, matryoshka, relu, gated or jumprelu: a file in sae/architectures."""
    form: str = "autoencoder"
    """autoencoder, transcoder, skip_transcoder or crosscoder."""
    reads: tuple[str, ...] = ()
    """Hook points that it reads; unset takes model.hook_point (all harvested ones for a crosscoder)."""
    writes: tuple[str, ...] = ()
    """Hook point that a transcoder predicts; the other forms write what they read."""
    d_sae: int = 4608
    """Number of latents."""
    k: int = 32
    """Latents kept for every row (topk), or on average over a batch (batchtopk); unused by relu, gated and jumprelu."""
    start_from: str = ""
    """Folder of a dictionary of the same kind and size to go on from (fine-tuning); unset starts anew."""
    start: str = "random"
    """Decoder rows at the start: "random" (isotropic Gaussian), "random_covariance" (Gaussian with the activations'
    covariance), "neurons" (single coordinates) or "pca"; the last two have no more than 2 d_in directions."""
    freeze: str = "none"
    """What does not learn: "none", "decoder", "soft_decoder" (rows keep a cosine of 0.8 with their start), "encoder",
    or "all": nothing is trained, and a jumprelu dictionary only gets the thresholds that match firing rates."""
    rates_from: str = ""
    """With freeze = "all": folder of an indexed dictionary whose firing rates are matched; unset: k / d_sae each."""
    sparsity_coefficient: float | None = None
    """Weight of the sparsity penalty of relu, gated and jumprelu, whose inputs have unit variance per coordinate; unset
    takes the architecture's own."""
    sparsity_penalty: str = "l1"
    """Penalty of relu: "l1" (sum z), "tanh" (sum tanh z) or "p_norm" (sum z^p)."""
    p: float = 0.5
    """Exponent of the p_norm penalty."""
    target_l0: float | None = None
    """jumprelu: active latents per row to reach, by the penalty (l0 / target - 1)^2; unset penalises l0 itself."""
    bandwidth: float = 0.5
    """jumprelu: width of the straight-through estimator's window around the threshold."""
    initial_threshold: float | None = None
    """jumprelu: threshold at the start, where inputs have unit variance per coordinate; relu and gated: minus the
    encoder's bias at the start. Unset takes the one at which random latents give the input back once (2.0 at d_sae =
    8 d_in)."""
    matryoshka_shares: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    """matryoshka: nested prefixes of the latents that each reconstruct alone, as shares of d_sae."""
    matryoshka_selection: str = "batchtopk"
    """matryoshka: "batchtopk" or "topk"."""

    def __post_init__(self) -> None:
        _check_choice("dictionary.form", self.form, FORMS)
        _check_choice("dictionary.start", self.start, STARTS)
        _check_choice("dictionary.freeze", self.freeze, FREEZES)
        self._check_fixed()
        _check_choice("dictionary.sparsity_penalty", self.sparsity_penalty, ("l1", "tanh", "p_norm"))
        _check_choice("dictionary.matryoshka_selection", self.matryoshka_selection, ("topk", "batchtopk"))
        shares = self.matryoshka_shares
        if not shares or list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
            raise ConfigError(f"dictionary.matryoshka_shares must rise from above 0 to 1, got {list(shares)}")
        check_above_zero(self, "dictionary", "p", "bandwidth", "initial_threshold", "target_l0")
        check_least(self, "dictionary", d_sae=1, sparsity_coefficient=0)
        if not 1 <= self.k <= self.d_sae:
            raise ConfigError(f"dictionary.k must lie between 1 and d_sae ({self.d_sae}), got {self.k}")

    def _check_fixed(self) -> None:
        if self.freeze == "all" and self.architecture != "jumprelu":
            raise ConfigError(
                'dictionary.freeze = "all" matches firing rates by a threshold for every latent, which only jumprelu '
                f'has: set dictionary.architecture = "jumprelu", not "{self.architecture}"'
            )
        if self.rates_from and self.freeze != "all":
            raise ConfigError('dictionary.rates_from only goes with dictionary.freeze = "all"')
        if self.start != "random" and self.start_from:
            raise ConfigError("dictionary.start and dictionary.start_from both say where to start: set one of them")
        if self.start != "random" and self.form in ("transcoder", "skip_transcoder"):
            raise ConfigError(f'dictionary.start = "{self.start}" needs a form that writes what it reads')


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a dictionary learns. Batches and windows are counted in tokens (rows of activations)."""

    source: str = "shards"
    """"shards": rows that the harvest stored; "live": rows straight from the model, which runs while training does."""
    num_steps: int = 1400
    """Optimizer steps."""
    data_seed: int | None = None
    """Seed of the order of rows; unset takes the run's seed, which then moves both order and initialisation."""
    batch_tokens: int = 1024
    """Rows of one step."""
    lr: float | None = None
    """Peak learning rate of Adam; unset takes 2e-3 / sqrt(d_sae / 4096)."""
    warmup_steps: int = 50
    """Steps of linear warm-up from 0."""
    decay_share: float = 0.3
    """Last share of the steps, over which the learning rate falls linearly to 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    moments_dtype: str = "float32"
    """Adam's moments: "float32", or "bfloat16" for half of their memory (kept rounded, computed in float32)."""
    feature_shards: int = 1
    """Ranks that hold a dictionary's latents together; the other ranks that torchrun starts see other rows."""
    b_dec_init: str = "geometric_median"
    """Start of the decoder bias: "geometric_median" or "mean" of the first rows."""
    init_tokens: int = 8192
    """Rows read for the input scale and the start of b_dec."""
    dead_after_tokens: int = 100_000
    """A latent that fired on none of the last so many rows is dead."""
    auxk_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents (arXiv 2406.04093, appendix A.2); 0 turns it off."""
    resample_every_steps: int = 0
    """relu and gated: steps between two times that dead latents start anew from badly reconstructed rows, up to the
    decay of the learning rate; 0 never."""
    shuffle_block_rows: int = 1024
    """Rows read together from disk: whole blocks are shuffled, then rows inside a group of blocks."""
    shuffle_buffer_bytes: int = 1_000_000_000
    """Memory for the rows that are mixed with each other; of several data ranks each holds its share of it."""
    sparsity_warmup_steps: int = 200
    """Steps over which the penalty of relu, gated and jumprelu rises linearly from 0."""
    max_grad_norm: float | None = None
    """Gradients of a dictionary are scaled down to this norm; unset leaves them."""
    ema_decay: float | None = None
    """Weight averaging: a moving average with this decay is what is saved; unset saves the last weights."""
    max_skipped_share: float = 0.01
    """Batches that are not finite are skipped and counted; more than this share of them ends the run."""
    matmul_dtype: str = "auto"
    """Encoder matmul: "float32", "bfloat16", or "auto" (bfloat16 where the processor has it)."""
    log_every_steps: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every_steps: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the newest; older ones are removed when a new one is complete."""
    rank_timeout_seconds: float = 300.0
    """Several ranks: one that does not answer for so long ends the others. More than writing a checkpoint takes."""

    def __post_init__(self) -> None:
        check_least(
            self, "train", num_steps=1, feature_shards=1, batch_tokens=1, init_tokens=1, shuffle_block_rows=1,
            log_every_steps=1, checkpoint_every_steps=1, keep_checkpoints=1, rank_timeout_seconds=1,
            dead_after_tokens=1, resample_every_steps=0, warmup_steps=0, sparsity_warmup_steps=0, auxk_coefficient=0,
        )  # fmt: skip
        check_above_zero(self, "train", "lr", "max_grad_norm", "shuffle_buffer_bytes")
        if not 0 <= self.decay_share <= 1:
            raise ConfigError(f"train.decay_share must lie between 0 and 1, got {self.decay_share}")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"train.adam_betas must lie between 0 and 1, got {list(self.adam_betas)}")
        if not 0 <= self.max_skipped_share <= 1:
            raise ConfigError(f"train.max_skipped_share must lie between 0 and 1, got {self.max_skipped_share}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay must lie between 0 and 1, got {self.ema_decay}")
        _check_choice("train.source", self.source, ("shards", "live"))
        _check_choice("train.moments_dtype", self.moments_dtype, ("float32", "bfloat16"))
        _check_choice("train.b_dec_init", self.b_dec_init, ("geometric_median", "mean"))
        _check_choice("train.matmul_dtype", self.matmul_dtype, ("auto", "float32", "bfloat16"))

    def peak_lr(self, d_sae: int) -> float:
        """Peak learning rate for a dictionary of `d_sae` latents."""
        return self.lr if self.lr is not None else 2e-3 / (d_sae / 4096) ** 0.5


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}; got {value!r}{suggestion(value, choices)}")


def check_least(config: Any, section: str, **least: float) -> None:
    """Raises ConfigError where a key of `section` ("" for none) is set and below its least value, `num_steps=1`."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(f"{section}{'.' if section else ''}{name} must be at least {low}, got {value}")


def check_above_zero(config: Any, section: str, *names: str) -> None:
    """Raises ConfigError where a key of `section` is set and not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{section}.{name} must be above 0, got {value}")


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean "x"?` where one of `known` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def from_dict(cls: type[ConfigT], data: Mapping[str, Any], where: str = "") -> ConfigT:
    """Dataclass `cls` from nested mappings. Raises ConfigError on unknown keys and wrong types, naming the key."""
    assert dataclasses.is_dataclass(cls)
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in data.items():
        full = f"{where}.{key}" if where else key
        if key not in names:
            place = f"[{where}]" if where else "the configuration"
            raise ConfigError(f'unknown key "{full}": {place} has {", ".join(names)}{suggestion(key, names)}')
        values[key] = _convert(hints[key], value, full)
    for field in dataclasses.fields(cls):
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and field.name not in values:
            raise ConfigError(f'[{where}] needs the key "{field.name}"')
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # a component's own check
        raise ConfigError(f"[{where}] {error}") from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f'"{key}" must be a section of keys, got {value!r}')
        return from_dict(hint, value, key)  # pyright: ignore[reportArgumentType]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        if value is None:
            return None
        fits = (a for a in inner if isinstance(value, get_origin(a) or a) and not isinstance(value, bool))
        return _convert(next(fits, inner[0]), value, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f'"{key}" must be a table, got {value!r}')
        return {str(k): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f'"{key}" must be a list, got {value!r}')
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(hints) != len(value):
            raise ConfigError(f'"{key}" must have {len(hints)} entries, got {len(value)}')
        return tuple(_convert(h, v, key) for h, v in zip(hints, value, strict=True))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f'"{key}" must be a finite number, got {value}')
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f'"{key}" must be {_TYPE_NAMES.get(hint, hint)}, got {value!r}')
    if hint is int and key.endswith("seed") and value < 0:
        raise ConfigError(f'"{key}" must be at least 0, got {value}')
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain mapping of a config; unset (None) keys are left out, since TOML has no null."""
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            result[field.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def load_toml(cls: type[ConfigT], path: str | Path | None, overrides: Mapping[str, str] | None = None) -> ConfigT:
    """Read `cls` from a TOML file with `overrides` (`{"train.lr": "1e-3"}`) laid over it.

    Raises ConfigError where the file is missing, is not TOML, or names an unknown key.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"no configuration file {path}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from None
    _set_keys(data, overrides or {})
    try:
        return from_dict(cls, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path is not None else str(error)) from None


def with_keys(config: ConfigT, overrides: Mapping[str, str]) -> ConfigT:
    """`config` with `overrides` as `load_toml` takes them. Raises ConfigError where it names an unknown key."""
    data = to_dict(config)
    _set_keys(data, overrides)
    return from_dict(type(config), data)


def _set_keys(data: dict[str, Any], overrides: Mapping[str, str]) -> None:
    for dotted, text in overrides.items():
        *sections, key = dotted.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f'unknown key "{dotted}": "{section}" is not a section')
        place[key] = _parse_override(text)


def _parse_override(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
