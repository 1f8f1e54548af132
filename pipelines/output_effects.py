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
    ce: np.ndarray  # [n, W] nats, rise of the cross-entropy on the window's own tokens; nan without any
    risen: np.ndarray  # [n, m] token ids whose probability rises most, most first
    rise: np.ndarray  # [n, m] by how much


@torch.no_grad()
def direction_effects(
    place: WritePlace,
    directions: torch.Tensor,
    windows: np.ndarray,
    token_sets: Sequence[Sequence[int]],
    *,
    strength: float | Sequence[float],
    num_risen: int = 0,
    batch_windows: int = 4,
    on_progress: OnProgress | None = None,
) -> Effects:
    """Effects of adding each of `directions` [n, d_out] (their length does not count) at every position.

    Args: `windows` [W, T] whole windows of token ids; `token_sets`, none of them empty, shift as a whole:
    log sum_w p'(w) - log sum_w p(w). `strength` is one number or one a direction. `num_risen` tokens are named for
    every direction, which needs 4 bytes a direction and token of the vocabulary. Raises ValueError at windows of fewer
    than two tokens.
    """
    if windows.ndim != 2 or windows.shape[1] < 2 or (windows < 0).any():
        raise ValueError(f"windows must be [W, T] token ids with T of at least 2, not {list(windows.shape)}")
    lm, n = place.lm, len(directions)
    lm.require_whole("what a feature does to predictions")
    strengths = np.broadcast_to(np.asarray(strength, np.float64), (n,)).tolist()
    sets = _TokenSets(token_sets, lm.device)
    shifts = np.zeros((n, len(token_sets), len(windows)), np.float32)
    kl = np.zeros((n, len(windows)), np.float32)
    ce = np.zeros((n, len(windows)), np.float32)
    risen = torch.zeros(n, 0)
    with Splicer(lm.model, list(place.writes), list(place.writes), lm.device) as splicer:
        for start in range(0, len(windows), batch_windows):
            at = slice(start, start + batch_windows)
            ids = torch.from_numpy(windows[at]).long().to(lm.input_device)
            logits, acts = splicer.run(ids)
            own = _Predictions(_log_probs(logits, lm), ids, sets)
            if num_risen and risen.shape[1] == 0:
                risen = torch.zeros(n, own.log_probs.shape[-1], device=lm.device)
            for i, direction in enumerate(directions):
                offsets = place.offsets(direction, strengths[i])
                new = {name: acts[name] + o.to(acts[name]) for name, o in offsets.items()}
                changed = _log_probs(splicer.again(new), lm)
                shifts[i, :, at], kl[i, at], ce[i, at] = own.compared(changed)
                if num_risen:
                    risen[i] += (changed.exp_() - own.probs).sum((0, 1))
                if on_progress is not None:
                    on_progress((start // batch_windows) * n + i + 1, -(-len(windows) // batch_windows) * n)
    rise, tokens = (risen / (len(windows) * (windows.shape[1] - 1))).topk(num_risen)
    return Effects(shifts, kl, ce, tokens.cpu().numpy(), rise.cpu().numpy())


@torch.no_grad()
def prefix_effects(
    lm: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    windows: np.ndarray,
    token_sets: Sequence[Sequence[int]],
    *,
    batch_windows: int = 4,
) -> Effects:
    """The same of token ids put before every window (behind its BOS, where it begins with one): what a prompt does."""
    sets = _TokenSets(token_sets, lm.device)
    n, size = len(prefixes), len(windows)
    shifts, kl = np.zeros((n, len(token_sets), size), np.float32), np.zeros((n, size), np.float32)
    ce = np.zeros((n, size), np.float32)
    for start in range(0, size, batch_windows):
        at = slice(start, start + batch_windows)
        ids = torch.from_numpy(windows[at]).long().to(lm.input_device)
        own = _Predictions(_log_probs(lm.model(input_ids=ids, use_cache=False).logits, lm), ids, sets)
        head = int((windows[:, 0] == lm.bos_id).all())
        for i, prefix in enumerate(prefixes):
            put = torch.tensor(list(prefix), device=ids.device).expand(len(ids), -1)
            longer = torch.cat([ids[:, :head], put, ids[:, head:]], dim=1)
            logits = lm.model(input_ids=longer, use_cache=False).logits[:, -ids.shape[1] :]
            shifts[i, :, at], kl[i, at], ce[i, at] = own.compared(_log_probs(logits, lm))
    none = np.zeros((n, 0))
    return Effects(shifts, kl, ce, none, none)


class _Predictions:
    """A model's own predictions on a batch of windows, and how far others are from them."""

    def __init__(self, log_probs: torch.Tensor, ids: torch.Tensor, sets: "_TokenSets"):
        """`log_probs` [B, T - 1, V] at positions after the first of ids [B, T]."""
        self.log_probs, self.ids, self.sets = log_probs, ids, sets
        self.probs = log_probs.exp()
        self._before, self._losses = sets.of(log_probs), _losses(log_probs, ids)
        self._expected = _expected(self.probs, log_probs)

    def compared(self, changed: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shifts [S, B], KL [B] and rise of the cross-entropy [B], means over positions; nan where none is known."""
        shifts = (self.sets.of(changed) - self._before).mean(-1)
        kl = (self._expected - _expected(self.probs, changed)).mean(-1)
        ce = (_losses(changed, self.ids) - self._losses).mean(-1)
        return shifts.cpu().numpy(), kl.cpu().numpy(), ce.cpu().numpy()


def _log_probs(logits: torch.Tensor, lm: LanguageModel) -> torch.Tensor:
    """[B, T - 1, V] float32: predictions made at positions after the first."""
    return torch.log_softmax(logits[:, 1:].to(lm.device), dim=-1, dtype=torch.float32)


def _expected(probs: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """[B, T - 1] mean of log probabilities [B, T - 1, V] under probabilities of that shape."""
    flat = torch.bmm(probs.flatten(0, 1)[:, None], log_probs.flatten(0, 1)[..., None])
    return flat.view(probs.shape[:2])


def _losses(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[B, T - 2] cross-entropy of predictions [B, T - 1, V] made at positions after the first, where ids go on."""
    targets = ids[:, 2:].to(log_probs.device)
    return -log_probs[:, :-1].gather(-1, targets[..., None])[..., 0]


class _TokenSets:
    """Sets of token ids, read off log probabilities all at once."""

    def __init__(self, sets: Sequence[Sequence[int]], device: torch.device):
        width = max((len(s) for s in sets), default=0)
        self.ids = torch.zeros(len(sets), width, dtype=torch.long, device=device)
        self.absent = torch.zeros(len(sets), width, device=device)  # 0, or -inf where a set has ended
        for row, own in enumerate(sets):
            self.ids[row, : len(own)] = torch.tensor(list(own))
            self.absent[row, len(own) :] = -torch.inf

    def of(self, log_probs: torch.Tensor) -> torch.Tensor:
        """[S, B, T - 1] log probability of each set."""
        if not len(self.ids):
            return log_probs.new_zeros(0, *log_probs.shape[:2])
        found = log_probs[..., self.ids.ravel()].unflatten(-1, self.ids.shape) + self.absent
        return found.logsumexp(-1).movedim(-1, 0)
