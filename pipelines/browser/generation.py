"""A prompt continued with and without edits, word by word, until it is done or nobody wants it any more."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .settings import Refused

if TYPE_CHECKING:
    from ..steering.edits import Edit
    from ..steering.steerer import Steerer

Emit = Callable[[dict[str, Any]], None]


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


class Baselines:
    """Unsteered continuations, the last few: moving a slider does not write them again."""

    def __init__(self, size: int = 32):
        self._size = size
        self._kept: dict[tuple[str, Writing], str] = {}

    def get(self, prompt: str, writing: Writing) -> str | None:
        """The continuation, where it was written to its end."""
        return self._kept.get((prompt, writing))

    def put(self, prompt: str, writing: Writing, text: str) -> None:
        """Keep one, and let the oldest go."""
        self._kept[prompt, writing] = text
        while len(self._kept) > self._size:
            self._kept.pop(next(iter(self._kept)))


def write_both(
    steerer: "Steerer",
    prompt: str,
    edits: "Sequence[Edit]",
    writing: Writing,
    baselines: Baselines,
    cancelled: threading.Event,
    emit: Emit,
) -> None:
    """Emit {"side", "text"} pieces of the baseline and of the steered continuation, and {"side", "end"} after each.

    Raises SteerError for edits that cannot be made, Refused (409) where it was cancelled in between.
    """
    known = baselines.get(prompt, writing)
    if known is None:
        known = _write(steerer, "baseline", prompt, [], writing, cancelled, emit)
        baselines.put(prompt, writing, known)
    else:
        emit({"side": "baseline", "text": known})
    emit({"side": "baseline", "end": True})
    _write(steerer, "steered", prompt, edits, writing, cancelled, emit)
    emit({"side": "steered", "end": True})


def _write(
    steerer: "Steerer",
    side: str,
    prompt: str,
    edits: "Sequence[Edit]",
    writing: Writing,
    cancelled: threading.Event,
    emit: Emit,
) -> str:
    import torch
    from transformers import StoppingCriteriaList, TextStreamer

    written: list[str] = []

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                written.append(text)
                emit({"side": side, "text": text})

    def stop(ids: "torch.Tensor", scores: Any, **rest: Any) -> "torch.Tensor":
        return torch.full((ids.shape[0],), cancelled.is_set(), dtype=torch.bool, device=ids.device)

    torch.manual_seed(writing.seed)
    pieces = Pieces(steerer.lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopping = StoppingCriteriaList([stop])  # pyright: ignore[reportArgumentType]
    steerer.generate(prompt, edits, streamer=pieces, stopping_criteria=stopping, **writing.options())
    if cancelled.is_set():
        raise Refused(409, "cancelled")
    return "".join(written)
