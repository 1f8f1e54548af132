"""`saeql plan`: memory, disk and time of a configuration before anything runs.

Counts come from the configuration and the model's config.json: bytes from shapes, operations from the model's own
forward pass run on tensors without data. No weights and no text are read. What cannot be counted (a process's own
memory, matmul speed) is measured in a few seconds; the little that is neither is a constant with its source beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from saeql.kernels.launch import fast_matmul_dtype
from saeql.sae.config import ConfigError
from saeql.store.records import SPLITS

from .config import RunConfig
from .corpus import EMBEDDED_TEXT
from .dictionaries import specify
from .footprint import Footprint, start_measuring
from .hardware import Gpu, Machine, gpu, this_machine
from .hook_points import settle
from .models import pick_device
from .outline import ModelOutline, outline
from .plan_cluster import REACHED, Layout, Step, batch_for_efficiency, layouts, step_seconds
from .plan_live import is_live, live_forward_rows
from .plan_terms import CUDA_CONTEXT_BYTES, Rows, Sizes, StageTerms, Term, total
from .sweep import combinations

#: Share of the measured matmul speed that a language model's forward pass reaches on a CPU, by dtype.
CPU_FORWARD = {torch.bfloat16: 0.45, torch.float32: 0.7}
#: Share of a GPU's bfloat16 matmul rate that a forward pass reaches: an assumption.
GPU_FORWARD = 0.4
#: Rate in bytes a second of gathers and of Adam on a CPU for every float32 operation a second that it multiplies at.
CPU_BYTES_PER_FLOP = 0.05
#: What the thresholds of a dictionary that is not trained cost, in matmuls of all train rows with its encoder.
THRESHOLD_PASSES = 3.0
#: Seconds an activation that label and store take, measured.
ACTIVATION_SECONDS = 0.7e-6
#: Seconds to import libraries and load a model, measured.
START_SECONDS = 5.0
_BYTES_PER_TOKEN = 4.3


@dataclass(frozen=True)
class Stage:
    """What one stage needs. Bytes; `device` is empty where the stage runs on the CPU."""

    name: str
    ram: list[Term]
    device: list[Term]
    disk: list[Term]
    tokens: float
    flops: float
    seconds: float

    @property
    def ram_bytes(self) -> float:
        """Peak RAM."""
        return total(self.ram)

    @property
    def device_bytes(self) -> float:
        """Peak GPU memory."""
        return total(self.device)

    @property
    def disk_bytes(self) -> float:
        """Written and kept."""
        return total(self.disk)

    @property
    def tokens_per_second(self) -> float:
        """Rows a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Plan:
    """A whole configuration."""

    stages: list[Stage]
    device: str
    num_dictionaries: int
    disk_bytes: float  # largest at any time
    seconds: float
    warnings: list[str]
    notes: list[str]
    layouts: list[Layout] = field(default_factory=list)
    wanted_batch: dict[str, int | None] = field(default_factory=dict)  # by mesh, for 80 % efficiency

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        stages = [
            {
                **asdict(stage),
                "ram_bytes": stage.ram_bytes,
                "device_bytes": stage.device_bytes,
                "disk_bytes": stage.disk_bytes,
                "tokens_per_second": stage.tokens_per_second,
            }
            for stage in self.stages
        ]
        return {**asdict(self), "stages": stages}

    def stage(self, name: str) -> Stage:
        """A stage by name."""
        return next(stage for stage in self.stages if stage.name == name)


