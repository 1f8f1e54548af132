"""Steering vectors from texts: the baselines of representation engineering (Zou et al. 2023, arXiv:2310.01405).

    diff_mean     mean of positive rows less mean of negative ones (Marks and Tegmark 2023, arXiv:2310.06824)
    caa           mean of the differences of pairs, at their last tokens (Rimsky et al. 2023, arXiv:2312.06681)
    pca           first principal component of the differences of pairs, or of all rows about their mean
    logistic      weights of a logistic regression
    unembedding   mean of the unembedding rows of given tokens less that of all tokens; needs no texts

Those that come without a length of their own (pca, logistic) are given the length of the gap between the means along
them, and point towards the positive texts.
"""

from collections.abc import Sequence

import torch

from saeql.sae.hooks import capture

from ..index import final_norm
from ..models import LanguageModel

METHODS = ("diff_mean", "caa", "pca", "logistic")
ROWS = ("last", "mean", "all")
_BATCH = 16


class ReadingError(ValueError):
    """A steering vector cannot be read off these texts."""


@torch.no_grad()
def read_rows(lm: LanguageModel, hook_point: str, texts: Sequence[str], rows: str = "last") -> torch.Tensor:
    """Activations of texts at a hook point, float32: their last token [n, d], their mean [n, d], or all tokens [N, d].

    The BOS does not count. Raises ReadingError for a text without tokens.
    """
    if rows not in ROWS:
        raise ReadingError(f"rows are {', '.join(ROWS)}, not {rows!r}")
    ids = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    empty = next((n for n, own in enumerate(ids) if not own), None)
    if empty is not None:
        raise ReadingError(f"text {empty + 1} has no tokens")
    found: list[torch.Tensor] = [torch.empty(0)] * len(ids)
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))  # texts of like length together
    with capture(lm.model, [hook_point], lm.device) as reader:
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            width = 1 + max(len(ids[n]) for n in batch)
            padded = torch.full((len(batch), width), lm.separator_id, device=lm.input_device)
            mask = torch.zeros_like(padded)
            for row, n in enumerate(batch):  # on the right: positions stay as they are
                own = [lm.bos_id, *ids[n]]
                padded[row, : len(own)] = torch.tensor(own)
                mask[row, : len(own)] = 1
            acts = reader.run(padded, mask)[hook_point].float().cpu()
            for row, n in enumerate(batch):
                found[n] = acts[row, 1 : 1 + len(ids[n])]
    if rows == "all":
        return torch.cat(found)
    return torch.stack([own[-1] if rows == "last" else own.mean(0) for own in found])


def direction(method: str, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The direction [d] from `negative` [m, d] to `positive` [n, d] rows; caa (and pca, where n = m) pairs them.

    Raises ReadingError for an unknown method, too few rows, or rows without a difference.
    """
    if method not in METHODS:
        raise ReadingError(f"no method {method!r}: there is {', '.join(METHODS)}, unembedding")
    if len(positive) < 2 or len(negative) < 2:
        raise ReadingError(f"{len(positive)} positive and {len(negative)} negative rows: at least 2 of each are needed")
    gap = positive.mean(0) - negative.mean(0)
    if float(gap.norm()) == 0:
        raise ReadingError("positive and negative texts are the same to the model here: there is no direction")
    if method == "diff_mean":
        return gap
    if method == "caa":
        if len(positive) != len(negative):
            raise ReadingError(f"caa takes pairs: {len(positive)} positive and {len(negative)} negative rows are none")
        return (positive - negative).mean(0)
    if method == "pca":
        pairs = len(positive) == len(negative)
        both = torch.cat([positive, negative])
        spread = positive - negative if pairs else both - both.mean(0)
        found = torch.linalg.svd(spread.double(), full_matrices=False).Vh[0].float()
    else:
        found = _logistic(positive, negative)
    found = found / found.norm()
    return found * (gap @ found)


def unembedding_direction(lm: LanguageModel, tokens: Sequence[str]) -> torch.Tensor:
    """Mean over tokens of the gradient of their logits, less the mean over the vocabulary [d].

    Raises ReadingError for a text that is not one token, or a model without an unembedding.
    """
    ids = []
    for token in tokens:
        own = lm.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(own) != 1:
            raise ReadingError(f"{token!r} is {len(own)} tokens of this model, not one")
        ids.append(own[0])
    return unembedding_of_ids(lm, ids)


def unembedding_of_ids(lm: LanguageModel, ids: Sequence[int]) -> torch.Tensor:
    """The same of token ids [n]. Raises ReadingError for a model without an unembedding."""
    head = lm.model.get_output_embeddings() if lm.is_causal else None
    if head is None:
        raise ReadingError(f"{lm.identity.model_name} has no unembedding")
    weight = head.weight.detach().float()
    scale = getattr(final_norm(lm.model), "weight", None)
    found = weight[list(ids)].mean(0) - weight.mean(0)
    return found if scale is None else found * scale.detach().float()


def _logistic(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Weights [d] of an L2-regularised logistic regression on rows scaled by their spread."""
    from ..probing.probes import fit_logistic

    rows = torch.cat([positive, negative]).double().numpy()
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).bool().numpy()
    return torch.from_numpy(fit_logistic(rows, labels, penalty=1.0).weight).float()
