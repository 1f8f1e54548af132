"""Which features of a later dictionary a feature feeds on a prompt: linearly, and by ablation.

Linear: the derivative of the later activation in the direction of what the feature writes, z_j d_j on all its tokens at
once, by forward-mode differentiation through the layers between; exact: the later activation less what it is with the
feature at 0. A later feature that is not active has no derivative: switching on or off is seen by ablation alone.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from saeql.sae.hooks import capture, edit
from saeql.sae.model import SparseAutoencoder

from ..models import ModelIdentity
from .agreement import Agreement, agreement
from .attributor import Attributor
from .parts import rows_read, take_apart
from .target import WhyError, prompt_ids


@dataclass(frozen=True)
class FedFeature:
    """A later feature on all tokens; effects are in units of its own activation."""

    feature: int
    num_tokens: int
    """Tokens on which it is active, or would be without the earlier feature."""
    activation: float
    """Sum over tokens."""
    linear: float
    exact: float
    position: int
    """The token with the largest exact effect."""


@dataclass(frozen=True)
class Feeds:
    """What one feature feeds."""

    tokens: list[str]
    feature: int
    positions: list[int]
    """Tokens that it is active on."""
    later: str
    """Hook point of the later dictionary."""
    fed: list[FedFeature]  # largest exact effect first
    agreement: Agreement
    """Of linear and exact effects over all later features active on all tokens."""
    agreement_staying: Agreement
    """The same without those that vanish, which drop to 0 however little they were fed."""
    num_appearing: int
    """Later features, by token, that are active only without the earlier one."""
    num_vanishing: int
    """Those that are active only with it."""


class LaterDictionary:
    """A dictionary at one hook point of the same model.

    Raises WhyError for a crosscoder, ModelMismatch where it belongs to another model.
    """

    def __init__(self, dictionary: SparseAutoencoder, reads: Sequence[str], metadata: dict[str, Any], of: Attributor):
        if len(reads) != 1:
            raise WhyError(f"a crosscoder reads {len(reads)} hook points: name a later dictionary that reads one")
        if "identity" in metadata:
            identity = ModelIdentity(**metadata["identity"])
            identity.require(of.lm.identity.at([identity.hook_point]))
        self.dictionary, self.reads, self.metadata = dictionary.to(of.lm.device), reads[0], metadata


@torch.no_grad()
def feeds(
    attributor: Attributor,
    feature: int,
    later: LaterDictionary,
    prompt: str | Sequence[int],
    *,
    position: int = -1,
    top: int = 20,
) -> Feeds:
    """The `top` later features that `feature` feeds on a prompt up to `position`.

    Raises WhyError for a feature that there is not or that is not active on the prompt, and for a dictionary that the
    feature's hook point does not reach.
    """
    lm, here, there = attributor.lm, attributor.writes, later.reads
    d_sae = attributor.dictionary.d_sae
    if not 0 <= feature < d_sae:
        raise WhyError(f"no feature {feature}: this dictionary has features 0 to {d_sae - 1}")
    ids = torch.tensor([prompt_ids(lm, prompt, position)], device=lm.input_device)
    with capture(lm.model, list(dict.fromkeys((attributor.reads, here, there))), lm.device) as reader:
        acts = {name: rows[0].float() for name, rows in reader.run(ids).items()}
    order = list(acts)  # as the model computes them
    if order.index(there) <= order.index(here):
        raise WhyError(f"{there} is not after {here}: what a feature feeds is further on in the model")
    if acts[there].shape[-1] != later.dictionary.d_in:
        raise WhyError(
            f"the later dictionary reads {later.dictionary.d_in} coordinates, {there} has {acts[there].shape[-1]}"
        )
    keep = rows_read(acts[here], here, attributor.metadata) & rows_read(
        acts[attributor.reads], attributor.reads, attributor.metadata
    )
    parts = take_apart(attributor.dictionary, acts[attributor.reads], acts[here], keep)
    own = (parts.features == feature).nonzero()[:, 0]
    if len(own) == 0:
        raise WhyError(
            f"feature {feature} is not active on this prompt, so it feeds nothing; `saeql search --prompt` lists some"
        )
    without = parts.without(own)
    change = _derivative(attributor, ids, there, parts.acts - without)
    ablated = _read(attributor, ids, there, without)
    if float(change.norm()) == 0 and torch.equal(ablated, acts[there]):
        raise WhyError(f"{here} does not reach {there} in this model")
    return _compare(
        attributor, feature, parts.positions[own].tolist(), later, acts[there], ablated, change, ids[0].tolist(), top
    )


def _read(attributor: Attributor, ids: torch.Tensor, there: str, new: torch.Tensor) -> torch.Tensor:
    """[T, d] rows at `there` with `new` [T, d] in place where the attributor's dictionary writes."""
    lm = attributor.lm
    with (
        edit(lm.model, attributor.writes, lambda _: new[None], lm.device),
        capture(lm.model, [there], lm.device) as reader,
    ):
        return reader.run(ids)[there][0]