def make_plan(
    config: RunConfig,
    *,
    gpu_name: str | None = None,
    nodes: int = 1,
    gpus_per_node: int = 1,
    folder: Path = Path("runs"),
) -> Plan:
    """Plan `config` for this machine, or for GPUs named in `hardware.GPUS`.

    A configuration with a [sweep] is planned with its sweep, which trains after the run's own dictionary. Raises
    ConfigError, ModelError or HookPointError where the run itself would refuse to start.
    """
    if nodes < 1 or gpus_per_node < 1:
        raise ConfigError(f"--nodes and --gpus-per-node must be at least 1, got {nodes} and {gpus_per_node}")
    config = settle(config)
    card = gpu(gpu_name) if gpu_name else _own_gpu(config)
    rows, notes = _rows(config)
    footprint = start_measuring(
        _config_folder(config), wikipedia=any(s.source == EMBEDDED_TEXT for s in config.corpus.sources)
    )
    seen = _outline(config, card)
    base, machine = footprint(), this_machine(folder)
    own = Sizes.of(specify(config.dictionary, config.model, config.seed), seen.widths)
    sweep = [Sizes.of(spec, seen.widths) for spec in combinations(config)]
    made: list[Layout] = []
    step = _whole_step(config, sweep or [own])
    if gpu_name and nodes * gpus_per_node > 1:
        assert card
        made = layouts(step, card, nodes, gpus_per_node, CUDA_CONTEXT_BYTES)
    terms = StageTerms(config, seen, rows, [own], base, cuda=card is not None, data_ranks=made[0].data if made else 1)
    speed = _Speed(config, seen, rows, machine, card)
    stages = [_stage(name, terms, speed, own) for name in ("harvest", "train", "index", "label", "evaluate", "store")]
    if sweep:
        trained, tested = config.train.num_steps * config.train.batch_tokens, rows.of("test")
        device = terms.train_device(sweep) if card else []
        seconds = START_SECONDS / 2 + speed.train_all(sweep)
        disk = terms.train_disk(sweep)
        stages.append(Stage("train --sweep", terms.train_ram(sweep), device, disk, trained, 0.0, seconds))
        seconds, device = speed.evaluate * (len(sweep) + 1) / 2, terms.evaluate_device() if card else []
        stages.append(Stage("evaluate sweep", terms.evaluate_ram(), device, [], tested, 0.0, seconds))
    disk = sum(stage.disk_bytes for stage in stages) + terms.checkpoint_spare(sweep or [own])
    notes += _notes(base, card, gpu_name)
    wanted: dict[str, int | None] = {}
    if made:
        assert card
        stages = [_on_cluster(stage, made[0], nodes * gpus_per_node, speed) for stage in stages]
        notes.append(f"harvest is shared by {nodes * gpus_per_node} GPUs, training takes the fastest mesh")
        wanted = {f"{m.data} x {m.feature}": batch_for_efficiency(step, card, m, gpus_per_node) for m in made}
    if gpu_name:  # one process a GPU; what a data sheet does not say of the disk is not compared
        assert card
        machine = replace(machine, free_ram_bytes=int(card.node_ram_bytes))
    warnings = _warnings(stages, disk, machine, card, gpus_per_node if gpu_name else 0, made)
    seconds = sum(stage.seconds for stage in stages)
    where = f"{nodes * gpus_per_node} x {card.name}" if card else "cpu"
    return Plan(stages, where, max(1, len(sweep)), disk, seconds, warnings, notes, made, wanted)


def _config_folder(config: RunConfig) -> str:
    from .models import model_folder

    return str(model_folder(config.model)) if config.model.name.startswith("embedded:") else config.model.name


def _own_gpu(config: RunConfig) -> Gpu | None:
    """This machine's GPU where the configuration would use it: its real memory, the rates of the likeliest card."""
    if pick_device(config.model.device).type != "cuda":
        return None
    found = torch.cuda.get_device_properties(0)
    known = next((c for c in ("h200", "h100", "a100") if c in found.name.lower()), "rtx4090")
    return Gpu(**{**asdict(gpu(known)), "name": found.name, "memory_bytes": found.total_memory})


def _outline(config: RunConfig, card: Gpu | None) -> ModelOutline:
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    if config.model.dtype == "auto":
        dtype = torch.bfloat16 if card else fast_matmul_dtype("cpu") or torch.float32
    tokens = config.harvest.context_tokens
    shapes = (config.harvest.batch_windows, tokens), (config.evaluate.batch_windows, tokens)
    return outline(config.model, config.model.hook_points, dtype, *shapes)


