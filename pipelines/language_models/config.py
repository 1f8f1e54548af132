"""Which language model words labels and judges them, and what it may cost. Unset: none, nothing leaves the machine."""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from saeql.sae.config import ConfigError, check_above_zero, check_least


class JudgeError(ValueError):
    """The judge cannot be had, or had to stop; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The language model that phrases and judges labels: an OpenAI-compatible endpoint, or a local model."""

    base_url: str = ""
    """Address of an OpenAI-compatible endpoint (vLLM, llama.cpp, Ollama, a commercial one), such as
    "http://127.0.0.1:8080/v1"; unset: none."""
    model: str = ""
    """The model's name at the endpoint; unset takes the only one that it serves."""
    api_key_env: str = ""
    """Name of the environment variable that holds the endpoint's key; the key itself is never written anywhere."""
    local: str = ""
    """In place of an endpoint: "embedded:smollm2-135m-instruct", a local folder, or a hub name."""
    device: str = "auto"
    """Device of a local model: cpu, cuda, or auto."""
    batch_questions: int = 8
    """Questions of one forward pass of a local model."""
    temperature: float = 0.0
    """Sampling temperature at the endpoint. A local model always takes the likeliest token."""
    max_concurrency: int = 4
    """Questions at the endpoint at one time."""
    timeout_seconds: float = 120.0
    """An endpoint's answer that is not complete after so long is asked for again."""
    thinking_tokens: int = 0
    """Tokens that every answer may take in addition, for models that think before they answer. Such a model gives no
    probabilities of its answer, only the answer."""
    max_tries: int = 5
    """Times that a question is sent before it counts as failed: after 429, 5xx, timeouts and broken answers."""
    backoff_seconds: float = 1.0
    """Wait before the second try, doubled with every further one; a longer Retry-After of the endpoint is honoured."""
    max_wait_seconds: float = 300.0
    """An endpoint that asks for a longer wait than this ends the command."""
    max_total_tokens: int = 2_000_000
    """Tokens that a command may spend at the endpoint, in and out together; no question that could pass it is sent."""
    price_per_million_in: float | None = None
    """What a million tokens sent cost, for the estimate."""
    price_per_million_out: float | None = None
    """What a million tokens received cost, for the estimate."""

    def __post_init__(self) -> None:
        if self.base_url and self.local:
            raise ConfigError("judge.base_url and judge.local are both set: choose one")
        if self.base_url:
            _check_url(self.base_url)
        check_least(
            self, "judge", batch_questions=1, max_concurrency=1, max_tries=1, max_total_tokens=1,
            temperature=0, thinking_tokens=0, max_wait_seconds=0, price_per_million_in=0, price_per_million_out=0,
        )  # fmt: skip
        check_above_zero(self, "judge", "timeout_seconds", "backoff_seconds")

    @property
    def is_set(self) -> bool:
        """Whether there is a judge."""
        return bool(self.base_url or self.local)

    def api_key(self) -> str:
        """The endpoint's key, "" where none is needed. Raises JudgeError where its variable is not set."""
        if not self.api_key_env:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise JudgeError(f"judge.api_key_env names the variable {self.api_key_env}, which is not set")
        return key


def _check_url(text: str) -> None:
    try:
        url = urlsplit(text)
        is_good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        is_good, url = False, urlsplit("")
    if not is_good:
        raise ConfigError(f'judge.base_url must look like "http://127.0.0.1:8080/v1", got {text!r}')
    if url.username or url.password or url.query or url.fragment:
        raise ConfigError(
            "judge.base_url is written into the run and must hold no user, password or query; "
            "name the variable that holds the key as judge.api_key_env"
        )
