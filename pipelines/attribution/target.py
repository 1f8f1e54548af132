"""What is explained: one number of the prediction after a prompt, and the prompt itself as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models import LanguageModel

MEASURES = ("logit", "logprob")


class WhyError(ValueError):
    """A question about causes that cannot be answered: of the prompt, the token, the feature, or the dictionary."""


@dataclass(frozen=True)
class Target:
    """The number of a prediction that is explained."""

    token_id: int
    token: str
    against_id: int | None
    against: str
    """Second token, "" for none: the logit of `token` less that of `against`."""
    measure: str
    """logit, or logprob: the log-probability. With `against` both are the same number."""

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """[B] of logits [B, V]."""
        logits = logits.float()
        if self.against_id is not None:
            return logits[:, self.token_id] - logits[:, self.against_id]
        chosen = logits[:, self.token_id]
        return chosen if self.measure == "logit" else chosen - logits.logsumexp(-1)

    def describe(self) -> str:
        """In a few words: `logit of " Paris"`."""
        if self.against_id is not None:
            return f'logit of "{self.token}" less that of "{self.against}"'
        return f'{"logit" if self.measure == "logit" else "log-probability"} of "{self.token}"'


def prompt_ids(lm: LanguageModel, prompt: str | Sequence[int], position: int = -1) -> list[int]:
    """Token ids of a prompt up to `position`, whose prediction is explained; what follows has no say in it.

    A text gets a BOS in front; ids are taken as they are. Position 0 is the first token (the BOS), -1 the last.
    Raises WhyError for a prompt that is empty or longer than the model's context, and a position outside of it.
    """
    if isinstance(prompt, str):
        ids = [lm.bos_id, *lm.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]]
    else:
        ids = [int(i) for i in prompt]
    if len(ids) < 2:
        raise WhyError("the prompt has no tokens: give some text")
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(ids) > context:
        raise WhyError(f"the prompt is {len(ids)} tokens long, the model's context {context}")
    if not -len(ids) <= position < len(ids):
        raise WhyError(
            f"no position {position}: the prompt has tokens 0 (the first) to {len(ids) - 1}, or -1 for the last"
        )
    if position % len(ids) == 0:
        raise WhyError("position 0 is the first token: dictionaries do not read it, and nothing stands before it")
    return ids[: position % len(ids) + 1]


def choose_target(
    lm: LanguageModel, logits: torch.Tensor, token: str | None, against: str | None, measure: str
) -> Target:
    """The target of a prediction, logits [V]; without `token` the model's own likeliest one.

    Raises WhyError for an unknown measure, and texts that are not one token.
    """
    if measure not in MEASURES:
        raise WhyError(f"no measure {measure!r}: there is {', '.join(MEASURES)}")
    token_id = int(logits.argmax()) if token is None else one_token(lm, token)
    against_id = None if against is None else one_token(lm, against)
    if against_id == token_id:
        raise WhyError(f"token and against are both {against!r}: their difference is always 0")
    text, other = lm.token_texts([token_id, token_id if against_id is None else against_id])
    return Target(token_id, text, against_id, "" if against_id is None else other, measure)


def one_token(lm: LanguageModel, text: str) -> int:
    """Id of a text that is one token. Raises WhyError, naming the tokens, for any other."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != lm.tokenizer.unk_token_id:
        return ids[0]
    parts = " ".join(f"[{part}]" for part in lm.token_texts(ids))
    hint = "" if text.startswith(" ") else "; most words are one token only with the space before them"
    raise WhyError(f"{text!r} is {len(ids)} tokens of this model, not one: {parts or 'none'}{hint}")