def _rows(config: RunConfig) -> tuple[Rows, list[str]]:
    """Windows of every split, and what was assumed to know them."""
    corpus, tokens, notes = config.corpus, config.harvest.context_tokens, []
    wanted = corpus.max_tokens
    if not wanted:
        paths = [Path(source.source).expanduser() for source in corpus.sources]
        if not all(path.exists() for path in paths):
            raise ConfigError("corpus.max_tokens = 0 takes all of the text, whose length is not known: set it to plan")
        files = [p for path in paths for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
        wanted = int(sum(f.stat().st_size for f in files) / _BYTES_PER_TOKEN)
        notes.append(f"corpus.max_tokens = 0: {wanted:,} tokens assumed, {_BYTES_PER_TOKEN} bytes of file each")
    else:
        notes.append(f"the text is assumed to have {wanted:,} tokens (corpus.max_tokens) after all limits a document")
    windows = {s: max(1, int(wanted * share / (tokens - 1))) for s, share in corpus.split_shares().items()}
    assert set(windows) == set(SPLITS)
    text, cap = windows["train"], config.stored_train_tokens
    if cap and text > cap // (tokens - 1):
        windows["train"] = max(1, cap // (tokens - 1))
        notes.append(f"of the train split {cap:,} tokens are stored (harvest.max_train_tokens)")
    return Rows(windows, tokens, text), notes


class _Speed:
    """Seconds of every stage."""

    def __init__(self, config: RunConfig, seen: ModelOutline, rows: Rows, machine: Machine, card: Gpu | None):
        self.config, self.seen, self.rows, self.machine, self.card = config, seen, rows, machine, card

    def _forward(self, flops: float) -> float:
        if self.card:
            return flops / (self.card.bf16_flops * GPU_FORWARD)
        fast = self.seen.dtype == torch.bfloat16 and self.machine.bfloat16_flops
        rate = self.machine.bfloat16_flops if fast else self.machine.float32_flops
        return flops / (rate * CPU_FORWARD[self.seen.dtype])

    @property
    def harvest_flops(self) -> float:
        return self.rows.total * self.seen.harvest.flops / self.seen.harvest.tokens

    @property
    def evaluate_flops(self) -> float:
        windows = min(self.config.evaluate.ce_windows or 10**12, self.rows.windows["test"])
        return 4 * windows * self.rows.context_tokens * self.seen.full.flops / self.seen.full.tokens

    @property
    def harvest(self) -> float:
        return START_SECONDS + self._forward(self.harvest_flops)

    @property
    def evaluate(self) -> float:
        return self._forward(self.evaluate_flops)

    def train_flops(self, s: Sizes) -> float:
        if s.is_fixed:
            return 2.0 * s.d_in * s.d_sae * self.rows.of("train") * THRESHOLD_PASSES
        matmuls = 3 * (s.d_in + s.d_out) if s.is_dense else s.d_in
        return 2.0 * matmuls * s.d_sae * self.config.train.num_steps * self.config.train.batch_tokens

    def train(self, s: Sizes) -> float:
        train = self.config.train
        if s.is_fixed:
            rate = self.card.bf16_flops * REACHED if self.card else self.machine.float32_flops
            return self.train_flops(s) / rate
        if self.card:
            return train.num_steps * step_seconds(_step(self.config, s), self.card)
        moved = s.parameter_bytes / 4 * 28.0
        moved += train.batch_tokens * (40.0 * s.d_sae if s.is_dense else 2 * s.l0 * (s.d_in + s.d_out) * 4)
        low = self.machine.bfloat16_flops if train.matmul_dtype != "float32" and not s.is_dense else 0.0
        seconds = self.train_flops(s) / (low or self.machine.float32_flops)
        return seconds + train.num_steps * moved / (self.machine.float32_flops * CPU_BYTES_PER_FLOP)

    @property
    def live_flops(self) -> float:
        """Of the model, where training runs it."""
        per_row = self.seen.harvest.flops / self.seen.harvest.tokens
        return live_forward_rows(self.config) * per_row if is_live(self.config) else 0.0

    @property
    def live(self) -> float:
        """Of the model's passes while one GPU or this machine trains."""
        return self._forward(self.live_flops)

    def train_all(self, sizes: Sequence[Sizes]) -> float:
        """Of dictionaries that learn from one stream; a GPU runs the model meanwhile."""
        steps = sum(self.train(s) for s in sizes)
        return max(steps, self.live) if self.card else steps + self.live

    def index_flops(self, s: Sizes) -> float:
        return 2.0 * s.d_sae * (self.rows.total * s.d_in + s.d_out * self.seen.vocabulary)

    def index(self, s: Sizes) -> float:
        rate = self.card.bf16_flops * REACHED if self.card else self.machine.float32_flops
        return START_SECONDS + self.index_flops(s) / rate + self.rows.kept * s.l0 * ACTIVATION_SECONDS / 4


def _stage(name: str, terms: StageTerms, speed: _Speed, own: Sizes) -> Stage:
    config, rows, on_card = speed.config, speed.rows, speed.card is not None
    trained = rows.of("train") if own.is_fixed else config.train.num_steps * config.train.batch_tokens
    late = START_SECONDS / 2 + terms.num_activations * ACTIVATION_SECONDS
    table: dict[str, tuple[list[Term], Callable[[], list[Term]], list[Term], float, float, float]] = {
        "harvest": (
            terms.harvest_ram(), terms.harvest_device, terms.activations_disk(), rows.total, speed.harvest_flops,
            speed.harvest,
        ),
        "train": (
            terms.train_ram([own]), lambda: terms.train_device([own]), terms.train_disk([own]), trained,
            speed.train_flops(own) + speed.live_flops, START_SECONDS / 2 + speed.train_all([own]),
        ),
        "index": (
            terms.index_ram(), terms.index_device, terms.evidence_disk(), rows.total, speed.index_flops(own),
            speed.index(own),
        ),
        "label": (terms.label_ram(), list, [], rows.total, 0.0, late),
        "evaluate": (
            terms.evaluate_ram(), terms.evaluate_device, [], rows.of("test"), speed.evaluate_flops,
            START_SECONDS + speed.evaluate,
        ),
        "store": (terms.store_ram(), list, terms.store_disk(), rows.total, 0.0, late),
    }  # fmt: skip
    ram, device, disk, tokens, flops, seconds = table[name]
    return Stage(name, ram, device() if on_card else [], disk, tokens, flops, seconds)


def _on_cluster(stage: Stage, mesh: Layout, num_gpus: int, speed: _Speed) -> Stage:
    """Times of the stages that a cluster shares; the others run on one GPU."""
    if stage.name == "harvest":
        return replace(stage, seconds=START_SECONDS + (stage.seconds - START_SECONDS) / num_gpus)
    if stage.name.startswith("train"):
        model = speed.live / mesh.data  # ranks that share out a dictionary run it on the same rows
        return replace(stage, seconds=max(speed.config.train.num_steps * mesh.step_seconds, model))
    return stage


def _step(config: RunConfig, s: Sizes) -> Step:
    return Step(config.train.batch_tokens, s.d_in, s.d_out, s.d_sae, s.l0, s.is_dense)


def _whole_step(config: RunConfig, sizes: Sequence[Sizes]) -> Step:
    """The step of all dictionaries: as one whose latents are all of theirs."""
    first = sizes[0]
    d_sae, k = sum(s.d_sae for s in sizes), sum(s.l0 for s in sizes)
    return Step(config.train.batch_tokens, first.d_in, first.d_out, d_sae, k, any(s.is_dense for s in sizes))


#: What to change where a stage does not fit, in the order in which it helps.
_WAYS_OUT = {
    "harvest": "lower harvest.windows_per_shard or harvest.batch_windows, or take a smaller model",
    "train": "lower train.shuffle_buffer_bytes, dictionary.d_sae or train.batch_tokens",
    "index": "lower index.batch_tokens or dictionary.d_sae",
    "label": "lower corpus.max_tokens or dictionary.k",
    "evaluate": "lower evaluate.batch_windows or harvest.context_tokens",
    "store": "lower corpus.max_tokens or dictionary.k",
    "evaluate sweep": "lower evaluate.batch_windows or harvest.context_tokens",
    "train --sweep": "take fewer values in [sweep], or lower train.shuffle_buffer_bytes or dictionary.d_sae",
}


def _warnings(
    stages: Sequence[Stage],
    disk: float,
    machine: Machine,
    card: Gpu | None,
    processes: int,
    made: Sequence[Layout],
) -> list[str]:
    """What does not fit, and the setting to change. `processes` of a node share its memory; 0: this machine."""
    found = []
    for stage in stages:
        way = _WAYS_OUT[stage.name]
        shared = processes if processes and stage.name in ("harvest", "train", "train --sweep") else 1
        if stage.ram_bytes * shared > machine.free_ram_bytes:
            here = "a usual node has" if processes else "free are"
            needed = _gb(stage.ram_bytes * shared) + (f" of RAM for {shared} processes" if shared > 1 else " of RAM")
            found.append(f"{stage.name} needs {needed}, {here} {_gb(machine.free_ram_bytes)}: {way}")
        if card and stage.device_bytes > card.memory_bytes:
            way = "lower harvest.batch_windows, or take a GPU with more memory" if stage.name == "harvest" else way
            found.append(
                f"{stage.name} needs {_gb(stage.device_bytes)} on one GPU, {card.name} has "
                f"{_gb(card.memory_bytes)}: {way}"
            )
    if not processes and disk > machine.free_disk_bytes:
        found.append(
            f"the run needs {_gb(disk)} of disk, {_gb(machine.free_disk_bytes)} are free: lower corpus.max_tokens, "
            "harvest fewer hook points, train from the model itself (docs/streaming.md), or choose another folder "
            "with --out"
        )
    for mesh in made:
        if card and mesh.memory_bytes > card.memory_bytes:
            found.append(
                f"mesh {mesh.data} x {mesh.feature} needs {_gb(mesh.memory_bytes)} a GPU, {card.name} has "
                f"{_gb(card.memory_bytes)}: shard over more features, or lower dictionary.d_sae"
            )
    return found


def _notes(base: Footprint, card: Gpu | None, named: str | None) -> list[str]:
    notes = [] if base.measured else ["this system does not say what a process holds: typical values taken"]
    if card:
        notes.append("GPU times are rooflines from the data sheet x an assumed share; not measured on such a card")
    if named:
        notes.append("RAM is compared with a usual node, disk with nothing: the plan is for another machine")
    return notes


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
