"""The rows that training reads: what the harvest stored, or the model itself; and what those rows depend on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saeql.sae.config import to_dict
from saeql.sae.stream import ActivationSource

from .harvest import HarvestInfo, open_source
from .live_source import LiveError, LiveSource
from .models import LanguageModel

if TYPE_CHECKING:
    from .config import RunConfig

#: Keys of [harvest] that the rows of a live model do not depend on.
_OF_STORAGE = ("windows_per_shard", "max_train_tokens", "parts")


@contextmanager
def training_stream(
    config: "RunConfig",
    activations: Path,
    info: HarvestInfo,
    widths: Mapping[str, int],
    device: torch.device,
    language_model: Callable[[], LanguageModel],
    *,
    rank: int = 0,
    num_ranks: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[ActivationSource]:
    """The shuffled stream of train rows at the hook points of `widths`; the model is loaded only where it is read.

    Of `num_ranks` processes each gets the part of every batch that is its `rank`'s: of a live model rows of a part of
    the text that no other reads. `should_stop` ends a live stream between two forward passes.
    Raises LiveError where the model is another one than the harvest's.
    """
    train = config.train
    if train.source == "shards":
        yield open_source(
            activations,
            "train",
            info,
            list(widths),
            train.batch_tokens,
            device,
            shuffle_seed=data_seed(config),
            block_rows=train.shuffle_block_rows,
            buffer_bytes=train.shuffle_buffer_bytes,
            rank=rank,
            num_ranks=num_ranks,
        )
        return
    lm = language_model()
    now = {**vars(lm.identity), "dtype": str(lm.model.dtype).removeprefix("torch.")}
    for key, before in {**vars(info.identity), "dtype": info.dtype}.items():
        if key in ("model_sha256", "tokenizer_sha256", "dtype") and before != now[key]:
            raise LiveError(
                f"{activations} was harvested from {info.identity.model_name} with {key} {before[:16]}, the model to "
                f"train from has {now[key][:16]}: put the model back, or `saeql harvest` again"
            )
    with LiveSource(
        lm,
        widths,
        config.corpus,
        config.harvest,
        batch_tokens=train.batch_tokens // num_ranks,
        norm_limits={name: info.norm_limit(name) for name in widths},
        seed=data_seed(config),
        buffer_bytes=train.shuffle_buffer_bytes // num_ranks,
        wanted_rows=train.num_steps * train.batch_tokens // num_ranks,
        device=device,
        part=rank,
        parts=num_ranks,
        should_stop=should_stop,
    ) as source:
        yield source


def data_seed(config: "RunConfig") -> int:
    """Seed of the order of rows: `train.data_seed`, else that of the run."""
    return config.seed if config.train.data_seed is None else config.train.data_seed


def belongs_to(config: "RunConfig", info: HarvestInfo, widths: Mapping[str, int]) -> dict[str, Any]:
    """What the rows of the stream, and their order, depend on beside [train]: a resume must find it the same."""
    facts = {
        "seed": data_seed(config),  # of the order; seeds of initialisation are the dictionaries' own
        "model.name": config.model.name,
        "model.revision": config.model.revision,
        "model_sha256": info.identity.model_sha256,
        "tokenizer_sha256": info.identity.tokenizer_sha256,
        "dtype": info.dtype,
        "hook_points": list(widths),
        "norm_limits": [info.norm_limit(name) for name in widths],
    }
    if config.train.source == "live":
        facts |= {f"corpus.{key}": value for key, value in to_dict(config.corpus).items()}
        harvest = to_dict(config.harvest)
        facts |= {f"harvest.{key}": value for key, value in harvest.items() if key not in _OF_STORAGE}
    return facts
