"""What each stage holds in memory and writes to disk: every term counted from the configuration, or marked as measured.

A term is one number of bytes with the reason for it. Terms that are alive at the same time are added; where a stage has
phases, the largest phase counts (`_largest`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saeql.kernels.topk import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES
from saeql.sae.architectures import architecture

from .config import RunConfig
from .dictionaries import DictionarySpec
from .evaluate import COMPARED_LOGITS
from .footprint import Footprint
from .index import LENS_LOGITS, NEIGHBOUR_COSINES, PENDING_ACTIVATIONS
from .outline import ModelOutline
from .plan_live import is_live, live_buffer_bytes
from .row_buffer import buffered_row_bytes

DENSE = ("relu", "gated", "jumprelu")
#: Dense float32 [N, d_sae] tensors alive at once in a training step of each dense architecture, as measured.
DENSE_TENSORS = {"relu": 2.7, "gated": 6.0, "jumprelu": 2.8}
#: Float32 copies of logits while two predictions are compared.
COMPARED_COPIES = 5
#: Rows of width d in float32 that a sparse training step has alive at once: input, reconstruction, residual.
STEP_ROWS = 3
#: Copies of the first rows while their scale is measured.
INIT_COPIES = 3
#: What the C library's allocator, thread pools and autograd keep beyond what is counted, as measured.
SLACK_BYTES = 25_000_000
#: The allocator keeps freed blocks below its mapping threshold; the same in a process that has loaded a model.
MODEL_SLACK_BYTES = 45_000_000
#: Host memory of a process that has opened CUDA, and what CUDA itself takes of the card; stated, not measured here.
CUDA_HOST_BYTES = 1_500_000_000
CUDA_CONTEXT_BYTES = 600_000_000
#: Bytes in Parquet and in features.duckdb, measured on one model and text.
ACTIVATION_PARQUET_BYTES, WINDOW_PARQUET_BYTES, FEATURE_PARQUET_BYTES, VOCABULARY_PARQUET_BYTES = 6.4, 2.0, 150, 12
STORE_ACTIVATION_BYTES, STORE_FEATURE_BYTES = 13.0, 4800
#: Working memory of labels and fast receipts, measured: per activation, per feature, per token of the vocabulary.
LABEL_ACTIVATION_BYTES, LABEL_FEATURE_BYTES, LABEL_VOCABULARY_BYTES = 36, 20_000, 2_500
#: DuckDB and numpy while they build the store, measured; bounded by memory_limit and the chunks of features.
STORE_BUILD_BYTES, STORE_BUILD_ACTIVATION_BYTES, STORE_MEMORY_LIMIT = 250_000_000, 80, 3_500_000_000
#: The embedded sentence encoder at work: weights, their bfloat16 copies, a batch; measured.
EMBEDDER_BYTES = 200_000_000


@dataclass(frozen=True)
class Term:
    """Bytes, and what they are for."""

    name: str
    num_bytes: float
    why: str


@dataclass(frozen=True)
class Rows:
    """How much text there is, by the configuration."""

    windows: dict[str, int]  # by split
    context_tokens: int
    text_windows: int = 0  # of the train split, stored or not, where training reads the model itself

    @property
    def total(self) -> int:
        """Stored rows of all splits."""
        return sum(self.windows.values()) * self.context_tokens

    def of(self, split: str) -> int:
        """Stored rows of a split."""
        return self.windows[split] * self.context_tokens

    @property
    def kept(self) -> int:
        """Rows after the first of their window, the massive ones (few) counted in."""
        return sum(self.windows.values()) * (self.context_tokens - 1)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one dictionary's parameters, and its shape."""

    spec: DictionarySpec
    d_in: int
    d_out: int
    parameter_bytes: int

    @classmethod
    def of(cls, spec: DictionarySpec, widths: dict[str, int]) -> "Sizes":
        """Counted on the dictionary itself, built without data."""
        d_in, d_out = (sum(widths[name] for name in names) for names in (spec.reads, spec.writes))
        with torch.device("meta"):
            made = architecture(spec.config.architecture)(spec.config, d_in, d_out)
        return cls(spec, d_in, d_out, sum(p.numel() * 4 for p in made.parameters()))

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.spec.config.d_sae

    @property
    def is_fixed(self) -> bool:
        """Whether nothing of it is trained."""
        return self.spec.config.freeze == "all"

    @property
    def learnt_bytes(self) -> int:
        """Parameters that have moments: those that are not frozen."""
        width = {"decoder": self.d_out, "encoder": self.d_in}.get(self.spec.config.freeze, 0)
        return 0 if self.is_fixed else self.parameter_bytes - 4 * self.d_sae * width

    @property
    def start_bytes(self) -> int:
        """Rows that a soft-frozen decoder is kept near."""
        return 4 * self.d_sae * self.d_out if self.spec.config.freeze == "soft_decoder" else 0

    @property
    def is_dense(self) -> bool:
        """Whether a training step has dense pre-activations and gradients."""
        return self.spec.config.architecture in DENSE

    @property
    def l0(self) -> float:
        """Active latents of a row: k, or the wanted l0; 64 where the penalty decides (an assumption)."""
        config = self.spec.config
        if self.is_fixed:
            return float(config.k)
        return float((config.target_l0 or 64) if self.is_dense else config.k)


