"""The configuration of a harvest."""

from dataclasses import dataclass

from saeql.sae.config import check_above_zero, check_least


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """How text becomes stored activations."""

    context_tokens: int = 128
    """Tokens of one model input."""
    batch_windows: int = 16
    """Windows of one forward pass."""
    windows_per_shard: int = 512
    """Windows after which the shards of all splits are published; a harvest that is killed loses no more than these."""
    max_heldout_document_tokens: int = 2600
    """Tokens taken of one calibration or test document; fewer than of training ones, so that more documents count."""
    max_train_tokens: int | None = None
    """Tokens of the train split that are stored; 0: all. Unset: all, or 1,000,000 (to label from) with train.source = "live"."""  # noqa: E501
    massive_norm_multiple: float = 10.0
    """Rows whose norm exceeds this multiple of the median are left out of training and of statistics."""

    parts: int = 1
    """Parts that the corpus is divided into by rows, each with its share of corpus.max_tokens, for several processes to take in turn."""  # noqa: E501

    def __post_init__(self) -> None:
        check_least(
            self, "harvest", context_tokens=2, batch_windows=1, windows_per_shard=1, max_heldout_document_tokens=1,
            max_train_tokens=0, parts=1,
        )  # fmt: skip
        check_above_zero(self, "harvest", "massive_norm_multiple")
