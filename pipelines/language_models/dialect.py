"""How an endpoint wants to be asked and what it can do, found out by asking: OpenAI-compatible ones differ."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .config import JudgeConfig, JudgeError
from .questions import Answer, Capabilities, Message, Question
from .transport import Hopeless, Refused

#: Tokens a message may take for its frame in the model's chat format.
_FRAME_TOKENS = 32
_PASSWORD = "k7qz"


@dataclass(frozen=True)
class Dialect:
    """Which parts of the interface the endpoint takes."""

    model: str
    limit_key: str = "max_tokens"
    """Newer commercial models call it max_completion_tokens."""
    temperature: bool = True
    top_logprobs: int = 20
    """Likeliest first tokens that are asked for; 0: it gives none."""
    schema: bool = True

    @property
    def capabilities(self) -> Capabilities:
        """What scorers and explainers want to know."""
        return Capabilities(chances=self.top_logprobs > 0, schema=self.schema)

    def request(self, question: Question, config: JudgeConfig) -> dict[str, Any]:
        """JSON body of a chat completion."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [asdict(m) for m in question.messages],
            self.limit_key: question.max_tokens + config.thinking_tokens,
            "stream": False,
        }
        if self.temperature:
            body["temperature"] = config.temperature
        if question.wants_chances and self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if question.schema is not None and self.schema:
            schema = {"name": "answer", "strict": True, "schema": dict(question.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def most_tokens(self, question: Question, config: JudgeConfig) -> int:
        """The most that the question can cost: no tokenizer makes more tokens of a text than it has bytes."""
        return (
            question.num_bytes + _FRAME_TOKENS * len(question.messages) + question.max_tokens + config.thinking_tokens
        )

    def answer(self, reply: Any, question: Question) -> Answer:
        """The answer in a chat completion; one without text is a failure."""
        choice = _at(reply, "choices", 0)
        text = _at(choice, "message", "content")
        usage = _at(reply, "usage")
        sent, received = (n if isinstance(n := _at(usage, f"{k}_tokens"), int) else 0 for k in ("prompt", "completion"))
        likeliest = _at(choice, "logprobs", "content", 0, "top_logprobs")
        first = [
            (entry["token"], float(entry["logprob"]))
            for entry in (likeliest if isinstance(likeliest, list) and question.wants_chances else [])
            if isinstance(entry, dict)
            and isinstance(entry.get("token"), str)
            and isinstance(entry.get("logprob"), int | float)
        ]
        failure = "" if isinstance(text, str) else "the answer holds no text"
        return Answer(text if isinstance(text, str) else "", tuple(first), sent, received, failure)

    def to_bytes(self) -> bytes:
        """For the cache."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Dialect":
        """Back from the cache."""
        return cls(**json.loads(data))


def _at(value: Any, *path: str | int) -> Any:
    """An item of nested lists and mappings, None where it is not there."""
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and len(value) > step else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def find_dialect(post: Callable[..., Any], model: str, config: JudgeConfig) -> Dialect:
    """Ask two short questions. Raises JudgeError where the endpoint answers neither."""
    dialect = Dialect(model, top_logprobs=0 if config.thinking_tokens else 20)
    dialect, reply = _accepted(post, dialect, _question(wants_chances=True), config)
    if not dialect.answer(reply, _question(wants_chances=True)).first_tokens:
        dialect = replace(dialect, top_logprobs=0)  # it took the wish and left it unanswered
    schema = {
        "type": "object",
        "properties": {"word": {"type": "string", "enum": [_PASSWORD]}},
        "required": ["word"],
        "additionalProperties": False,
    }
    question = _question(schema=schema)
    try:
        body = dialect.request(question, config)
        most = dialect.most_tokens(question, config)
        key = question.key(f"dialect {model}")
        reply = post("/chat/completions", body, idempotency_key=key, most_tokens=most)
        # the question does not say the word: only who keeps to the schema comes to it
        kept = json.loads(dialect.answer(reply, question).text) == {"word": _PASSWORD}
    except Hopeless:
        raise
    except (Refused, ValueError):
        kept = False
    return replace(dialect, schema=kept)


def _question(*, wants_chances: bool = False, schema: dict[str, Any] | None = None) -> Question:
    tokens = 48 if schema else 2
    return Question((Message("user", "Say yes."),), tokens, wants_chances=wants_chances, schema=schema)


def _accepted(post: Callable[..., Any], dialect: Dialect, question: Question, config: JudgeConfig):
    """(dialect, reply): what the endpoint refuses is left out, one part after another."""
    while True:
        body = dialect.request(question, config)
        most = dialect.most_tokens(question, config)
        key = question.key(f"dialect {json.dumps(body, sort_keys=True)}")
        try:
            return dialect, post("/chat/completions", body, idempotency_key=key, most_tokens=most)
        except Hopeless:
            raise
        except Refused as error:
            less = _without(dialect, str(error))
            if less is None:
                raise JudgeError(f"the endpoint takes no chat completion: {error}") from None
            dialect = less


def _without(dialect: Dialect, reason: str) -> Dialect | None:
    """The dialect without what the refusal names, or else without the next part that some refuse."""
    if "max_completion_tokens" in reason and dialect.limit_key == "max_tokens":
        return replace(dialect, limit_key="max_completion_tokens")
    if "temperature" in reason and dialect.temperature:
        return replace(dialect, temperature=False)
    if dialect.top_logprobs > 5:
        return replace(dialect, top_logprobs=5)
    if dialect.top_logprobs:
        return replace(dialect, top_logprobs=0)
    if dialect.temperature:
        return replace(dialect, temperature=False)
    if dialect.limit_key == "max_tokens":
        return replace(dialect, limit_key="max_completion_tokens")
    return None
