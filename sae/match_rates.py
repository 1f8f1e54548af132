"""Thresholds at which the latents of a dictionary fire as often as asked: quantiles of a stream, in bounded memory.

A sample of the rows brackets every latent's threshold; a pass over all rows counts what lies in the bracket, in bins,
and above it. Where the count shows that a bracket missed, the latents concerned get another bracket and another pass.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from .architectures.jumprelu import JumpReluAutoencoder

#: Rows that bracket the thresholds, and bins of a bracket.
SAMPLE_ROWS, NUM_BINS = 8192, 128
#: Most rows of the bin that a threshold is in, as a share of those that fire: what the rate may be off by.
BIN_SHARE = 0.02
#: Pre-activations in memory at once.
CHUNK_ELEMENTS = 2**23
_MOST_PASSES = 12
#: Pre-activations that differ by less, as a share of the largest, are equal in float32.
_ALIKE = 1e-6
#: Threshold of a latent that has to fire on negative pre-activations too: its bias lifts them above it.
_LIFTED = 1e-3


class RateError(ValueError):
    """The firing rates asked for cannot be had."""


Batches = Callable[[], Iterable[torch.Tensor]]


class Work(Protocol):
    """Where a fit keeps how far it is, so that one that was interrupted goes on."""

    def load(self) -> dict[str, torch.Tensor] | None:
        """What was saved last; None where nothing was."""
        ...

    def is_due(self) -> bool:
        """Whether it is time to save. Asked after every batch."""
        ...

    def save(self, state: dict[str, torch.Tensor]) -> None:
        """Keep `state`, whole or not at all. May raise, to end the fit there."""
        ...


@dataclass
class _State:
    """How far a fit is: brackets and thresholds, and what the running pass has counted so far."""

    low: torch.Tensor  # [d_sae]
    high: torch.Tensor  # [d_sae]
    threshold: torch.Tensor  # [d_sae]
    todo: torch.Tensor  # [m] latents without a threshold
    passes: torch.Tensor  # [] passes done
    batches: torch.Tensor  # [] batches of the running pass that are counted
    seen: torch.Tensor  # [] rows of them
    bins: torch.Tensor  # [m * (NUM_BINS + 1)]
    largest: torch.Tensor  # [m]

    def begin_pass(self) -> None:
        """Nothing is counted yet."""
        m = len(self.todo)
        self.batches, self.seen = torch.tensor(0), torch.tensor(0)
        self.bins = torch.zeros(m * (NUM_BINS + 1), dtype=torch.int32)
        self.largest = torch.full((m,), -math.inf)


@torch.no_grad()
def match_rates(
    dictionary: JumpReluAutoencoder, rates: torch.Tensor, batches: Batches, num_rows: int, work: Work | None = None
) -> None:
    """Set threshold (and bias) of every latent so that latent i fires on a share `rates[i]` of the rows.

    `batches()` gives all rows once, as [n, d_in] in the space that the dictionary reads; `num_rows` is about their
    number. A rate of 0 gives a threshold above every row. Rates are off by at most `BIN_SHARE` of themselves, or a row,
    or as many rows as are equal. With `work` a fit goes on where it was interrupted, to the same thresholds.
    Raises ValueError for rates that are no shares, RateError for rows that are not finite.
    """
    dictionary.b_enc.zero_()
    wanted = rates.to(torch.float64).cpu()
    if len(wanted) != dictionary.d_sae or float(wanted.min()) < 0 or float(wanted.max()) > 1:
        raise ValueError(f"rates: expected {dictionary.d_sae} shares between 0 and 1")
    saved = work.load() if work else None
    if saved is not None:
        state = _State(**saved)
    else:
        low, high = _brackets(dictionary, wanted, batches, num_rows)
        nothing = torch.zeros(0)
        state = _State(
            low, high, torch.zeros_like(wanted), torch.arange(dictionary.d_sae), torch.tensor(0),
            batches=nothing, seen=nothing, bins=nothing, largest=nothing,
        )  # fmt: skip
        state.begin_pass()
    while len(state.todo):
        if int(state.passes) == _MOST_PASSES:
            raise RateError(f"no threshold makes {len(state.todo)} latents fire at their rates: are all rows finite?")
        _count(dictionary, state, batches, work)
        low, high, todo = state.low[state.todo], state.high[state.todo], state.todo
        bins = state.bins.view(len(todo), NUM_BINS + 1)
        bracket = _Bracket(bins, state.largest.double(), wanted[todo] * int(state.seen), low, high)
        found, at = bracket.thresholds()
        state.threshold[todo[found]] = at[found]
        state.low[todo], state.high[todo] = bracket.moved()
        state.todo, state.passes = todo[~found], state.passes + 1
        state.begin_pass()
    threshold = state.threshold
    needs_lift = threshold < _LIFTED
    dictionary.b_enc.copy_(torch.where(needs_lift, _LIFTED - threshold, 0.0))
    dictionary.log_threshold.copy_(torch.where(needs_lift, _LIFTED, threshold).log())


def _pre_acts(dictionary: JumpReluAutoencoder, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """[n, m] of rows x [n, d_in] and latents [m], before biases, float32 on the host."""
    b_dec = dictionary.encoder_b_dec
    W_enc = dictionary.W_enc[latents.to(x.device)]
    return ((x if b_dec is None else x - b_dec) @ W_enc.T).cpu()


def _brackets(
    dictionary: JumpReluAutoencoder, rates: torch.Tensor, batches: Batches, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Below and above which the thresholds hardly lie, [d_sae] each, from every so many-th row."""
    stride, rest = max(1, num_rows // SAMPLE_ROWS), 0
    kept = []
    for rows in batches():
        kept.append(rows[rest::stride].clone())
        rest = (rest - len(rows)) % stride
    sample, d_sae = torch.cat(kept), dictionary.d_sae
    n = len(sample)
    low, high = torch.empty(d_sae, dtype=torch.float64), torch.empty(d_sae, dtype=torch.float64)
    for latents in torch.arange(d_sae).split(max(1, CHUNK_ELEMENTS // n)):
        ordered = _pre_acts(dictionary, sample, latents).double().sort(0, descending=True).values  # [n, m]
        expected = rates[latents] * n
        spread = 3 * expected.sqrt() + 4
        below = (2 * expected + spread).long().clamp(max=n - 1)
        above = (expected / 2 - spread).long()
        low[latents] = ordered.gather(0, below[None])[0] - 1e-6
        top = 2 * ordered[0] - low[latents] + 1e-6  # beyond the sample's largest
        high[latents] = torch.where(above > 0, ordered.gather(0, above.clamp(min=0)[None])[0], top)
    return low, torch.maximum(high, low + 1e-6)


def _count(dictionary: JumpReluAutoencoder, state: _State, batches: Batches, work: Work | None) -> None:
    """Finish the running pass: pre-activations above `low` by bin, the last one for those above `high`; the largest."""
    latents, m = state.todo, len(state.todo)
    low, high = state.low[latents], state.high[latents]
    floor, per_bin = low.float(), (NUM_BINS / (high - low)).float()
    for number, rows in enumerate(batches()):
        if number < int(state.batches):
            continue  # counted before the interruption
        for part in rows.split(max(1, CHUNK_ELEMENTS // m)):
            pre = _pre_acts(dictionary, part, latents)
            state.largest = torch.maximum(state.largest, pre.amax(0))
            row, latent = (pre > floor).nonzero(as_tuple=True)
            place = ((pre[row, latent] - floor[latent]) * per_bin[latent]).long().clamp_(0, NUM_BINS)
            place += latent * (NUM_BINS + 1)
            state.bins.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
        state.seen, state.batches = state.seen + len(rows), torch.tensor(number + 1)
        if work is not None and work.is_due():
            work.save(vars(state))


@dataclass(frozen=True)
class _Bracket:
    """What was counted of m latents in their brackets, and how many rows each is to fire on."""

    bins: torch.Tensor  # [m, NUM_BINS + 1]
    largest: torch.Tensor  # [m]
    wanted: torch.Tensor  # [m]
    low: torch.Tensor  # [m]
    high: torch.Tensor  # [m]

    @cached_property
    def above(self) -> torch.Tensor:
        """[m, NUM_BINS + 1]: rows from a bin up."""
        return self.bins.flip(1).cumsum(1).flip(1).double()

    @cached_property
    def at(self) -> torch.Tensor:
        """[m]: the highest bin from which up there are enough rows."""
        return (self.above >= self.wanted[:, None]).sum(1).sub(1).clamp(0, NUM_BINS - 1)

    @property
    def inside(self) -> torch.Tensor:
        """[m]: rows in that bin."""
        return self.bins.gather(1, self.at[:, None])[:, 0].double()

    def thresholds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which latents have their threshold, exact but for the rows of its bin, and where it is."""
        silent = self.wanted < 0.5  # of a row
        is_in = (self.above[:, 0] >= self.wanted) & (self.above[:, -1] < self.wanted)
        is_fine = self.inside <= (BIN_SHARE * self.wanted).clamp_min(1)
        is_fine |= (self.high - self.low) / NUM_BINS <= _ALIKE * self.largest.abs()  # equal rows cannot be told apart
        upper = self.above.gather(1, (self.at + 1)[:, None])[:, 0]
        share = ((self.wanted - upper) / self.inside.clamp_min(1)).clamp(0, 1)
        threshold = self.low + (self.high - self.low) / NUM_BINS * (self.at + 1 - share)
        beyond = self.largest + (self.largest - self.low).abs() * 1e-3 + 1e-6
        return silent | (is_in & is_fine), torch.where(silent, beyond, threshold)

    def moved(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The brackets to try next: the bin that the threshold is in, or the place beside that it must be in."""
        width = self.high - self.low
        low, high = self.low + width / NUM_BINS * self.at, self.low + width / NUM_BINS * (self.at + 1)
        is_below, is_beyond = self.above[:, 0] < self.wanted, self.above[:, -1] >= self.wanted
        low = torch.where(is_below, self.low - 3 * width, torch.where(is_beyond, self.high, low))
        high = torch.where(is_below, self.low, torch.where(is_beyond, self.largest, high))
        room = 1e-6 * (self.largest.abs() + 1e-6)  # counts are made in float32
        return low - room, torch.maximum(high, low) + room
