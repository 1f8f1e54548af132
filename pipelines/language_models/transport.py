"""Requests to an HTTP endpoint that is busy, slow, broken or gone: retries with backoff, within a budget of tokens."""

import json
import random
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from .budget import Budget
from .config import JudgeConfig, JudgeError

#: Worth another try: too early, too many, overloaded, down for a moment.
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
#: No question will be answered: key, payment, permission, address.
_HOPELESS = {
    401: "refuses the key",
    402: "wants to be paid",
    403: "refuses access",
    404: "has no such model or address, which most often ends in /v1",
    405: "is no OpenAI-compatible address",
}
_MAX_BYTES = 16_000_000  # of an answer
_MAX_BACKOFF_SECONDS = 60.0


class Refused(JudgeError):
    """The endpoint does not take this request (HTTP 4xx); another one it may take."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Hopeless(Refused):
    """The endpoint will not take any request."""


class NoAnswer(JudgeError):
    """All tries failed; `is_gone` where not even a connection could be made."""

    def __init__(self, text: str, *, is_gone: bool):
        super().__init__(text)
        self.is_gone = is_gone


class Left(Exception):
    """The work was left while a request waited for its next try."""


class Transport:
    """GET and POST of JSON at one base address. Safe for several threads."""

    def __init__(self, config: JudgeConfig, budget: Budget):
        """Raises JudgeError where the key's variable is not set."""
        self.config, self.budget = config, budget
        self._key = config.api_key()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(config.timeout_seconds, connect=min(config.timeout_seconds, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=config.max_concurrency + 1),
        )
        self.leave = threading.Event()  # set: waits end, nothing more is sent
        self._free_at = 0.0  # time.monotonic() before which the endpoint asked for silence
        self._lock = threading.Lock()

    def get(self, path: str) -> Any:
        """Raises as `post`."""
        return self._exchange("GET", path, None, {}, 0, max_connects=2)

    def post(self, path: str, body: Mapping[str, Any], *, idempotency_key: str, most_tokens: int) -> Any:
        """JSON of the answer to a request that may take up to `most_tokens`.

        Raises Refused (HTTP 4xx), NoAnswer after the last try, JudgeError where no request will succeed or the budget
        is used up, Left where `leave` is set meanwhile.
        """
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
        return self._exchange("POST", path, content, headers, most_tokens, max_connects=self.config.max_tries)

    def close(self) -> None:
        """End the connections."""
        self.leave.set()
        self._client.close()

    def _exchange(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], most: int, *, max_connects: int
    ) -> Any:
        problem, connects = "", 0
        for attempt in range(self.config.max_tries):
            if attempt:
                self._wait(self.config.backoff_seconds * 2 ** (attempt - 1))
            self._wait_for_turn()
            self.budget.set_aside(most)
            spent = 0
            try:
                self._pause(0)
                status, received, data = self._send(method, path, content, headers)
                if status == 200:
                    spent = most  # unless the answer says how much it was
                    answer = _parsed(data)
                    if answer is not None:
                        spent = tokens_used(answer) or most
                        return answer
                    problem = "the answer is no JSON"
                else:
                    problem = self._problem(status, received, data)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                problem, connects = f"no connection ({self._safe(str(error))})", connects + 1
                if connects >= max_connects:
                    raise NoAnswer(f"{self._where}: {problem}; is it running?", is_gone=True) from None
            except httpx2.TimeoutException:
                problem, spent = f"no answer within {self.config.timeout_seconds:g} s", most  # it may still be charged
            except httpx2.RequestError as error:
                problem, spent = f"the connection broke ({self._safe(str(error))})", most
            finally:
                self.budget.settle(most, spent)
        raise NoAnswer(f"{self._where}: {problem}, {self.config.max_tries} times", is_gone=False)

    def _send(self, method: str, path: str, content: bytes | None, headers: dict[str, str]):
        """(status, headers, body), complete within the time limit however slowly it drips."""
        deadline = time.monotonic() + self.config.timeout_seconds
        url = self.config.base_url.rstrip("/") + path
        with self._client.stream(method, url, content=content, headers=headers) as response:
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("the answer is too slow")
                if len(data) > _MAX_BYTES:
                    raise httpx2.ReadError(f"an answer of more than {_MAX_BYTES:,} bytes")
            return response.status_code, response.headers, bytes(data)

    def _problem(self, status: int, headers: Mapping[str, str], data: bytes) -> str:
        """What went wrong, where another try may help; the others are raised."""
        text = self._safe(_message(data))
        if status in _HOPELESS:
            raise Hopeless(
                status, f"{self._where} {_HOPELESS[status]}{self._about_key(status)} (HTTP {status}: {text})"
            )
        if status not in _RETRIED:
            raise Refused(status, f"{self._where} refuses the request (HTTP {status}: {text})")
        wait = retry_after(headers)
        if wait > self.config.max_wait_seconds:
            raise JudgeError(
                f"{self._where} asks to wait {wait:,.0f} s (HTTP {status}: {text}), longer than judge.max_wait_seconds "
                f"= {self.config.max_wait_seconds:g}; answers so far are kept, give the same command again later"
            )
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() + wait)
        return f"HTTP {status}: {text}"

    def _about_key(self, status: int) -> str:
        if status != 401:
            return ""
        if not self.config.api_key_env:
            return ": name the variable that holds one as judge.api_key_env"
        return f" in {self.config.api_key_env}"

    def _wait_for_turn(self) -> None:
        while (seconds := self._free_at - time.monotonic()) > 0:
            self._pause(seconds)

    def _wait(self, seconds: float) -> None:
        self._pause(min(seconds, _MAX_BACKOFF_SECONDS) * random.uniform(0.75, 1.25))  # not all at once again

    def _pause(self, seconds: float) -> None:
        if self.leave.wait(seconds):
            raise Left

    @property
    def _where(self) -> str:
        return self.config.base_url

    def _safe(self, text: str) -> str:
        """One short line without the key."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:200] or "no reason given"


def _parsed(data: bytes) -> Any:
    """The JSON object or list, None where it is neither."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict | list) else None


def tokens_used(answer: Any) -> int:
    """Tokens in and out that an answer was charged, 0 where it does not say."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return 0
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    return sum(n for n in counts if isinstance(n, int) and n > 0)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that Retry-After asks for, as seconds or as a date (RFC 9110, 10.2.3); 0 where it is not there."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)


def _message(data: bytes) -> str:
    """The reason in an error's body: its JSON message, or the beginning of whatever it is."""
    text = data[:5000].decode("utf-8", "replace")
    try:
        error = json.loads(text)
    except ValueError:
        return text
    if isinstance(error, dict):
        error = error.get("error", error)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)
