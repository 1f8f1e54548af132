"""What every request passes before anything reads it, and what every answer carries.

- Host must be a name of this server: a page whose own name is pointed at 127.0.0.1 (DNS rebinding) has another.
- Origin, and what browsers say of the sender, must be this server: no other page can send anything here.
- Bodies and query strings have a largest size, and only so many requests are answered at once.
- Answers allow scripts and styles of this server's own files and nothing else.
"""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .settings import Refused, Settings

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """ASGI middleware; see the module's text."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings
        self.answering = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in own]
                if b"cache-control" not in own:
                    more.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            check_sender(scope, self.settings)
            self._check_size(scope)
            if self.answering >= self.settings.limits.requests:
                raise Refused(429, f"{self.answering} requests are being answered already: try again in a moment")
        except Refused as refused:
            await refuse(scope, headed, refused)
            return
        self.answering += 1
        try:
            await self._answer(scope, receive, headed)
        finally:
            self.answering -= 1

    def _check_size(self, scope: Scope) -> None:
        limits, headers = self.settings.limits, dict(scope["headers"])
        if len(scope["query_string"]) > limits.query_bytes or len(scope["path"]) > 1024:
            raise Refused(413, f"the address is longer than {limits.query_bytes} bytes")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise Refused(400, "Content-Length is no number")
        if int(length) > limits.body_bytes:
            raise Refused(413, f"the body is larger than {limits.body_bytes} bytes")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A body may be longer than it says, or not say: it is counted as it comes."""
        left, started = self.settings.limits.body_bytes, False
        too_large = Refused(413, f"the body is larger than {left} bytes")

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise too_large
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if left >= 0 or started:  # else whoever read the body answers that it is broken, which it is not
                started = True
                await send(message)

        try:
            await self.app(scope, counted, noted)
        except Refused:
            if started or left >= 0:
                raise
        if left < 0 and not started:
            await refuse(scope, send, too_large)


def check_sender(scope: Scope, settings: Settings) -> None:
    """Raise Refused (403) for a request that was not sent to this server by name, or by a page of another."""
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    hosts = headers.get("host", [])
    if len(hosts) != 1 or _name_of(hosts[0]) not in settings.known_hosts:
        raise Refused(
            403, "this server goes by another name: `saeql serve --allow-host NAME` lets it be called by more"
        )
    for origin in headers.get("origin", []):
        if origin.partition("://")[2].lower() != hosts[0].lower():
            raise Refused(403, "a page of another origin may not ask this server")
    site = headers.get("sec-fetch-site", ["none"])[0]
    is_visit = headers.get("sec-fetch-mode", [""])[0] == "navigate" and scope["method"] in ("GET", "HEAD")
    if site not in ("none", "same-origin") and not is_visit:
        raise Refused(403, "a page of another origin may not ask this server")


def _name_of(host: str) -> str:
    """The name in a Host header, without its port and the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def refuse(scope: Scope, send: Send, refused: Refused) -> None:
    """Answer with one line, JSON for the API."""
    is_api = scope["path"].startswith("/api/")
    body: Any = json.dumps({"error": refused.message}) if is_api else refused.message + "\n"
    kind = "application/json" if is_api else "text/plain; charset=utf-8"
    headers = [
        (b"content-type", kind.encode()),
        (b"connection", b"close"),
        (b"content-length", b"%d" % len(body.encode())),
    ]
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
