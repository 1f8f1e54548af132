"""Which language model is read, where in it, and how it is held in memory."""

from dataclasses import dataclass

from saeql.sae.config import ConfigError, suggestion

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
#: By name: the package that does it, and what transformers' configuration of it is given.
QUANTIZATIONS = {
    "bitsandbytes_8bit": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "torchao_int8": "torchao",
}
RANDOMISED = ("none", "weights", "all")
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


class ModelError(ValueError):
    """A model cannot be found or loaded, or cannot do what is asked of it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is read, and where in it."""

    name: str = EMBEDDED_MODEL
    """Embedded default, local folder, or hub name."""
    revision: str | None = None
    """Hub revision; unset takes the default branch."""
    hook_point: str = "resid_post.15"
    """resid_pre.N, resid_post.N, attn_out.N, mlp_in.N, mlp_out.N, a module path, or a glob of them (`saeql hooks`)."""
    more_hook_points: tuple[str, ...] = ()
    """Further hook points or globs harvested in the same pass, for transcoders, crosscoders and sweeps."""
    dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 on a GPU and on processors with bf16 instructions."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto. With device_map: where activations are gathered and the dictionary works."""
    truncate: bool = False
    """Harvest with the layers after the deepest hook point and the head left out of memory."""
    device_map: str | dict[str, str | int] = ""
    """Spread the model: auto, balanced, sequential, or a table of module path = device ("cpu", "disk", 0)."""
    offload_folder: str | None = None
    """Folder for weights that a device_map puts on "disk" and that cannot stay in the model's own files."""
    quantization: str = ""
    """bitsandbytes_8bit, bitsandbytes_4bit or torchao_int8 on loading; a model stored quantised needs no key."""
    trust_remote_code: str = ""
    """The model's name again, to run the code that comes with it; unset never runs it."""
    randomise: str = "none"
    """A control: "weights" redraws every weight matrix from a normal of its own mean and deviation, embeddings, norms
    and biases kept; "all" redraws embeddings too."""
    randomise_seed: int = 0
    """Seed of those draws."""

    @property
    def hook_points(self) -> tuple[str, ...]:
        """All harvested hook points, the first one first, none twice."""
        return tuple(dict.fromkeys((self.hook_point, *self.more_hook_points)))

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"model.dtype must be one of auto, float32, bfloat16; got {self.dtype!r}")
        if self.randomise not in RANDOMISED:
            raise ConfigError(
                f"model.randomise must be one of {', '.join(RANDOMISED)}; got {self.randomise!r}"
                f"{suggestion(self.randomise, RANDOMISED)}"
            )
        if self.randomise != "none" and (self.quantization or self.device_map):
            raise ConfigError("model.randomise redraws plain weights: leave model.quantization and device_map unset")
        if self.quantization and self.quantization not in QUANTIZATIONS:
            known = tuple(QUANTIZATIONS)
            raise ConfigError(
                f"model.quantization must be one of {', '.join(known)}; got {self.quantization!r}"
                f"{suggestion(self.quantization, known)}"
            )
        if isinstance(self.device_map, str) and self.device_map not in ("", *_DEVICE_MAPS):
            raise ConfigError(
                f"model.device_map must be one of {', '.join(_DEVICE_MAPS)} or a table of module path = device; "
                f"got {self.device_map!r}{suggestion(self.device_map, _DEVICE_MAPS)}"
            )
        if self.trust_remote_code and self.trust_remote_code != self.name:
            raise ConfigError(
                f"model.trust_remote_code must name the model, {self.name!r}, to run the code that comes with it; "
                f"got {self.trust_remote_code!r}"
            )