def total(terms: Sequence[Term]) -> float:
    """Sum of terms."""
    return sum(term.num_bytes for term in terms)


def _largest(*phases: list[Term]) -> list[Term]:
    return max(phases, key=total)


class StageTerms:
    """Memory and disk of every stage of one configuration. `cuda`: model and training are on a GPU. Training is that
    of one rank, of which `data_ranks` see other rows.
    """

    def __init__(
        self,
        config: RunConfig,
        outline: ModelOutline,
        rows: Rows,
        sizes: list[Sizes],
        base: Footprint,
        *,
        cuda: bool,
        data_ranks: int = 1,
    ):
        self.config, self.outline, self.rows, self.sizes, self.base = config, outline, rows, sizes, base
        self.cuda, self.data_ranks = cuda, data_ranks
        self.value_bytes = 2 if outline.dtype == torch.bfloat16 else 4

    # --- pieces --------------------------------------------------------------------------------------------------

    def _process(self, with_model: bool, *, on_gpu: bool = True) -> list[Term]:
        size = self.base.with_model if with_model else self.base.without_model
        source = "measured on this machine" if self.base.measured else "typical"
        terms = [Term("process", size, f"interpreter, torch and libraries, {source}")]
        if self.cuda and on_gpu:
            terms.append(Term("CUDA on the host", CUDA_HOST_BYTES, "stated"))
        return terms

    def _weights(self) -> list[Term]:
        """Weights of the model in memory of its process; those used as they are stored stay mapped from the file."""
        if self.cuda or self.outline.stored_dtype == self.outline.dtype:
            return []
        parameters = self.outline.num_parameters
        return [Term("model weights", self.outline.weight_bytes, f"{parameters:,} parameters, converted when loaded")]

    def _device_model(self) -> list[Term]:
        return [
            Term("CUDA context", CUDA_CONTEXT_BYTES, "stated"),
            Term("model weights", self.outline.weight_bytes, f"{self.outline.num_parameters:,} parameters"),
        ]

    def _acts_bytes(self, sizes: Sequence[Sizes]) -> int:
        names = {name for s in sizes for name in (*s.spec.reads, *s.spec.writes)}
        return sum(self.outline.widths[name] for name in names) * self.value_bytes

    @property
    def num_activations(self) -> float:
        """Stored sparse activations of the run's own dictionary."""
        return self.rows.kept * self.sizes[0].l0

    # --- harvest -------------------------------------------------------------------------------------------------

    def harvest_ram(self) -> list[Term]:
        """Peak RAM of harvest."""
        h, outline = self.config.harvest, self.outline
        window_bytes = h.context_tokens * (sum(outline.widths.values()) * self.value_bytes + 12 * len(outline.widths))
        windows = sum(self.rows.windows.values())
        largest = max(self.rows.windows.values()) / windows  # the split that ends a set
        in_set = min(windows, h.windows_per_shard / largest + h.batch_windows)
        waiting = min(windows - in_set, 2 * in_set if self.cuda else in_set / 8)
        terms = [
            *self._process(with_model=True),
            *self._weights(),
            Term("forward pass", 0 if self.cuda else outline.harvest.live_bytes, "counted on harvest.batch_windows"),
            Term("shards being filled", in_set * window_bytes, "harvest.windows_per_shard, every split and hook point"),
            Term("vocabulary table", 800 * outline.vocabulary, "texts of all tokens"),
            Term("allocator", MODEL_SLACK_BYTES, "measured"),
        ]
        if waiting > 0:
            terms.append(Term("shards being written", waiting * window_bytes, "while the next ones fill"))
        return terms

    def harvest_device(self) -> list[Term]:
        """Peak GPU memory of harvest."""
        return [*self._device_model(), Term("forward pass", self.outline.harvest.live_bytes, "batch_windows")]

    def activations_disk(self) -> list[Term]:
        """Shards."""
        outline, files = self.outline, len(self.outline.widths) * sum(self.rows.windows.values())
        row_bytes = sum(outline.widths.values()) * self.value_bytes + 12 * len(outline.widths)
        widths = " + ".join(map(str, outline.widths.values()))
        why = f"{self.rows.total:,} rows of ({widths}) x {self.value_bytes} + 12 bytes a hook point"
        return [Term("activations", self.rows.total * row_bytes + 4 * files, why)]

    # --- train ---------------------------------------------------------------------------------------------------

    def train_ram(self, sizes: Sequence[Sizes]) -> list[Term]:
        """Peak RAM of training `sizes` together on one stream."""
        live = is_live(self.config)
        terms = [*self._process(with_model=live), *(self._weights() if live else []), self._buffer(sizes)]
        if not self.cuda:  # the model and the dictionaries take turns
            terms += self._training(sizes, *([self._forward_term()],) if live else ())
        elif live:
            staged = 2 * self.outline.harvest.tokens * self._acts_bytes(sizes)
            terms.append(Term("pinned memory", staged, "two forward passes on their way down"))
        return [*terms, Term("allocator", MODEL_SLACK_BYTES if live else SLACK_BYTES, "measured")]

    def _forward_term(self) -> Term:
        return Term("forward pass", self.outline.harvest.live_bytes, "counted on harvest.batch_windows")

    def train_device(self, sizes: Sequence[Sizes]) -> list[Term]:
        """Peak GPU memory of training; `saeql run` still holds the model beside it."""
        forward = [self._forward_term()] if is_live(self.config) else []  # both at once, on a stream each
        return [*self._device_model(), *forward, *self._training(sizes)]

    def _buffer(self, sizes: Sequence[Sizes]) -> Term:
        """Host memory of two groups of rows: batches are taken out of one while the other is read."""
        share = f"1/{self.data_ranks} of " if self.data_ranks > 1 else ""
        if is_live(self.config):
            windows = self.rows.text_windows or self.rows.windows["train"]
            value = live_buffer_bytes(
                self.config, self._acts_bytes(sizes), windows, cuda=self.cuda, data_ranks=self.data_ranks
            )
            return Term("shuffle buffer", value, f"{share}train.shuffle_buffer_bytes, or what is trained on")
        whole = 2 * self.rows.of("train") * buffered_row_bytes(self._acts_bytes(sizes))
        value = min(whole, self.config.train.shuffle_buffer_bytes) / self.data_ranks
        return Term("shuffle buffer", value, f"{share}train.shuffle_buffer_bytes, or twice the split")

    def _training(self, sizes: Sequence[Sizes], *others: list[Term]) -> list[Term]:
        """Weights and moments, and the largest of what comes and goes; `others` do so too."""
        parameters, train = sum(s.parameter_bytes for s in sizes), self.config.train
        columns = self._acts_bytes(sizes) // self.value_bytes
        terms = [
            Term("dictionaries", parameters, f"{len(sizes)} x float32 weights"),
            Term(
                "Adam",
                sum(s.learnt_bytes for s in sizes) * (2 if train.moments_dtype == "float32" else 1),
                f"two {train.moments_dtype} moments a weight that learns",
            ),
        ]
        if any(s.start_bytes for s in sizes):
            terms.append(Term("starts", sum(s.start_bytes for s in sizes), 'dictionary.freeze = "soft_decoder"'))
        if train.ema_decay is not None:
            terms.append(Term("averaged weights", sum(s.learnt_bytes for s in sizes), "train.ema_decay"))
        init = Term("first rows", INIT_COPIES * train.init_tokens * columns * 4, "train.init_tokens for the scaling")
        steps = ([self._step_term(s), self._batch_term(columns)] for s in sizes)
        later = _largest(_largest(*steps), *others)
        if train.matmul_dtype != "float32":  # made in the first step
            kept = sum(s.parameter_bytes / 4 for s in sizes if not s.is_dense)
            later = [Term("bfloat16 encoders", kept, "train.matmul_dtype"), *later]
        return terms + _largest([init], later)

    def _batch_term(self, columns: int) -> Term:
        return Term("batch", self.config.train.batch_tokens * columns * (self.value_bytes + 8), "train.batch_tokens")

    def _step_term(self, s: Sizes) -> Term:
        """Transient memory of one dictionary's step."""
        n, chunk = self.config.train.batch_tokens, GPU_CHUNK_BYTES if self.cuda else CPU_CHUNK_BYTES
        rows = STEP_ROWS * n * max(s.d_in, s.d_out) * 4
        if s.is_dense:
            dense = DENSE_TENSORS[s.spec.config.architecture] * n * s.d_sae * 4
            return Term("step", s.parameter_bytes + dense + rows, f"dense gradients and [{n}, {s.d_sae}] tensors")
        if s.spec.config.architecture == "matryoshka":
            rows *= 1 + len(s.spec.config.matryoshka_shares) / 2
        pre = min(chunk, n * s.d_sae * 4)
        gradients = s.parameter_bytes if s.spec.config.architecture == "matryoshka" else 0  # others never hold them
        why = f"a chunk of [{n}, {s.d_sae}] pre-activations, rows"
        return Term("step", gradients + pre + rows + n * s.spec.config.k * 40, why)

    def train_disk(self, sizes: Sequence[Sizes]) -> list[Term]:
        """Checkpoints and dictionaries."""
        parameters, train = sum(s.parameter_bytes for s in sizes), self.config.train
        copies = 2 if train.ema_decay is None else 3
        saved = sum(s.parameter_bytes + copies * s.learnt_bytes + s.start_bytes + 8 * s.d_sae for s in sizes)
        saved = 0 if all(s.is_fixed for s in sizes) else saved
        kept = min(train.keep_checkpoints, -(-train.num_steps // train.checkpoint_every_steps))
        terms = [
            Term("checkpoints", kept * saved, f"{kept} x weights and moments"),
            Term("dictionaries", parameters + sum(4 * s.d_sae for s in sizes), "float32 weights"),
        ]
        return terms

    def checkpoint_spare(self, sizes: Sequence[Sizes]) -> float:
        """Disk that is free again afterwards: the checkpoint that is written before the oldest is dropped."""
        train = self.config.train
        several = train.num_steps > train.keep_checkpoints * train.checkpoint_every_steps
        return sum(3 * s.parameter_bytes for s in sizes) if several else 0.0

    # --- what follows --------------------------------------------------------------------------------------------

    def index_ram(self) -> list[Term]:
        """Peak RAM of index."""
        terms = [
            *self._process(with_model=True),
            *self._weights(),
            Term("dictionary", self.sizes[0].parameter_bytes, "float32 weights"),
            Term("activations", min(PENDING_ACTIVATIONS, self.num_activations) * 75, "one row group of Parquet"),
            Term("allocator", MODEL_SLACK_BYTES, "measured"),
        ]
        return terms if self.cuda else terms + self._indexing(CPU_CHUNK_BYTES)

    def index_device(self) -> list[Term]:
        """Peak GPU memory of index."""
        dictionary = Term("dictionary", self.sizes[0].parameter_bytes, "float32 weights")
        return [*self._device_model(), dictionary, *self._indexing(GPU_CHUNK_BYTES)]

    def _indexing(self, chunk_bytes: int) -> list[Term]:
        """Encoding keeps its chunk while the logit lens and the neighbours follow."""
        s, n = self.sizes[0], self.config.index.batch_tokens
        encoder = min(chunk_bytes, n * s.d_sae * 4) + 4 * n * s.d_in * 4
        lens_rows = min(s.d_sae, max(1, LENS_LOGITS // self.outline.vocabulary))
        lens = lens_rows * self.outline.vocabulary * (self.value_bytes + 4)
        near = min(NEIGHBOUR_COSINES, s.d_sae**2) * 4 + s.parameter_bytes / 2
        return [
            Term("encoder", encoder, "index.batch_tokens"),
            *_largest(
                [Term("logit lens", lens, "logits of a block of decoder rows")],
                [Term("neighbours", near, "unit decoder rows, and cosines of a block of them")],
            ),
        ]

    def evidence_disk(self) -> list[Term]:
        """Parquet evidence."""
        small = self.sizes[0].d_sae * FEATURE_PARQUET_BYTES + self.outline.vocabulary * VOCABULARY_PARQUET_BYTES
        small += self.rows.total * WINDOW_PARQUET_BYTES
        why = f"{self.num_activations:,.0f} activations x {ACTIVATION_PARQUET_BYTES:g} bytes, measured"
        return [
            Term("evidence", self.num_activations * ACTIVATION_PARQUET_BYTES, why),
            Term("other evidence", small, "windows, vocabulary, logit lens, neighbours, labels"),
        ]

    def label_ram(self) -> list[Term]:
        """Peak RAM of label."""
        small = self.sizes[0].d_sae * LABEL_FEATURE_BYTES + self.outline.vocabulary * LABEL_VOCABULARY_BYTES
        return [
            *self._process(with_model=False, on_gpu=False),
            Term("activations", self.num_activations * LABEL_ACTIVATION_BYTES, "all of one dictionary, measured"),
            Term("candidates, examples, receipts", small, "measured"),
        ]

    def _logits_bytes(self) -> float:
        e, t = self.config.evaluate, self.config.harvest.context_tokens
        one = e.batch_windows * t * self.outline.vocabulary * self.value_bytes
        compared = min(COMPARED_LOGITS[self.cuda], t * self.outline.vocabulary)
        return one + COMPARED_COPIES * compared * 4 + self.outline.full.live_bytes

    def evaluate_ram(self) -> list[Term]:
        """Peak RAM of evaluate."""
        terms = [*self._process(with_model=True), *self._weights(), Term("allocator", MODEL_SLACK_BYTES, "measured")]
        if self.cuda:
            return terms
        return [
            *terms,
            Term("dictionary", self.sizes[0].parameter_bytes, "float32 weights"),
            Term("logits", self._logits_bytes(), "evaluate.batch_windows: with and without the dictionary"),
        ]

    def evaluate_device(self) -> list[Term]:
        """Peak GPU memory of evaluate."""
        dictionary = Term("dictionary", self.sizes[0].parameter_bytes, "float32 weights")
        return [*self._device_model(), dictionary, Term("logits", self._logits_bytes(), "evaluate.batch_windows")]

    def store_ram(self) -> list[Term]:
        """Peak RAM of the store's build."""
        build_bytes = STORE_BUILD_BYTES + STORE_BUILD_ACTIVATION_BYTES * self.num_activations
        terms = [
            *self._process(with_model=False, on_gpu=False),
            Term("DuckDB", min(STORE_MEMORY_LIMIT, build_bytes), "a sort that spills above 2.5 GB; chunks of features"),
        ]
        if self.config.embedder.model != "none":
            terms.append(Term("sentence encoder", EMBEDDER_BYTES, "embedder.model, that of the embedded default"))
        return terms

    def store_disk(self) -> list[Term]:
        """features.duckdb."""
        features = self.sizes[0].d_sae * STORE_FEATURE_BYTES
        why = f"{STORE_ACTIVATION_BYTES:g} bytes an activation, {STORE_FEATURE_BYTES} a feature, measured"
        return [Term("features.duckdb", self.num_activations * STORE_ACTIVATION_BYTES + features, why)]
