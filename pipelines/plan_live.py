"""What training straight from the model takes beyond training from shards: its buffer, and the model's passes."""

from .config import RunConfig
from .live_source import group_sizes
from .row_buffer import buffered_row_bytes


def is_live(config: RunConfig) -> bool:
    """Whether training reads the model itself."""
    return config.train.source == "live"


def live_buffer_bytes(
    config: RunConfig, acts_bytes: int, train_windows: int, *, cuda: bool, data_ranks: int = 1
) -> int:
    """Host memory of one rank's groups, given the bytes of a row's activations and the windows of the train split.

    Raises LiveError where the run itself would: the buffer has no room for a batch.
    """
    train, num_groups = config.train, 2 if cuda else 1
    wanted = train.num_steps * train.batch_tokens // data_ranks
    _, windows = group_sizes(
        config.harvest, acts_bytes, train.batch_tokens // data_ranks, train.shuffle_buffer_bytes // data_ranks,
        num_groups=num_groups, wanted_rows=wanted,
    )  # fmt: skip
    rows = min(windows, train_windows // data_ranks) * config.harvest.context_tokens
    return num_groups * rows * buffered_row_bytes(acts_bytes)


def live_forward_rows(config: RunConfig) -> float:
    """Rows that the model computes for one training: first positions, which do not count, come on top."""
    tokens = config.harvest.context_tokens
    return config.train.num_steps * config.train.batch_tokens * tokens / (tokens - 1)
