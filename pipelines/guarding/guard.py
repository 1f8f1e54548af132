"""What a guard is: features with thresholds, on which dictionary, and what was found about them; as a JSON file.

A feature fires where its activation, averaged over the last `window` tokens (those before the text count as 0), is
above its threshold. The first token of a text, its BOS, is not watched.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saeql.sae.model import SparseAutoencoder

from ..atomic import write_whole

if TYPE_CHECKING:
    from ..steering.steerer import Steerer
    from .watch import OnEvent, Watch

FORMAT = "saeql-guard-1"


class GuardError(ValueError):
    """A guard cannot be learned from these texts, read from this file, or used with this model."""


@dataclass(frozen=True)
class Watched:
    """One feature and the activation above which it fires."""

    feature: int
    label: str
    threshold: float
    auroc: float
    """P(a bad text of the learning part has a larger value than a good one), ties counted half."""


@dataclass(frozen=True)
class Guard:
    """Features to watch. `with guard.watching(steerer) as watch: ...` fills `watch.events`."""

    features: tuple[Watched, ...]
    window: int
    """Tokens that a value is averaged over; 1: every token by itself."""
    model_name: str
    model_sha256: str
    dictionary: str
    rows_sha256: str
    """Of the features' encoder rows: a guard works on the dictionary that it was learned with."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """Rates on texts that nothing was learned from, and those of the baselines."""

    @property
    def ids(self) -> list[int]:
        """The watched features."""
        return [watched.feature for watched in self.features]

    def save(self, path: Path) -> Path:
        """Write the guard as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Guard":
        """Read what `save` wrote. Raises GuardError."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record.pop("format", None) != FORMAT:
                raise GuardError(f"{path} is no guard: `saeql guard learn` makes one")
            record["features"] = tuple(Watched(**watched) for watched in record["features"])
            guard = cls(**record)
            if not guard.features or guard.window < 1:
                raise GuardError(f"{path}: a guard has a feature and a window of at least 1 token")
        except OSError as error:
            raise GuardError(f"{path} cannot be read: {error.strerror}") from None
        except GuardError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError):
            raise GuardError(f"{path} is no guard, or a damaged one: `saeql guard learn` makes one") from None
        return guard

    def require(self, dictionary: SparseAutoencoder, model_sha256: str) -> None:
        """Raise GuardError unless this model and dictionary are those that the guard was learned with."""
        if model_sha256 != self.model_sha256:
            raise GuardError(f"the guard was learned with {self.model_name}, whose weights are not this model's")
        outside = next((f for f in self.ids if not 0 <= f < dictionary.d_sae), None)
        if outside is not None or rows_sha256(dictionary, self.ids) != self.rows_sha256:
            raise GuardError(
                f"the guard was learned with another dictionary than this one ({self.dictionary}): learn it anew"
            )

    def watching(
        self, steerer: "Steerer", action: str = "log", *, to: float | None = None, on_event: "OnEvent | None" = None
    ) -> "AbstractContextManager[Watch]":
        """Watch every forward pass of the steerer's model inside the block; see `watch.watching`."""
        from .watch import watching

        return watching(self, steerer, action, to=to, on_event=on_event)


def rows_sha256(dictionary: SparseAutoencoder, features: Sequence[int]) -> str:
    """Hash of features' encoder rows and biases, in float32."""
    rows = dictionary.W_enc[list(features)].detach().float().cpu()
    biases = dictionary.b_enc[list(features)].detach().float().cpu()
    return hashlib.sha256(rows.contiguous().numpy().tobytes() + biases.contiguous().numpy().tobytes()).hexdigest()


def window_means(values: torch.Tensor, window: int) -> torch.Tensor:
    """Mean over the `window` tokens that end at each one: [B, window - 1 + T, F] -> [B, T, F]."""
    if window == 1:
        return values
    return torch.nn.functional.avg_pool1d(values.transpose(1, 2), window, 1).transpose(1, 2)
