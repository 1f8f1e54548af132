"""What a direction does to predictions when it is added at its hook point: `h + strength c v`, c the median norm.

Layers before the hook point are run once for all directions (`splice.py`), those after it once a direction and batch of
windows. This is the only place where output labels, their controls and commands get such numbers from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .models import LanguageModel, ModelError
from .progress import OnProgress
from .splice import Splicer

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class WritePlace:
    """Where directions are added: hook points with their widths, in the order of a decoder row's columns, and norms."""

    lm: LanguageModel
    writes: Mapping[str, int]
    median_norms: Mapping[str, float]

    @classmethod
    def of(cls, run: "Run") -> "WritePlace":
        """Where a run's dictionary writes; the model is loaded here.

        Raises ModelError for an encoder, which predicts no next token.
        """
        if not run.language_model.is_causal:
            raise ModelError(
                f"{run.language_model.identity.model_name} is an encoder: it predicts no next token, "
                "so a feature has no effect on one"
            )
        metadata = run.dictionary().metadata["saeql"]
        run.harvest_info.identity.require(run.language_model.identity)
        return cls(run.language_model, metadata["writes"], metadata["median_norms"])

    def offsets(self, direction: torch.Tensor, strength: float) -> dict[str, torch.Tensor]:
        """What is added at each hook point for a direction [d_out]: its part there, `strength` median norms long."""
        out, start = {}, 0
        for name, width in self.writes.items():
            part = direction[start : start + width].float()
            out[name] = strength * self.median_norms[name] * part / part.norm().clamp_min(1e-12)
            start += width
        return out

    def random_directions(self, num: int, seed: int) -> torch.Tensor:
        """[num, d_out] isotropic ones."""
        return torch.randn(num, sum(self.writes.values()), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Effects:
    """What n directions do on W windows, means over the positions after the first."""

    shifts: np.ndarray  # [n, S, W] log probability of each of S token sets as a whole, in nats
    kl: np.ndarray  # [n, W] nats, of the changed predictions from the model's own
    risen: np.ndarray  # [n, m] token ids whose probability rises most, most first
    rise: np.ndarray  # [n, m] by how much


@torch.no_grad()
def direction_effects(
    place: WritePlace,
    directions: torch.Tensor,
    windows: np.ndarray,
    token_sets: Sequence[Sequence[int]],
    *,
    strength: float,
    num_risen: int = 0,
    batch_windows: int = 4,
    on_progress: OnProgress | None = None,
) -> Effects:
    """Effects of adding each of `directions` [n, d_out] (their length does not count) at every position.

    Args: `windows` [W, T] whole windows of token ids; `token_sets`, none of them empty, shift as a whole:
    log sum_w p'(w) - log sum_w p(w). `num_risen` tokens are named for every direction, which needs 4 bytes a direction
    and token of the vocabulary. Raises ValueError at windows of fewer than two tokens.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or (windows < 0).any():
        raise ValueError(f"windows must be [W, T] token ids with T of at least 2, not {list(windows.shape)}")
    lm, n = place.lm, len(directions)
    lm.require_whole("what a feature does to predictions")
    sets = [torch.tensor(list(s), device=lm.device) for s in token_sets]
    shifts = np.zeros((n, len(sets), len(windows)), np.float32)
    kl = np.zeros((n, len(windows)), np.float32)
    risen = torch.zeros(n, 0)
    with Splicer(lm.model, list(place.writes), list(place.writes), lm.device) as splicer:
        for start in range(0, len(windows), batch_windows):
            at = slice(start, start + batch_windows)
            ids = torch.from_numpy(windows[at]).long().to(lm.input_device)
            logits, acts = splicer.run(ids)
            base = _log_probs(logits, lm)  # [B, T - 1, V]
            probs, before = base.exp(), _of_sets(base, sets)
            if num_risen and risen.shape[1] == 0:
                risen = torch.zeros(n, base.shape[-1], device=base.device)
            for i, direction in enumerate(directions):
                offsets = place.offsets(direction, strength)
                new = {name: acts[name] + o.to(acts[name]) for name, o in offsets.items()}
                changed = _log_probs(splicer.again(new), lm)
                shifts[i, :, at] = (_of_sets(changed, sets) - before).mean(-1).cpu().numpy()
                kl[i, at] = (probs * (base - changed)).sum(-1).mean(-1).cpu().numpy()
                if num_risen:
                    risen[i] += (changed.exp_() - probs).sum((0, 1))
                if on_progress is not None:
                    on_progress((start // batch_windows) * n + i + 1, -(-len(windows) // batch_windows) * n)
    rise, tokens = (risen / (len(windows) * (windows.shape[1] - 1))).topk(num_risen)
    return Effects(shifts, kl, tokens.cpu().numpy(), rise.cpu().numpy())


def _log_probs(logits: torch.Tensor, lm: LanguageModel) -> torch.Tensor:
    """[B, T - 1, V] float32: predictions made at positions after the first."""
    return torch.log_softmax(logits[:, 1:].to(lm.device).float(), dim=-1)


def _of_sets(log_probs: torch.Tensor, sets: Sequence[torch.Tensor]) -> torch.Tensor:
    """[S, B, T - 1] log probability of each set of tokens."""
    if not sets:
        return log_probs.new_zeros(0, *log_probs.shape[:2])
    return torch.stack([log_probs[..., s].logsumexp(-1) for s in sets])
