"""What a model writes under directions, many at once, and how its texts fare: fluency, repetition, words of a concept.

- perplexity: of the written tokens given the prompt, under the model as it is;
- distinct-2: distinct pairs of neighbouring tokens over all pairs of a text (Li et al. 2016, arXiv:1510.03055);
- repeat rate: share of tokens that stand among the 16 before them (Welleck et al. 2019, arXiv:1908.04319);
- hit rate: share of texts with at least one token of the concept.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from saeql.sae.hooks import edit

from ..models import LanguageModel
from ..progress import OnProgress

#: Texts written at once.
_BATCH = 64
_REPEAT_REACH = 16


@dataclass(frozen=True)
class TextScores:
    """Means over the texts of one direction."""

    perplexity: float
    distinct_2: float
    repeat_rate: float
    hit_rate: float
    n: int  # texts


@torch.no_grad()
def write_texts(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    offsets: Mapping[str, torch.Tensor],
    *,
    new_tokens: int,
    seed: int,
    on_progress: OnProgress | None = None,
) -> list[list[int]]:
    """Token ids sampled (temperature 1, nucleus 0.9) after each of N prompts of token ids, without them.

    `offsets`: hook point -> [N, d], added at every token of the N-th text; none leave the model as it is.
    """
    written: list[list[int]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), _BATCH):
            at = slice(start, start + _BATCH)
            rows = {name: o[at, None].to(lm.device) for name, o in offsets.items()}
            written += _written(lm, prompts[at], rows, new_tokens)
            if on_progress is not None:
                on_progress(len(written), len(prompts))
    return written


def _written(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], offsets: Mapping[str, torch.Tensor], new_tokens: int
) -> list[list[int]]:
    longest = max(len(p) for p in prompts)
    pad = lm.separator_id
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=lm.input_device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=ids.device)
    with ExitStack() as stack:
        for name, rows in offsets.items():
            stack.enter_context(edit(lm.model, name, lambda acts, rows=rows: acts + rows.to(acts), lm.device))
        output = lm.model.generate(
            ids, attention_mask=mask, pad_token_id=pad, max_new_tokens=new_tokens, do_sample=True, temperature=1.0,
            top_p=0.9, top_k=0, repetition_penalty=1.0,
        )  # fmt: skip
    ends = lm.tokenizer.eos_token_id
    return [_until(row, ends) for row in output[:, longest:].tolist()]


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


@torch.no_grad()
def losses_of(lm: LanguageModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> np.ndarray:
    """[N] mean cross-entropy in nats of every text given its prompt, under the model as it is; nan of an empty one."""
    out = np.full(len(texts), np.nan)
    for start in range(0, len(texts), _BATCH):
        at = range(start, min(start + _BATCH, len(texts)))
        whole = [[*prompts[i], *texts[i]] for i in at]
        longest = max(map(len, whole))
        ids = torch.tensor([w + [lm.separator_id] * (longest - len(w)) for w in whole], device=lm.input_device)
        mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in whole], device=ids.device)
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(at):
            begin, end = len(prompts[i]), len(whole[row])
            if end > begin:
                log_probs = torch.log_softmax(logits[row, begin - 1 : end - 1], -1, dtype=torch.float32)
                targets = ids[row, begin:end].to(log_probs.device)
                out[i] = -float(log_probs.gather(-1, targets[:, None]).mean())
    return out


def scores(texts: Sequence[Sequence[int]], losses: np.ndarray, tokens: Collection[int]) -> TextScores:
    """Scores of texts with their mean losses [N]; `tokens` are the concept's. Empty texts count for hits only."""
    some = [t for t in texts if len(t) > 1]
    wanted = set(tokens)
    known = losses[np.isfinite(losses)]
    return TextScores(
        float(np.exp(known.mean())) if len(known) else float("nan"),
        float(np.mean([distinct_2(t) for t in some])) if some else float("nan"),
        float(np.mean([repeat_rate(t) for t in some])) if some else float("nan"),
        float(np.mean([not wanted.isdisjoint(t) for t in texts])),
        len(texts),
    )


def distinct_2(ids: Sequence[int]) -> float:
    """Distinct neighbouring pairs over all pairs of a text of at least two tokens."""
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs)


def repeat_rate(ids: Sequence[int]) -> float:
    """Share of tokens after the first that stand among the 16 before them."""
    return sum(t in ids[max(0, i - _REPEAT_REACH) : i] for i, t in enumerate(ids) if i) / (len(ids) - 1)
