"""A prompt continued with and without edits, side by side, until it is done or nobody wants it any more."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .settings import Refused

if TYPE_CHECKING:
    from ..steering.edits import Edit
    from ..steering.steerer import Steerer

Emit = Callable[[dict[str, Any]], None]

#: In the order of the batch.
SIDES = ("baseline", "steered")


@dataclass(frozen=True)
class Writing:
    """How a continuation is written."""

    new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Of `generate` of transformers."""
        if self.temperature <= 0:
            return {"max_new_tokens": self.new_tokens}
        return {"max_new_tokens": self.new_tokens, "do_sample": True, "temperature": self.temperature}


def write_both(
    steerer: "Steerer",
    prompt: str,
    edits: "Sequence[Edit]",
    writing: Writing,
    cancelled: threading.Event,
    emit: Emit,
) -> None:
    """Emit {"side", "text"} pieces of the baseline and of the steered continuation, token by token of both, and
    {"side", "end"} where one ends.

    Both are rows of one batch: it takes the time of one, and no edit changes what is drawn for the baseline.
    Raises SteerError for edits that cannot be made, Refused (409) where it was cancelled in between.
    """
    import torch
    from transformers import StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    last = _end_tokens(steerer)

    class Both(BaseStreamer):
        """What transformers streams, row by row; its own streamers take one row only."""

        def __init__(self) -> None:
            self.sides = [_Side(name, steerer.lm.tokenizer, emit) for name in SIDES]
            self.is_prompt = True

        def put(self, value: "torch.Tensor") -> None:
            if not self.is_prompt:
                for side, token in zip(self.sides, value.tolist(), strict=True):
                    side.put(token, is_last=token in last)
            self.is_prompt = False

        def end(self) -> None:
            for side in self.sides:
                side.close()

    def stop(ids: "torch.Tensor", scores: Any, **rest: Any) -> "torch.Tensor":
        return torch.full((ids.shape[0],), cancelled.is_set(), dtype=torch.bool, device=ids.device)

    torch.manual_seed(writing.seed)
    steerer.generate_all(
        [prompt, prompt],
        edits,
        only=[False, True],
        streamer=Both(),
        stopping_criteria=StoppingCriteriaList([stop]),  # pyright: ignore[reportArgumentType]
        **writing.options(),
    )
    if cancelled.is_set():
        raise Refused(409, "cancelled")


class _Side:
    """One text as it grows: whole characters are told as soon as they are there."""

    def __init__(self, name: str, tokenizer: Any, emit: Emit):
        self.name, self.tokenizer, self.emit = name, tokenizer, emit
        self.ids: list[int] = []
        self.told = ""
        self.is_open = True

    def put(self, token: int, *, is_last: bool) -> None:
        if not self.is_open:
            return  # padding, while the other one is written
        self.ids.append(token)
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text)
        if is_last:
            self.close()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._tell(self._text())
            self.emit({"side": self.name, "end": True})

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _tell(self, text: str) -> None:
        if len(text) > len(self.told):
            self.emit({"side": self.name, "text": text[len(self.told) :]})
            self.told = text


def _end_tokens(steerer: "Steerer") -> set[int]:
    """Tokens that end a text."""
    ids = steerer.lm.model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
