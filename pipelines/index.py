"""Index: run a frozen dictionary over every split and write what was found as Parquet evidence.

Activations are stored sparse; statistics, top examples and decile samples are derived from them in the one build of
the feature store. Beside them: the logit lens of every decoder row, and its nearest neighbours.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from saeql.sae.config import check_least
from saeql.sae.files import saelens_config
from saeql.sae.model import SparseAutoencoder
from saeql.store.evidence import Evidence, PartWriter
from saeql.store.records import LOGIT_EFFECTS, SPLITS, TABLES

from .harvest import HarvestInfo, open_source
from .models import LanguageModel
from .progress import progress

#: Activations that wait in memory for the next row group.
PENDING_ACTIVATIONS = 2**18
#: Logits of the logit lens in memory at once.
LENS_LOGITS = 2**23
#: Cosines between decoder rows in memory at once.
NEIGHBOUR_COSINES = 2**23

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How evidence is gathered."""

    batch_tokens: int = 4096
    """Rows encoded at once."""
    rows_per_part: int = 1_000_000
    """Rows of text behind one Parquet part of activations, which is what `saeql index --join` shares out."""
    num_logit_effects: int = 10
    """Promoted and suppressed tokens kept for every feature."""
    num_neighbours: int = 10
    """Nearest features kept for every feature."""

    def __post_init__(self):
        check_least(self, "index", batch_tokens=1, rows_per_part=1, num_logit_effects=1, num_neighbours=1)


@dataclass(frozen=True)
class IndexResult:
    """How often every latent fired on kept rows, by split."""

    fire_counts: dict[str, torch.Tensor]  # [d_sae] each
    num_rows: dict[str, int]

    @classmethod
    def of(cls, counts: Iterable[tuple["IndexUnit", "UnitCounts"]], d_sae: int) -> "IndexResult":
        """The sum over all units."""
        result = cls({s: torch.zeros(d_sae, dtype=torch.int64) for s in SPLITS}, dict.fromkeys(SPLITS, 0))
        for unit, found in counts:
            result.fire_counts[unit.split] += found.fire_counts
            result.num_rows[unit.split] += found.num_rows
        return result

    @property
    def density(self) -> torch.Tensor:
        """Share of the training rows on which every latent fired, [d_sae]."""
        return self.fire_counts["train"] / self.num_rows["train"]


@dataclass(frozen=True)
class IndexUnit:
    """Stored rows of a split whose activations are one Parquet part."""

    split: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        """Name among all units of a dictionary."""
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class UnitCounts:
    """What was found in the rows of one unit."""

    fire_counts: torch.Tensor  # [d_sae]
    num_rows: int  # kept ones
    has_part: bool  # not where all rows are left out


