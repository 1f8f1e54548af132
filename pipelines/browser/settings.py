"""What a browser serves, to whom, and how much of anything one request may ask for."""

from dataclasses import dataclass, field
from pathlib import Path


class Refused(Exception):
    """A request that is not answered as asked: an HTTP status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Beyond these a request is refused with 413 (too large) or 429 (too many)."""

    body_bytes: int = 64 << 10
    query_bytes: int = 16 << 10
    text_chars: int = 4_000
    prompt_tokens: int = 512
    sql_rows: int = 1_000
    csv_rows: int = 100_000
    sql_seconds: float = 10.0
    page_rows: int = 200
    last_page: int = 1_000_000
    steered_features: int = 8
    new_tokens: int = 200
    requests: int = 48
    """Requests answered at once."""
    jobs: int = 4
    """Requests that wait for the model, the one at work included."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One browser. `shown` is how the run is called in snippets to copy."""

    store: Path
    run: Path | None = None
    """The run directory; None where there is only a store: then nothing can ask a model."""
    shown: str = "RUN"
    host: str = "127.0.0.1"
    port: int = 7860
    hosts: tuple[str, ...] = ()
    """Further names by which browsers may call this server."""
    token: str
    memory_limit: str = "100MB"
    """Of the engine in this process; statements of readers run in a process of their own, see `sql_memory`."""
    sql_memory: str = "1GB"
    threads: int = 1
    """Of the engine; several requests are answered at once anyway."""
    limits: Limits = field(default_factory=Limits)

    @property
    def cookie(self) -> str:
        """Name of the cookie with the token; browsers share cookies between the ports of a host."""
        return f"saeql_{self.port}"

    @property
    def known_hosts(self) -> frozenset[str]:
        """Names that a Host header may give. A page elsewhere whose name was pointed here has another."""
        return frozenset({"127.0.0.1", "localhost", "::1", self.host.lower(), *(h.lower() for h in self.hosts)})
