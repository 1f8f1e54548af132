"""Index: run a frozen dictionary over every split and write what was found as Parquet evidence.

Activations are stored sparse; statistics, top examples and decile samples are derived from them in the one build of
the feature store. Beside them: the logit lens of every decoder row, and its nearest neighbours.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from saeql.sae.files import saelens_config
from saeql.sae.model import SparseAutoencoder
from saeql.store.evidence import Evidence, PartWriter
from saeql.store.records import LOGIT_EFFECTS, SPLITS

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
    """Rows of text behind one Parquet part of activations."""
    num_logit_effects: int = 10
    """Promoted and suppressed tokens kept for every feature."""
    num_neighbours: int = 10
    """Nearest features kept for every feature."""


@dataclass(frozen=True)
class IndexResult:
    """How often every latent fired on kept rows, by split."""

    fire_counts: dict[str, torch.Tensor]  # [d_sae] each
    num_rows: dict[str, int]


def index_dictionary(
    dictionary: SparseAutoencoder,
    name: str,
    language_model: LanguageModel,
    activations: Path,
    info: HarvestInfo,
    evidence: Evidence,
    config: IndexConfig,
    *,
    reads: tuple[str, ...],
) -> IndexResult:
    """Write the evidence tables activations, logit_effects, neighbours and dictionaries of one dictionary."""
    device = language_model.device
    dictionary = dictionary.to(device)
    counts, rows = {}, {}
    sources = {s: open_source(activations, s, info, reads, config.batch_tokens, device) for s in SPLITS}
    with progress("index", sum(s.num_rows for s in sources.values()), "tok") as advance:
        for split, source in sources.items():
            with _ActivationParts(evidence, name, split, dictionary.d_sae, config.rows_per_part) as writer:
                for batch in source.batches():
                    with torch.no_grad():
                        latents = dictionary.encode(batch.acts.float())
                    writer.add(latents.values.cpu(), latents.indices.cpu(), batch)
                    advance(len(batch.acts))
            counts[split], rows[split] = writer.fire_counts, writer.num_rows
    evidence.write("logit_effects", logit_effects(dictionary, name, language_model, config.num_logit_effects))
    evidence.write("neighbours", neighbours(dictionary, name, config.num_neighbours))
    evidence.write("dictionaries", _dictionary_row(dictionary, name, info, reads))
    return IndexResult(counts, rows)


class _ActivationParts:
    """Collects sparse activations of one split and writes them in parts; `PENDING_ACTIVATIONS` are in memory."""

    def __init__(self, evidence: Evidence, name: str, split: str, d_sae: int, rows_per_part: int):
        self.evidence, self.name, self.split, self.rows_per_part = evidence, name, split, rows_per_part
        self.fire_counts = torch.zeros(d_sae, dtype=torch.int64)
        self.num_rows = 0
        self._tables: list[pa.Table] = []
        self._num_pending = self._part_rows = self._num_parts = 0
        self._part: PartWriter | None = None
        for old in (evidence.folder / "activations").glob(f"{name}-{split}-*.parquet"):
            old.unlink()

    def __enter__(self) -> "_ActivationParts":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._end_part()
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
        self._part_rows += len(values)
        if self._num_pending >= PENDING_ACTIVATIONS:
            self._write_pending()
        if self._part_rows >= self.rows_per_part:
            self._end_part()

    def _write_pending(self) -> None:
        if not self._tables:
            return
        if self._part is None:
            self._part = self.evidence.part("activations", f"{self.name}-{self.split}-{self._num_parts:05d}")
        self._part.add(pa.concat_tables(self._tables))
        self._tables, self._num_pending = [], 0

    def _end_part(self) -> None:
        self._write_pending()
        if self._part is not None:
            self._part.publish()
            self._part, self._part_rows, self._num_parts = None, 0, self._num_parts + 1


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
    lm.require_whole("the logit lens")
    norm, unembed = final_norm(lm.model), lm.model.get_output_embeddings()
    # a crosscoder writes several places of one width side by side; the last of them is nearest to the logits
    (num_tokens, width), dtype = unembed.weight.shape, unembed.weight.dtype
    features = features or range(dictionary.d_sae)
    block = max(1, LENS_LOGITS // num_tokens)
    # new tensors of this size would leave holes in the heap that small ones pin: it grew by 20 MB a block
    room = torch.empty(min(block, len(features)), num_tokens, device=unembed.weight.device)
    narrow = torch.empty_like(room, dtype=dtype) if type(unembed) is torch.nn.Linear and unembed.bias is None else None
    for start in range(features.start, features.stop, block):
        rows = dictionary.W_dec[start : min(start + block, features.stop), -width:]
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
    size = max(1, NEIGHBOUR_COSINES // len(rows))
    for start in range(0, len(rows), size):
        block = rows[start : start + size] @ rows.t()
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