class Indexer:
    """A dictionary and the stored activations it reads: their evidence, unit by unit."""

    def __init__(
        self,
        dictionary: SparseAutoencoder,
        name: str,
        language_model: LanguageModel,
        activations: Path,
        info: HarvestInfo,
        config: IndexConfig,
        *,
        reads: tuple[str, ...],
    ):
        self.dictionary, self.name, self.lm = dictionary.to(language_model.device), name, language_model
        self.info, self.config, self.reads = info, config, reads
        self._sources = {
            s: open_source(activations, s, info, reads, config.batch_tokens, language_model.device) for s in SPLITS
        }

    @property
    def num_rows(self) -> int:
        """Stored rows of all splits."""
        return sum(source.num_rows for source in self._sources.values())

    def units(self) -> list[IndexUnit]:
        """All rows, in order. Units end where batches do, so that whoever encodes one does so in the same batches."""
        size = max(1, self.config.rows_per_part // self.config.batch_tokens) * self.config.batch_tokens
        return [
            IndexUnit(split, number, range(start, min(start + size, source.num_rows)))
            for split, source in self._sources.items()
            for number, start in enumerate(range(0, source.num_rows, size))
        ]

    def part(self, unit: IndexUnit) -> str:
        """Name of a unit's part file of the table `activations`."""
        return f"{self.name}-{unit.name}"

    def old_parts(self, evidence: Evidence) -> list[Path]:
        """Part files of this dictionary that are there."""
        folder = evidence.folder / "activations"
        return [path for split in SPLITS for path in folder.glob(f"{self.name}-{split}-*.parquet")]

    def write_activations(self, unit: IndexUnit, part: Path, advance: Callable[[int], None]) -> UnitCounts:
        """Write the activations of a unit to the file `part`, whose folder is there; no file where no row is kept."""
        with _ActivationPart(part, self.name, unit.split, self.dictionary.d_sae) as writer:
            for batch in self._sources[unit.split].in_order(unit.rows):
                with torch.no_grad():
                    latents = self.dictionary.encode(batch.acts.float())
                writer.add(latents.values.cpu(), latents.indices.cpu(), batch)
                advance(len(batch.acts))
        return UnitCounts(writer.fire_counts, writer.num_rows, writer.has_part)

    def write_tables(self, evidence: Evidence) -> None:
        """Write what is derived from the dictionary alone: logit_effects, neighbours and dictionaries."""
        config = self.config
        effects = logit_effects(self.dictionary, self.name, self.lm, config.num_logit_effects)
        evidence.write("logit_effects", effects)
        evidence.write("neighbours", neighbours(self.dictionary, self.name, config.num_neighbours))
        evidence.write("dictionaries", _dictionary_row(self.dictionary, self.name, self.info, self.reads))

    def write(self, evidence: Evidence) -> IndexResult:
        """Write the evidence tables activations, logit_effects, neighbours and dictionaries, all by this process."""
        for old in self.old_parts(evidence):
            old.unlink()
        (evidence.folder / "activations").mkdir(parents=True, exist_ok=True)
        with progress("index", self.num_rows, "tok") as advance:
            result = IndexResult.of(
                (
                    (unit, self.write_activations(unit, evidence.path("activations", self.part(unit)), advance))
                    for unit in self.units()
                ),
                self.dictionary.d_sae,
            )
        self.write_tables(evidence)
        return result


class _ActivationPart:
    """Collects sparse activations of one unit and writes them; `PENDING_ACTIVATIONS` are in memory."""

    def __init__(self, path: Path, name: str, split: str, d_sae: int):
        self.path, self.name, self.split = path, name, split
        self.fire_counts = torch.zeros(d_sae, dtype=torch.int64)
        self.num_rows = 0
        self._tables: list[pa.Table] = []
        self._num_pending = 0
        self._part: PartWriter | None = None

    @property
    def has_part(self) -> bool:
        return self._part is not None

    def __enter__(self) -> "_ActivationPart":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._write_pending()
            if self._part is not None:
                self._part.publish()
        elif self._part is not None:
            self._part.discard()

    def add(self, values: torch.Tensor, indices: torch.Tensor, batch: Any) -> None:
        """Rows [N] with their latents [N, k]; zeros are not stored."""
        active = values > 0
        row = active.nonzero()[:, 0]
        feature = indices[active].to(torch.int32)
        self.fire_counts += torch.bincount(feature.long(), minlength=len(self.fire_counts))
        count = len(feature)
        self._tables.append(
            pa.table(
                {
                    "dictionary": _repeated(self.name, count),
                    "split": _repeated(self.split, count),
                    "feature": feature.numpy(),
                    "window_id": batch.window_ids[row].numpy(),
                    "position": batch.positions[row].numpy(),
                    "token_id": batch.token_ids[row].numpy(),
                    "activation": values[active].float().numpy(),
                }
            )
        )
        self.num_rows += len(values)
        self._num_pending += count
        if self._num_pending >= PENDING_ACTIVATIONS:
            self._write_pending()

    def _write_pending(self) -> None:
        if not self._tables:
            return
        if self._part is None:
            self._part = PartWriter(self.path, TABLES["activations"])
        self._part.add(pa.concat_tables(self._tables))
        self._tables, self._num_pending = [], 0


def _repeated(text: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array([text]))


@torch.no_grad()
def logit_effects(dictionary: SparseAutoencoder, name: str, lm: LanguageModel, num_tokens: int) -> pa.Table:
    """The tokens whose logits `W_U norm(d)` are highest and lowest for every decoder row d (the logit lens).

    `norm` is the model's own final norm: what a feature writes passes through it on its way to the logits.
    Empty for an encoder: what follows its layers is not one matrix.
    """
    if not lm.is_causal:
        return LOGIT_EFFECTS.empty_table()
    columns: dict[str, list[np.ndarray]] = {"feature": [], "token_id": [], "effect": [], "rank": [], "direction": []}
    for start, logits in lens_logits(dictionary, lm):
        for direction, largest in (("promoted", True), ("suppressed", False)):
            effect, token = logits.topk(num_tokens, largest=largest)
            columns["feature"].append(np.repeat(np.arange(start, start + len(logits)), num_tokens))
            columns["token_id"].append(token.cpu().numpy().ravel())
            columns["effect"].append(effect.cpu().numpy().ravel())
            columns["rank"].append(np.tile(np.arange(num_tokens), len(logits)))
            columns["direction"].append(np.full(len(logits) * num_tokens, direction))
    arrays = {key: np.concatenate(parts) for key, parts in columns.items()}
    return pa.table({"dictionary": _repeated(name, len(arrays["feature"])), **arrays})


@torch.no_grad()
def lens_logits(
    dictionary: SparseAutoencoder, lm: LanguageModel, features: range | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """`W_U norm(d)` of decoder rows, block by block: the first feature of a block, and logits [block, tokens].

    The logits are overwritten by the next block. Raises ModelError for a model that was loaded without its last layers.
    """
    features = features or range(dictionary.d_sae)
    for start, logits in direction_logits(dictionary.W_dec[features.start : features.stop], lm):
        yield features.start + start, logits


@torch.no_grad()
def direction_logits(directions: torch.Tensor, lm: LanguageModel) -> Iterator[tuple[int, torch.Tensor]]:
    """The same of any directions [n, d]; of a wider one its last columns, as many as the residual stream has."""
    lm.require_whole("the logit lens")
    norm, unembed = final_norm(lm.model), lm.model.get_output_embeddings()
    # a crosscoder writes several places of one width side by side; the last of them is nearest to the logits
    (num_tokens, width), dtype = unembed.weight.shape, unembed.weight.dtype
    block = max(1, LENS_LOGITS // num_tokens)
    # new tensors of this size would leave holes in the heap that small ones pin: it grew by 20 MB a block
    room = torch.empty(min(block, len(directions)), num_tokens, device=unembed.weight.device)
    narrow = torch.empty_like(room, dtype=dtype) if type(unembed) is torch.nn.Linear and unembed.bias is None else None
    for start in range(0, len(directions), block):
        rows = directions[start : start + block, -width:].to(unembed.weight.device)
        normed, logits = norm(rows.to(dtype)[None])[0], room[: len(rows)]
        if narrow is None:
            logits.copy_(unembed(normed[None])[0])
        else:
            logits.copy_(torch.mm(normed, unembed.weight.t(), out=narrow[: len(rows)]))
        yield start, logits


def final_norm(model: Any) -> torch.nn.Module:
    """The norm between the last layer and the unembedding; identity where the model has none."""
    trunk = getattr(model, "base_model", model)
    trunk = getattr(trunk, "decoder", trunk)
    children = dict(trunk.named_children())
    return next((children[name] for name in _FINAL_NORMS if name in children), torch.nn.Identity())


@torch.no_grad()
def neighbours(dictionary: SparseAutoencoder, name: str, num: int) -> pa.Table:
    """The features whose decoder rows have the highest cosine with each feature's, itself left out."""
    rows = torch.nn.functional.normalize(dictionary.W_dec, dim=1)
    num = min(num, len(rows) - 1)
    cosines, others = [], []
    size = min(len(rows), max(1, NEIGHBOUR_COSINES // len(rows)))
    room = rows.new_empty(size, len(rows))  # a new tensor a block would have two of them in memory
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        block = torch.mm(some, rows.t(), out=room[: len(some)])
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = -2
        cosine, other = block.topk(num)
        cosines.append(cosine.cpu())
        others.append(other.cpu())
    count = len(rows) * num
    return pa.table(
        {
            "dictionary": _repeated(name, count),
            "feature": np.repeat(np.arange(len(rows), dtype=np.int32), num),
            "rank": np.tile(np.arange(num, dtype=np.int16), len(rows)),
            "neighbour": torch.cat(others).numpy().ravel().astype(np.int32),
            "cosine": torch.cat(cosines).numpy().ravel(),
        }
    )


def _dictionary_row(dictionary: SparseAutoencoder, name: str, info: HarvestInfo, reads: tuple[str, ...]) -> pa.Table:
    identity = info.identity.at(reads)
    return pa.Table.from_pylist(
        [
            {
                "dictionary": name,
                "architecture": dictionary.architecture,
                "model_name": identity.model_name,
                "model_sha256": identity.model_sha256,
                "tokenizer_sha256": identity.tokenizer_sha256,
                "hook_point": identity.hook_point,
                "d_in": dictionary.d_in,
                "d_sae": dictionary.d_sae,
                "k": dictionary.config.k,
                "config": json.dumps(saelens_config(dictionary)),
            }
        ]
    )
