"""What is asked of a language model and what it answers, whichever model it is: the interface of this folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..progress import OnProgress


def silent(done: int, total: int) -> None:
    """An OnProgress that shows nothing."""


@dataclass(frozen=True)
class Message:
    """One turn: role 'system', 'user' or 'assistant'."""

    role: str
    content: str


@dataclass(frozen=True)
class Question:
    """One request. An answer is short text; or one word of which the chances are wanted; or JSON of a schema."""

    messages: tuple[Message, ...]
    max_tokens: int
    wants_chances: bool = False
    """Ask for the likeliest first tokens with their probabilities, where the model gives them."""
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer, where the model keeps to one."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages: no tokenizer that reads bytes makes more tokens of them."""
        return sum(len(m.content.encode("utf-8", "replace")) for m in self.messages)

    def key(self, model: str) -> str:
        """Hash of the whole question and of who is asked: what answers are kept under, and the Idempotency-Key."""
        text = json.dumps([model, asdict(self)], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What came back. `failure` says why nothing did: such an answer counts as wrong, and is never left out."""

    text: str = ""
    first_tokens: tuple[tuple[str, float], ...] = ()
    """The likeliest first tokens with their log probabilities, where they were wanted and could be had."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failure: str = ""

    def to_bytes(self) -> bytes:
        """For the cache."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Answer":
        """Back from the cache."""
        fields = json.loads(data)
        fields["first_tokens"] = tuple((str(t), float(p)) for t, p in fields["first_tokens"])
        return cls(**fields)


@dataclass(frozen=True)
class Capabilities:
    """What a language model can do beyond answering."""

    chances: bool
    """It gives probabilities of first tokens."""
    schema: bool
    """It keeps to a JSON schema."""


@dataclass
class Spent:
    """What was asked and what it took, since the judge was made."""

    asked: int = 0
    """Questions sent and answered."""
    cached: int = 0
    """Questions answered before, for nothing."""
    failed: int = 0
    """Questions that stayed without answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        return (
            f"{self.asked:,} questions asked, {self.cached:,} known from before, {self.failed:,} failed; "
            f"{self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"
        )


class Judge(Protocol):
    """A language model that answers questions: an endpoint or a local model."""

    spent: Spent

    @property
    def name(self) -> str:
        """Short name for the column `explainer` and tables."""
        ...

    @property
    def identity(self) -> str:
        """Everything about the model that its answers depend on."""
        ...

    @property
    def counts_exactly(self) -> bool:
        """Whether `count_tokens` uses the model's own tokenizer."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do; an endpoint is asked on first use. Raises JudgeError where it cannot be reached."""
        ...

    def ask(self, questions: Sequence[Question], on_progress: OnProgress = silent) -> list[Answer]:
        """Answers in the order of the questions; those known from before are not asked again.

        Raises JudgeError where there is no use in going on: the cap is reached, the endpoint is gone.
        """
        ...

    def known(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The answers that need no asking, None for the others."""
        ...

    def count_tokens(self, question: Question) -> int:
        """Tokens that the question takes, estimated where the tokenizer is not at hand."""
        ...

    def close(self) -> None:
        """Let go of connections and files."""
        ...