def _derivative(attributor: Attributor, ids: torch.Tensor, there: str, direction: torch.Tensor) -> torch.Tensor:
    """[T, d] derivative of the rows at `there` as those where the dictionary writes move along `direction` [T, d]."""
    lm = attributor.lm
    with ExitStack() as stack:
        stack.enter_context(forward_ad.dual_level())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others have no forward derivative
        stack.enter_context(
            edit(lm.model, attributor.writes, lambda h: forward_ad.make_dual(h, direction[None].to(h)), lm.device)
        )
        reader = stack.enter_context(capture(lm.model, [there], lm.device))
        tangent = forward_ad.unpack_dual(reader.run(ids)[there]).tangent
        return torch.zeros_like(direction) if tangent is None else tangent[0].float()


def _compare(
    attributor: Attributor,
    feature: int,
    positions: list[int],
    later: LaterDictionary,
    before: torch.Tensor,
    ablated: torch.Tensor,
    change: torch.Tensor,
    ids: list[int],
    top: int,
) -> Feeds:
    rows = rows_read(before, later.reads, later.metadata).nonzero()[:, 0]
    dictionary, num_rows = later.dictionary, len(rows)
    with_it, without_it = (_dense(dictionary, acts[rows]) for acts in (before, ablated))
    row, fed = ((with_it > 0) | (without_it > 0)).nonzero(as_tuple=True)
    is_active = with_it[row, fed] > 0
    stays = is_active & (without_it[row, fed] > 0)
    slopes = (change[rows] @ dictionary.W_enc.detach().t())[row, fed] * dictionary.slope(fed)
    linear = torch.where(is_active, slopes, 0.0)
    exact = with_it[row, fed] - without_it[row, fed]

    def sums(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(dictionary.d_sae, device=values.device).index_add(0, fed, values)

    totals, counts = sums(exact), sums(torch.ones_like(exact))
    found = fed.unique()
    best = found[totals[found].abs().argsort(descending=True, stable=True)][:top].tolist()
    listed, linear_sums, activation = [], sums(linear), sums(with_it[row, fed])
    for f in best:
        own = (fed == f).nonzero()[:, 0]
        place = int(rows[row[own[exact[own].abs().argmax()]]])
        listed.append(
            FedFeature(f, int(counts[f]), float(activation[f]), float(linear_sums[f]), float(totals[f]), place)
        )
    return Feeds(
        attributor.lm.token_texts(ids),
        feature,
        positions,
        later.reads,
        listed,
        agreement(f"active features on {num_rows} tokens", linear[is_active].tolist(), exact[is_active].tolist()),
        agreement("those that stay active", linear[stays].tolist(), exact[stays].tolist()),
        int((~is_active).sum()),
        int((is_active & ~stays).sum()),
    )


def _dense(dictionary: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """[N, d_sae] activations of rows x [N, d_in]."""
    latents = dictionary.encode(x)
    return torch.zeros(len(x), dictionary.d_sae, device=x.device).scatter_add(1, latents.indices.long(), latents.values)
